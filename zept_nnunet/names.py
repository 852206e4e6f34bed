"""What a label's name says: organ or tumor, which side, and which organ a tumor sits in. Words only, no torch.

A name is a bag of words. Words that mean one anatomy ("renal", "kidneys") become one word ("kidney"). An organ hosts a
tumor when every anatomical word of the organ's name stands in the tumor's name and neither side nor level contradicts:
"kidney tumor" sits in "left kidney" and in "right kidney", "left renal cyst" in the left one only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_TUMOR_WORDS = frozenset(
    "tumor tumors neoplasm neoplasms neoplasia cancer cancers malignancy malignancies malignant lesion lesions cyst "
    "cysts kyst kysts nodule nodules mass masses metastasis metastases metastatic mets polyp polyps gist hcc rcc "
    "pdac ipmn nsclc sclc edema oedema necrosis necrotic abscess abscesses carcinoid carcinoids carcinomatosis "
    "desmoid dermoid fibroid fibroids lymphadenopathy adenopathy mucocele hyperplasia fibromatosis "
    "lymphangiomatosis klatskin aml fnh ccrcc prcc chrcc icca pcca dcca utuc pnet pannet sbnet gbm pnen hgg lgg crc "
    "mpm hca flc gbc rmc net mcn spn lamn escc hgsoc gctb sts ptc atc pitnet scc tcc linitis malformation "
    "malformations lymphomatous".split()
)
_TUMOR_PHRASE = re.compile(
    r"\b(?:enlarged|abnormal|suspicious|pathologic(?:al)?) (?:\w+ )*nodes?\b|\bomental cakes?\b|"
    r"\bperitoneal implants?\b"
)
_GENERIC = frozenset(
    "tumor tumors neoplasm neoplasms cancer cancers lesion lesions mass masses cyst cysts nodule nodules metastasis "
    "metastases".split()
)
_OMA = re.compile(r"^[a-z]{2,}omas?$|^[a-z]{2,}omata$")  # adenoma, carcinomas, hepatoblastoma
_GLUED = re.compile(r"^([a-z]{3,})(tumors?|cysts?|kysts?|cancers?|lesions?|nodules?)$")
_NUMBERED = re.compile(r"^([a-z]{3,})0*([0-9]+)$")  # "livertumor01", but "L1" and "T12" are names
_GLUED_SIDE = re.compile(r"^(?:(left|right)([a-z]{4,})|([a-z]{4,})(left|right))$")
_NOT_OMA = frozenset("stoma stomas stroma soma somas coma trachoma glaucoma".split())

_ANATOMY = {  # word → the anatomical words that it stands for
    **dict.fromkeys("hepatic livers hepatocellular hepatoblastoma hcc hca icca".split(), ("liver",)),
    **dict.fromkeys("renal kidneys nephric rcc ccrcc prcc chrcc rmc nephroblastoma".split(), ("kidney",)),
    **dict.fromkeys("pancreatic pdac ipmn pnet pannet pnen".split(), ("pancreas",)),
    **dict.fromkeys("splenic spleens".split(), ("spleen",)),
    **dict.fromkeys("pulmonary lungs nsclc sclc bronchial bronchogenic".split(), ("lung",)),
    **dict.fromkeys("colonic".split(), ("colon",)),
    **dict.fromkeys("rectal".split(), ("rectum",)),
    **dict.fromkeys("colorectal crc".split(), ("colon", "rectum")),
    **dict.fromkeys("gastric".split(), ("stomach",)),
    **dict.fromkeys("oesophagus oesophageal esophageal escc".split(), ("esophagus",)),
    **dict.fromkeys("duodenal".split(), ("duodenum",)),
    **dict.fromkeys("adrenals suprarenal".split(), ("adrenal",)),
    **dict.fromkeys("vesical".split(), ("bladder",)),
    **dict.fromkeys("prostatic".split(), ("prostate",)),
    **dict.fromkeys("uterine".split(), ("uterus",)),
    **dict.fromkeys("ovarian ovaries hgsoc".split(), ("ovary",)),
    **dict.fromkeys("cervical".split(), ("cervix",)),
    **dict.fromkeys("thyroidal ptc atc".split(), ("thyroid",)),
    **dict.fromkeys("cerebral glioma glioblastoma gbm hgg lgg meningioma".split(), ("brain",)),
    **dict.fromkeys("cardiac".split(), ("heart",)),
    **dict.fromkeys("mammary breasts".split(), ("breast",)),
    **dict.fromkeys("osseous bony bones gctb".split(), ("bone",)),
    **dict.fromkeys("vertebrae vertebral vertebras".split(), ("vertebra",)),
    **dict.fromkeys("ribs costal".split(), ("rib",)),
    **dict.fromkeys("bowels intestine intestines intestinal".split(), ("bowel",)),
    **dict.fromkeys("nodes nodal".split(), ("node",)),
    "gbc": ("gallbladder",),
    "lamn": ("appendix",),
    "mpm": ("pleura",),
    "pitnet": ("pituitary",),
}
_USUAL_ANATOMY = {  # tumors → where they sit unless the name says otherwise, as "hepatic AML" does
    **dict.fromkeys("aml angiomyolipoma oncocytoma".split(), "kidney"),
    **dict.fromkeys("klatskin fnh".split(), "liver"),
}
_KNOWN_ANATOMY = frozenset(word for words in _ANATOMY.values() for word in words) | frozenset(
    "gallbladder jejunum ileum appendix trachea larynx pharynx testis penis vagina eye tongue tonsil skin muscle "
    "pituitary thymus pleura peritoneum omentum mesentery mediastinum".split()
)
_OF_THE_NECK = frozenset("node nodes nodal lymph vertebra vertebrae vertebral spine rib ribs cord esophagus".split())
_SIDES = {**dict.fromkeys(("left", "l", "lt"), "left"), **dict.fromkeys(("right", "r", "rt"), "right")}
_LEVELS = {level: level for level in ("upper", "middle", "lower")}
_PARTS = frozenset(  # words of an organ's name that a tumor's name may leave out
    "lobe lobes lobar gland glands parenchyma segment segments head neck body tail cortex medulla urinary whole "
    "healthy normal tissue organ region and with including of the in".split()
)
_VESSELS = frozenset("vessel vessels vein veins artery arteries aorta cava vascular".split())
_JOIN = re.compile(r"\b(?:and|with|including|incl|plus)\b|[+&]")


def normalize_name(name: str) -> str:
    """Lower case, `_` and `-` as spaces, "tumour" as "tumor", single spaces. Lookups go through this."""
    spaced = re.sub(r"[\s_\-]+", " ", name.lower()).strip()
    return spaced.replace("tumour", "tumor")


def infer_is_tumor(name: str) -> bool:
    """Whether the name means a tumor, cyst, nodule or other lesion.

    "kidney and tumor", as regions are called, means an organ with what is in it: an organ.
    """
    organ, *rest = _JOIN.split(normalize_name(name), maxsplit=1)
    if rest and _anatomy(organ) and not _has_tumor_word(organ) and not _anatomy(rest[0]):
        return False
    return _has_tumor_word(name)


def infer_hosts(tumor_name: str, organ_names: Iterable[str]) -> tuple[str, ...]:
    """The organs that the tumor's name points at, in the order given; empty where it points at none of them.

    A tumor whose name holds no anatomy ("tumor", "cyst") sits in the only organ there is; left and right of the same
    organ, or its lobes, count as one. Vessels are not taken for hosts.
    """
    organs = [o for o in organ_names if not _VESSELS & set(_words(o))]
    matches = organs_named(tumor_name, organs)
    if matches or _anatomy(_seat(tumor_name)) & _KNOWN_ANATOMY:
        return matches
    kinds = {frozenset(_anatomy(o)) for o in organs}
    return tuple(organs) if len(organs) == 1 or (len(kinds) == 1 and all(kinds)) else ()


def organs_named(name: str, organ_names: Iterable[str]) -> tuple[str, ...]:
    """The organs, vessels aside, whose anatomy stands in the name: of "kidney" both kidneys.

    Of a metastasis those that it sits in, not the one that it came from.
    """
    seat = _seat(name)
    words = _anatomy(seat)
    organs = (o for o in organ_names if not _VESSELS & set(_words(o)))
    return tuple(o for o in organs if _anatomy(o) and _anatomy(o) <= words and _agree(seat, o))


def is_lateral(name: str) -> bool:
    """Whether the name holds a side: "kidney left", "kidney_r", "LeftKidney"."""
    return any(word in _SIDES or re.match(r"(left|right)[a-z]", word) for word in _words(name))


def name_key(name: str) -> tuple[str, ...]:
    """What two spellings of one class share: its words, sorted, in the singular, sides written out.

    "Lung_Upper_Lobe_L" and "left upper lobe of lung" have the same key.
    """
    words = (_SIDES.get(w, _singular(w)) for w in _words(name) if w not in ("the", "of", "in", "and", "or"))
    return tuple(sorted(words))


def numbers_in(name: str) -> set[str]:
    """ "rib_left_4" → {"4"}: words of a name that are numbers."""
    return {word for word in _words(name) if word.isdigit()}


def may_overlap(a: str, b: str) -> bool:
    """Whether one of two organs may hold the other: "kidney" and "left kidney", "lung" and "left upper lobe"."""
    of_a, of_b = _anatomy(a), _anatomy(b)
    numbers_a, numbers_b = numbers_in(a), numbers_in(b)
    differ = bool(numbers_a and numbers_b) and numbers_a != numbers_b  # two ribs
    return bool(of_a) and of_a == of_b and name_key(a) != name_key(b) and _agree(a, b) and not differ


def part_before_and(name: str) -> str:
    """ "kidney and tumor", as regions are called, → "kidney"; other names as they are."""
    organ, *rest = _JOIN.split(normalize_name(name), maxsplit=1)
    return organ.strip() if rest and _has_tumor_word(rest[0]) and not _has_tumor_word(organ) else name


def host_words(name: str) -> str:
    """The words of an organ's name without side, level and lobe: "lung_upper_lobe_left" → "lung"."""
    kept = [w for w in _words(name) if w not in _SIDES and w not in _LEVELS and w not in ("lobe", "lobes")]
    return " ".join(kept)


