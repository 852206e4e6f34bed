"""Which text describes a class: the user's own, a built-in description, or words made from its name and hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import Catalog, catalog
from zept_nnunet.names import is_generic_tumor, name_key, normalize_name
from zept_nnunet.taxonomy import Taxonomy


@dataclass(frozen=True)
class Description:
    """A class's text, and where it comes from."""

    text: str
    origin: str  # "own", "built-in (ENTRY)" or "name"

    @property
    def is_own(self) -> bool:
        """Whether the user wrote it."""
        return self.origin == "own"


def describe(name: str, hosts: Sequence[str] = (), own: str | None = None) -> Description:
    """The description of a class. `hosts`: of a tumor, the organs that it sits in.

    Raises:
        ZePTError: the user's own description is empty.
    """
    if own is not None:
        if not own.strip():
            raise ZePTError(f"the description of {name!r} is empty; write a sentence or remove it")
        return Description(own, "own")
    entry = catalog().find(name, hosts)
    if entry is not None:
        return Description(entry.text, f"built-in ({entry.name})")
    return Description(_from_name(name, hosts), "name")


def describe_all(taxonomy: Taxonomy, own: Mapping[str, str]) -> dict[str, Description]:
    """Per class name, its description; `own` by class name in any spelling.

    Raises:
        ZePTError: `own` describes what is no class, one text is empty, or two classes of the same place would have the
            same text, so that nothing could tell them apart.
    """
    given = {normalize_name(name): text for name, text in own.items()}
    found = {o.name: describe(o.name, (), given.pop(normalize_name(o.name), None)) for o in taxonomy.organs}
    for tumor in taxonomy.tumors:
        found[tumor.name] = describe(tumor.name, tumor.hosts, given.pop(normalize_name(tumor.name), None))
    if given:
        raise ZePTError(f"zept.knowledge describes classes that are no labels: {sorted(given)}; labels: {list(found)}")
    hosts = {t.name: frozenset(t.hosts) for t in taxonomy.tumors}
    seen: dict[tuple[str, frozenset[str]], str] = {}
    for name, description in found.items():
        other = seen.setdefault((description.text, hosts.get(name, frozenset())), name)
        if other != name:
            raise ZePTError(
                f"{other!r} and {name!r} have the same description ({description.origin}): nothing tells them apart; "
                f'describe one of them in dataset.json: "zept": {{"knowledge": {{"{name}": "…"}}}}'
            )
    return found


def describe_abnormal(organ: str) -> Description:
    """The text of the query for abnormal tissue in an organ."""
    entry = catalog().find(organ)
    return Description(_abnormal(entry.name if entry is not None else _words(organ)), "name")


def built_in_texts(entries: Catalog | None = None) -> list[str]:
    """Every text whose vector comes with the package: each entry, and per organ its abnormal tissue, tumor and cyst."""
    entries = entries if entries is not None else catalog()
    organs = [e.name for e in entries if e.kind == "organ"]
    texts = [e.text for e in entries]
    texts += [_abnormal(organ) for organ in organs]
    texts += [_in_host(kind, organ) for organ in organs for kind in ("tumor", "cyst")]
    return list(dict.fromkeys([*texts, "tumor", "cyst"]))


def _from_name(name: str, hosts: Sequence[str]) -> str:
    if not is_generic_tumor(name):
        return f"{_words(name)} in the {' and the '.join(map(_words, hosts))}" if hosts else _words(name)
    kind = "cyst" if "cyst" in name_key(name) else "tumor"
    organs = dict.fromkeys(e.name if (e := catalog().find(h)) is not None else _words(h) for h in hosts)
    return _in_host(kind, " and the ".join(organs)) if organs else kind


def _in_host(kind: str, organ: str) -> str:
    return f"{kind} in the {organ}"


def _abnormal(organ: str) -> str:
    return f"abnormal tissue in the {organ}, unlike the {organ} around it"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
