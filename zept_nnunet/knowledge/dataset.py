"""What a dataset.json says of its classes' descriptions and vectors: `zept.knowledge` and `zept.vectors`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zept_nnunet.declarations import declared_vectors
from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.knowledge.source import KnowledgeSource, built_in
from zept_nnunet.knowledge.texts import Description, describe_all, describe_tumor, refuse_twin
from zept_nnunet.knowledge.vectors import read_vectors
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy, declared_unseen


def class_texts(
    dataset_json: Mapping[str, Any], source: str = "dataset.json", with_unseen: bool = True
) -> dict[str, Description]:
    """What describes each class of a dataset, and each tumor that it declares as unseen.

    Raises:
        ZePTError: the labels or the `zept` block cannot be understood, or two classes have one description.
    """
    taxonomy = Taxonomy.from_dataset_json(dict(dataset_json), source)  # checks the block
    own = own_descriptions(dataset_json)
    unseen = {normalize_name(u.name): u for u in declared_unseen(dict(dataset_json), source)}
    texts = describe_all(taxonomy, {name: text for name, text in own.items() if normalize_name(name) not in unseen})
    hosts = {t.name: frozenset(t.hosts) for t in taxonomy.tumors}
    for key, tumor in unseen.items() if with_unseen else ():
        text = next((t for name, t in own.items() if normalize_name(name) == key), None)
        description = describe_tumor(tumor.name, [taxonomy.reading(host) for host in tumor.hosts], text)
        same = (n for n, h in hosts.items() if h == frozenset(tumor.hosts) and texts[n].text == description.text)
        refuse_twin(tumor.name, next(same, None), description)
        texts[tumor.name], hosts[tumor.name] = description, frozenset(tumor.hosts)
    return texts


def own_descriptions(dataset_json: Mapping[str, Any]) -> dict[str, Description]:
    """`zept.knowledge`, with {"like": NAME} written out.

    Raises:
        ZePTError: no built-in description has that name.
    """
    given = (dataset_json.get("zept") or {}).get("knowledge") or {}
    return {
        name: like(value["like"]) if isinstance(value, Mapping) else Description(value, "own")
        for name, value in given.items()
    }


def like(name: str, kind: str | None = None) -> Description:
    """The built-in description of that name.

    Raises:
        ZePTError: there is none, or it is of another kind; the message names those that look like it.
    """
    entry = catalog().require(name)
    if kind not in (None, entry.kind):
        raise ZePTError(f"like {name!r}: that is the {entry.kind} {entry.name!r}; name a {kind} (zept knowledge list)")
    return Description(entry.text, f"like ({entry.name})")


def declared_source(dataset_json: Mapping[str, Any], source: str = "dataset.json") -> KnowledgeSource:
    """The vectors that dataset.json names under `zept.vectors`, else the package's.

    Raises:
        ZePTError: the file cannot be read.
    """
    path = declared_vectors(dataset_json, source)
    return built_in() if path is None else KnowledgeSource(read_vectors(path))