def kind_of_tumor(name: str) -> str:
    """ "cyst", "nodule", "metastasis", "mass" or "lesion" where the name says so, else "tumor"."""
    words = set(name_key(name))
    return next((kind for kind in ("cyst", "nodule", "metastasis", "mass", "lesion") if kind in words), "tumor")


def is_generic_tumor(name: str) -> bool:
    """Whether the name holds nothing but words for a tumor ("cancer", "Tumour"): it says neither where nor which."""
    words = [w for w in _words(name) if not w.isdigit()]
    return bool(words) and all(w in _GENERIC for w in words)


def has_number(name: str) -> bool:
    """Whether a number is a word of the name, or ends one: "tumor 2", "livertumor01"."""
    return bool(numbers_in(name))


def key_without_number(name: str) -> tuple[str, ...]:
    """`name_key` of the name without its numbers: that of "livertumor01" is that of "liver tumor"."""
    return tuple(w for w in name_key(name) if not w.isdigit())


def _singular(word: str) -> str:
    if word.endswith("omas") and word not in _NOT_OMA:
        return word[:-1]
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if word == "mets":
        return "metastasis"
    if word.endswith("stases"):
        return f"{word[:-2]}is"
    ends = ("ss", "us", "is", "as", "os")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(ends) else word


def _words(name: str) -> list[str]:
    """The words of a name. Tumor words at the end of another, sides and numbers are words of their own.

    "leftlivertumor01" holds "left", "liver", "tumor" and "1".
    """
    joined = normalize_name(name).replace("gall bladder", "gallbladder")
    found = re.findall(r"[^\W_]+", re.sub(r"\blarge (?:bowels?|intestines?)\b", "colon", joined))
    words = (word for numbered in found for word in _NUMBERED.sub(r"\1 \2", numbered).split())
    parts = (part for word in words for part in _GLUED.sub(r"\1 \2", word).split())
    pieces = [piece for part in parts for piece in _GLUED_SIDE.sub(r"\1\3 \2\4", part).split()]
    return [piece.lstrip("0") or "0" if piece.isdigit() else piece for piece in pieces]


