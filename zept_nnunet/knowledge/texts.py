"""Which text describes a class: the user's own, a built-in description, or words made from its name and hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import Catalog, catalog
from zept_nnunet.names import has_number, is_generic_tumor, kind_of_tumor, normalize_name
from zept_nnunet.taxonomy import Taxonomy

_FURTHER_KINDS = ("mass", "lesion", "nodule", "metastasis")


@dataclass(frozen=True)
class Description:
    """A class's text, and where it comes from."""

    text: str
    origin: str  # "own", "like (ENTRY)", "built-in (ENTRY)" or "name"

    @property
    def is_own(self) -> bool:
        """Whether the user chose it: their own words, or a built-in description of another name."""
        return is_users(self.origin)

    @property
    def entry(self) -> str | None:
        """The built-in description that it is."""
        return None if "(" not in self.origin else self.origin.split("(", 1)[1].removesuffix(")")


def is_users(origin: str) -> bool:
    """Whether a description of this origin was chosen by the user."""
    return origin == "own" or origin.startswith("like (")


def describe_organ(name: str, own: str | Description | None = None) -> Description:
    """The description of an organ; of "liver and tumor", as regions are called, that of the liver.

    Raises:
        ZePTError: the user's own description is empty, or like nothing that is described.
    """
    if own is not None:
        return _own(name, own)
    entry = catalog().find(name, kind="organ")
    return (
        Description(entry.text, f"built-in ({entry.name})") if entry is not None else Description(_words(name), "name")
    )


def describe_tumor(name: str, hosts: Sequence[str] = (), own: str | Description | None = None) -> Description:
    """The description of a tumor; `hosts` are the organs that it sits in.

    Raises:
        ZePTError: as `describe_organ`.
    """
    if own is not None:
        return _own(name, own)
    entry = catalog().find(name, hosts, kind="tumor")
    return Description(entry.text, f"built-in ({entry.name})") if entry is not None else _from_name(name, hosts)


def describe_all(taxonomy: Taxonomy, own: Mapping[str, str | Description]) -> dict[str, Description]:
    """Per class name, its description; `own` by class name in any spelling.

    Of two tumors of one place whose names say nothing ("tumor" and "masses"), or of classes that a number tells apart,
    the second is described by its name.

    Raises:
        ZePTError: `own` describes what is no class, or one class twice; one text is empty; or two classes of the same
            place have the same text, so that nothing could tell them apart.
    """
    given: dict[str, str | Description] = {}
    for name, text in own.items():
        if normalize_name(name) in given:
            raise ZePTError(f"zept.knowledge describes {name!r} twice; keep one of the two")
        given[normalize_name(name)] = text
    found: dict[str, Description] = {}
    for organ in taxonomy.organs:
        description = describe_organ(taxonomy.reading(organ.name), given.pop(normalize_name(organ.name), None))
        if not description.is_own and has_number(organ.name) and description in found.values():
            description = Description(_words(organ.name), "name")
        found[organ.name] = description
    places: dict[tuple[str, frozenset[str]], str] = {(d.text, frozenset()): name for name, d in found.items()}
    for tumor in taxonomy.tumors:
        hosts = frozenset(tumor.hosts)
        read_hosts = [taxonomy.reading(host) for host in tumor.hosts]
        own_text = given.pop(normalize_name(tumor.name), None)
        description = describe_tumor(taxonomy.reading(tumor.name), read_hosts, own_text)
        if (description.text, hosts) in places and not description.is_own:
            if is_generic_tumor(tumor.name):
                description = _from_name(tumor.name, read_hosts)
            if (description.text, hosts) in places and has_number(tumor.name):
                description = Description(_in_hosts(_words(tumor.name), read_hosts), "name")
        found[tumor.name] = description
        refuse_twin(tumor.name, places.get((description.text, hosts)), description)
        places[description.text, hosts] = tumor.name
    for organ in taxonomy.organs:
        text = found[organ.name].text
        twin = next((n for n, d in found.items() if d.text == text and n != organ.name), None)
        refuse_twin(organ.name, twin, found[organ.name])
    if given:
        raise ZePTError(f"zept.knowledge describes classes that are no labels: {sorted(given)}; labels: {list(found)}")
    return found


def refuse_twin(name: str, other: str | None, description: Description, file: str | None = None) -> None:
    """Raise where another class has the same description, or the same vector.

    Args:
        file: of vectors, where that of `name` belongs to the class's name, and not to its description.

    Raises:
        ZePTError: `other` is not None.
    """
    if other is None:
        return
    if file is not None:
        raise ZePTError(
            f"{other!r} and {name!r} have the same vector in {file}: nothing tells them apart. Give one of them "
            "another tensor there"
        )
    raise ZePTError(
        f"{other!r} and {name!r} have the same description ({description.origin}): nothing tells them apart. "
        f'Describe one of them in other words: --description, or in dataset.json "zept": {{"knowledge": '
        f'{{"{name}": "…"}}}}'
    )


def describe_abnormal(organ: str) -> Description:
    """The text of the query for abnormal tissue in an organ."""
    return Description(_abnormal(_organ_words(organ)), "name")


def built_in_texts(entries: Catalog | None = None) -> list[str]:
    """Every text whose vector comes with the package: each entry, and per organ its abnormal tissue, tumor and cyst."""
    entries = entries if entries is not None else catalog()
    organs = [e.name for e in entries if e.kind == "organ"]
    hosts = {host.name for e in entries for h in e.hosts if (host := entries.find(h, kind="organ")) is not None}
    texts = [e.text for e in entries]
    texts += [_abnormal(organ) for organ in organs]
    texts += [_in_host(kind, organ) for organ in organs for kind in ("tumor", "cyst")]
    texts += [_in_host(kind, organ) for organ in organs if organ in hosts for kind in _FURTHER_KINDS]
    return list(dict.fromkeys([*texts, "tumor", "cyst", *_FURTHER_KINDS]))


def _own(name: str, given: str | Description) -> Description:
    description = given if isinstance(given, Description) else Description(given, "own")
    if not description.text.strip():
        raise ZePTError(f"the description of {name!r} is empty; write a sentence or remove it")
    return description


def _from_name(name: str, hosts: Sequence[str]) -> Description:
    """The words of a tumor's name with its hosts; of a name that says nothing, in words that come with a vector."""
    return Description(_in_hosts(kind_of_tumor(name) if is_generic_tumor(name) else _words(name), hosts), "name")


def _in_hosts(what: str, hosts: Sequence[str]) -> str:
    organs = " and the ".join(dict.fromkeys(map(_organ_words, hosts)))
    return _in_host(what, organs) if organs else what


def _organ_words(name: str) -> str:
    entry = catalog().find(name, kind="organ")
    return entry.name if entry is not None else _words(name)


def _in_host(kind: str, organ: str) -> str:
    return f"{kind} in the {organ}"


def _abnormal(organ: str) -> str:
    return f"abnormal tissue in the {organ}, unlike the {organ} around it"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
