"""Is a description English? The built-in encoder has read nothing else, and would give a vector that means nothing."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from zept_nnunet.errors import ZePTError

_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u024f]{2}")
_ENOUGH_WORDS = 5  # below, a language is a guess
_SURE = 0.95
# between which to judge; with rare languages among them, Latin terms would be taken for one
_LANGUAGES = "en de fr es it pt nl pl cs sv da no fi tr ru zh ja ko ar he el hu ro uk vi th hi".split()


def check_english(text: str) -> None:
    """Refuse a text that is surely another language.

    Raises:
        ZePTError: a word is of another script, or the text is long enough to be told and is not English.
    """
    if _OTHER_SCRIPT.search(text):  # one letter may be a symbol, as in "β-hCG"
        raise _refusal(text, "another script")
    if len(text.split()) < _ENOUGH_WORDS:
        return
    language, probability = _identifier().classify(text)
    if language != "en" and probability > _SURE:
        raise _refusal(text, f"the language code {language!r}")


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LANGUAGES)
    return identifier


def _refusal(text: str, what: str) -> ZePTError:
    return ZePTError(
        f"wanted English, got {what}: {text[:60]!r}. Describe the class in English, or use an encoder of that "
        "language: zept knowledge encode --encoder NAME"
    )