def _has_tumor_word(name: str) -> bool:
    words = _words(name)
    is_named = any(w in _TUMOR_WORDS or (_OMA.match(w) is not None and w not in _NOT_OMA) for w in words)
    return is_named or _TUMOR_PHRASE.search(" ".join(words)) is not None


def _seat(name: str) -> str:
    """The part of a metastasis' name that says where it sits: of "colorectal liver metastases" "liver metastases", of
    "lung metastasis of colon cancer" "lung metastasis". All of any other name, and of one that says it in other ways.
    """
    words = _words(name)
    end = next((i for i, word in enumerate(words) if _singular(word) == "metastasis"), 0)
    parts: list[list[str]] = [[]]  # between "and" and "or"
    for word in words[:end]:
        if word in ("and", "or"):
            parts.append([])
        else:
            parts[-1].append(word)
    if not any(map(_last_organ, parts)):
        return name
    kept = (_last_organ(part) or [word for word in part if word in _SIDES] for part in parts)
    return " ".join([*(word for part in kept for word in part), words[end]])


def _last_organ(words: list[str]) -> list[str]:
    """From the last organ of a name on, with the words that go before it and are no other organ's ("lymph node")."""
    is_organ = [_is_organ(word, words) for word in words]
    if True not in is_organ:
        return []
    last = len(words) - 1 - is_organ[::-1].index(True)
    first = last
    while first and not is_organ[first - 1] and not _has_tumor_word(words[first - 1]):
        first -= 1
    return words[first:]


def _anatomy(name: str) -> set[str]:
    """The anatomical words of a name: neither side, level, part, number nor word for a tumor."""
    found: set[str] = set()
    words = _words(name)
    for word in words:
        if _is_organ(word, words) and word in _ANATOMY:
            found.update(_ANATOMY[word])
        elif not (word in _SIDES or word in _LEVELS or word in _PARTS or _has_tumor_word(word) or word.isdigit()):
            found.add(word)
    return found or {_USUAL_ANATOMY[word] for word in words if word in _USUAL_ANATOMY}


def _is_organ(word: str, words: Iterable[str]) -> bool:
    """Whether a word of a name is a known organ; "cervical" beside a lymph node or a vertebra is not the cervix."""
    is_of_the_neck = word == "cervical" and bool(_OF_THE_NECK & {*words})
    return (word in _ANATOMY or word in _KNOWN_ANATOMY) and not is_of_the_neck


def _agree(a: str, b: str) -> bool:
    """Whether side and level of two names do not contradict each other. A name without one agrees with any."""
    words_a, words_b = set(_words(a)), set(_words(b))
    for group in (_SIDES, _LEVELS):
        in_a, in_b = ({group[w] for w in words if w in group} for words in (words_a, words_b))
        if in_a and in_b and not in_a & in_b:
            return False
    return True
