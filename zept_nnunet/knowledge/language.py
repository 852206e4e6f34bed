"""Is a description English? The built-in encoder has read nothing else, and would give a vector that means nothing."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import catalog

_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u024f]{2}")
_ENOUGH_WORDS = 5  # below, a language is a guess
_SURE = 0.95
_SHORT_WORDS = 15  # up to here, words are looked up
_FUNCTION_WORDS = frozenset(
    "a about above across after again against all almost along also although always among an and another any are "
    "around as at away be because been before behind being below beneath beside between both but by can cannot "
    "could did do does down during each either else even every except few first for from further had has have "
    "having he her here his how however i if in inside into is it its itself just last least less like likely many "
    "may mainly me might more most mostly much must my near nearly neither never next no nor not nothing now of off "
    "often on once one only onto or other others our out outside over own per quite rarely rather same several she "
    "should since so some sometimes somewhat still such than that the their them then there these they this those "
    "though through throughout to too toward towards two three four five under unlike until up upon upward us "
    "usually very was we well were what when where whether which while who whole whose will with within without "
    "would yet you your abnormal big bright color dark disease growth growths hard huge large odd rare seen shows "
    "strange tiny unusual".split()
)
_FOREIGN = frozenset(  # common words of other languages that no English text holds
    "der das dem den des und mit ohne im vom zur zum le la les du dans avec une et el los las del en con una il lo "
    "della dello nel nella di het een van met na da em com uma".split()
)
# endings of words that are the same in many languages: they tell nothing
_INTERNATIONAL = re.compile(r"(?:oma|omas|omata|osis|itis|emia|plasia)$")
_ENDINGS = ("s", "es", "d", "ed", "ly", "ing", "er", "est", "y", "al", "ic", "like")
# between which to judge; with rare languages among them, Latin terms would be taken for one
_LANGUAGES = "en de fr es it pt nl pl cs sv da no fi tr ru zh ja ko ar he el hu ro uk vi th hi".split()


def check_english(text: str) -> None:
    """Refuse a text that is surely another language. Without py3langid only its script is looked at.

    Raises:
        ZePTError: a word is of another script, or the text is long enough to be told and is not English.
    """
    if _OTHER_SCRIPT.search(text):  # one letter may be a symbol, as in "β-hCG"
        raise _refusal(text, "another script")
    identifier = _identifier() if len(text.split()) >= _ENOUGH_WORDS else None
    if identifier is None:
        return
    language, probability = identifier.classify(text)
    if language != "en" and probability > _SURE:
        raise _refusal(text, f"the language code {language!r}")


def check_words(text: str) -> None:
    """Refuse a short text most of whose words are in no description and are no common English words.

    One unknown word passes: a name such as "insulinoma" may be new. So does a long text, whose language can be told.

    Raises:
        ZePTError: two words or more are unknown, and more than half of those that tell anything; half is enough where
            one is a common word of another language.
    """
    words = [w for w in re.findall(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*", text.lower()) if len(w) > 1]
    if len(words) > _SHORT_WORDS:
        return
    telling = [w for w in words if not _INTERNATIONAL.search(w) or w in _vocabulary()]
    unknown = [w for w in dict.fromkeys(telling) if not _is_known(w)]
    limit = len(set(telling)) / 2
    if len(unknown) >= 2 and (len(unknown) > limit or (len(unknown) == limit and _FOREIGN & set(unknown))):
        raise _refusal(text, f"words that no English description holds ({', '.join(unknown[:6])})")


def _is_known(word: str) -> bool:
    known = _vocabulary()
    if word in known or all(part in known for part in re.split(r"[-'’]", word)):
        return True
    stems = {word.removesuffix(end) for end in _ENDINGS if len(word) - len(end) >= 4}
    stems |= {f"{stem}e" for stem in stems} | {f"{stem[:-1]}y" for stem in stems if stem.endswith("i")}
    return not stems.isdisjoint(known)


@cache
def _vocabulary() -> frozenset[str]:
    """The words of every built-in description, name and synonym, and common English ones."""
    texts = (" ".join((entry.text, *entry.synonyms)) for entry in catalog())
    return _FUNCTION_WORDS | {w for text in texts for w in re.findall(r"[^\W\d_]+", text.lower())}


@cache
def _identifier() -> Any:
    """None where py3langid is not installed; then the built-in encoder is refused too."""
    if importlib.util.find_spec("py3langid") is None:
        return None
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LANGUAGES)
    return identifier


def _refusal(text: str, what: str) -> ZePTError:
    return ZePTError(
        f"wanted English, got {what}: {text[:60]!r}. Describe the class in English, or use an encoder of that "
        "language: zept knowledge encode --encoder NAME"
    )
