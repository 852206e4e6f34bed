"""`plans["zept"]`: everything that a model needs besides its weights, as plain JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge import KnowledgeBank, TextEncoder, describe
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy

VERSION = 1

_SHARED = {
    "width": 128,  # D
    "heads": 8,
    "grouping_scales": 3,  # the coarsest decoder scales
    "advanced_layers": 4,
}
DECODER_SETTINGS: dict[str, dict[str, Any]] = {
    # ours: queries from knowledge, background queries, supervised calibrated score per host
    "zept": {
        **_SHARED,
        "queries": "generated",
        "background_queries": 4,
        "score": "calibrated",
        "prompt_probability": 0.2,
        "relative": True,  # compare each voxel with its own organ
    },
    # as the authors compute it: learned queries, one min-max normalized score for all tumors
    "paper": {**_SHARED, "queries": "learned", "background_queries": 0, "score": "minmax", "prompt_probability": 0.5},
}


def build_block(dataset_json: Mapping[str, Any], variant: str = "zept", source: str = "dataset.json") -> dict[str, Any]:
    """Make the block for a dataset.

    Raises:
        ZePTError: the dataset's labels or its `zept` block cannot be understood.
    """
    taxonomy = Taxonomy.from_dataset_json(dict(dataset_json), source)
    descriptions = dict((dataset_json.get("zept") or {}).get("knowledge") or {})
    unseen = {normalize_name(name) for name in (dataset_json.get("zept") or {}).get("unseen") or {}}
    bank = KnowledgeBank.build(taxonomy, {n: t for n, t in descriptions.items() if normalize_name(n) not in unseen})
    anomalies = {f"abnormal {organ}": organ for organ in unlabeled_organs(taxonomy)} if variant == "zept" else {}
    for name, organ in anomalies.items():
        bank = bank.with_class(name, f"abnormal tissue in the {organ}, unlike the {organ} around it")
    return {
        "version": VERSION,
        "taxonomy": taxonomy.to_dict(),
        "knowledge": bank.to_dict(),
        "decoder": dict(DECODER_SETTINGS[variant]),
        "anomalies": anomalies,
    }


def unlabeled_organs(taxonomy: Taxonomy) -> tuple[str, ...]:
    """Organs whose tumors nobody labeled: training puts synthetic anomalies into them, each with a query of its own.

    None where a tumor may lie anywhere in the body: then every organ's tumors are labeled.
    """
    tumors = taxonomy.trained_tumors
    if any(not t.hosts for t in tumors):
        return ()
    hosts = {host for t in tumors for host in t.hosts}
    return tuple(o.name for o in taxonomy.organs if o.name not in hosts)


def read_block(plans: Mapping[str, Any], source: str = "plans.json") -> dict[str, Any]:
    """The validated block of `plans`, its vectors made quiet.

    Raises:
        ZePTError: there is none, it is of another version, or a class has no vector.
    """
    block = plans.get("zept")
    if block is None:
        raise ZePTError(f"{source} holds no 'zept' block: it belongs to a model that no ZePT trainer has trained")
    if block.get("version") != VERSION:
        raise ZePTError(
            f"{source}: 'zept' block of version {VERSION} wanted, found {block.get('version')!r}; "
            "install the zept-nnunet that wrote it, or plan and train again"
        )
    missing = [key for key in ("taxonomy", "knowledge", "decoder") if key not in block]
    if missing:
        raise ZePTError(f"{source}: the 'zept' block lacks {missing}; plan again (zept plan)")
    bank = KnowledgeBank.from_dict(block["knowledge"])
    anomalies = dict(block.get("anomalies", {}))
    bank.matrix([*_class_names(Taxonomy.from_dict(block["taxonomy"])), *anomalies])
    return {**block, "knowledge": bank.to_dict(), "anomalies": anomalies}


def add_tumor_to_block(
    block: Mapping[str, Any],
    name: str,
    hosts: tuple[str, ...],
    label: int,
    description: str | None = None,
    encoder: TextEncoder | None = None,
) -> dict[str, Any]:
    """A copy of `block` with one more tumor, marked as added after training.

    Raises:
        ZePTError: the model's queries are learned per class, so that a new class has none; or the name exists.
    """
    if block["decoder"]["queries"] == "learned":
        raise ZePTError(
            f"cannot add {name!r}: this model learned one query per class (ZePTTrainerPaper), so a new class means "
            "training again. Train with ZePTTrainer, whose queries are generated from descriptions"
        )
    taxonomy = Taxonomy.from_dict(block["taxonomy"]).with_tumor(name, label, hosts)
    bank = KnowledgeBank.from_dict(block["knowledge"]).with_class(name, description or describe(name, hosts), encoder)
    return {
        **block,
        "taxonomy": taxonomy.to_dict(),
        "knowledge": bank.to_dict(),
        "added": {**block.get("added", {}), name: {"unseen": True, "added_at": date.today().isoformat()}},
    }


def fingerprint(block: Mapping[str, Any]) -> bytes:
    """32 bytes that stand for the trained classes, their knowledge and the decoder. An added tumor changes nothing."""
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    vectors = block["knowledge"]["vectors"]
    content = {
        "organs": [[o.name, o.label, list(vectors[o.name])] for o in taxonomy.organs],
        "tumors": [[t.name, t.label, list(t.hosts), list(vectors[t.name])] for t in taxonomy.trained_tumors],
        "encoder": [block["knowledge"]["encoder"], block["knowledge"]["revision"]],
        "decoder": block["decoder"],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between two blocks, in words: taxonomy, decoder settings, knowledge, synthetic anomalies."""
    found = [part for part in ("taxonomy", "decoder") if a[part] != b[part]]
    anomalies = [block.get("anomalies", {}) for block in (a, b)]
    knowledge = [
        {**block["knowledge"], "vectors": {n: v for n, v in block["knowledge"]["vectors"].items() if n not in names}}
        for block, names in zip((a, b), anomalies, strict=True)
    ]
    if json.dumps(knowledge[0], sort_keys=True) != json.dumps(knowledge[1], sort_keys=True):
        found.append("knowledge")
    if anomalies[0] != anomalies[1]:
        found.append("set of organs with synthetic anomalies")
    return found


def _class_names(taxonomy: Taxonomy) -> list[str]:
    return [o.name for o in taxonomy.organs] + [t.name for t in taxonomy.tumors]
