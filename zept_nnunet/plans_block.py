"""`plans["zept"]`: everything that a model needs besides its weights, as plain JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import date
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge import Description, KnowledgeBank, KnowledgeSource, built_in
from zept_nnunet.knowledge.dataset import class_texts, declared_source
from zept_nnunet.knowledge.texts import describe_abnormal, describe_tumor, refuse_twin
from zept_nnunet.knowledge.vectors import text_key
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy

VERSION = 6

_SHARED = {
    "width": 128,  # D
    "heads": 8,
    "grouping_scales": 3,  # the coarsest decoder scales
    "advanced_layers": 4,
    "grouping": True,  # False: organ queries attend to the image, and no voxel is assigned to one
    "self_prompting": True,  # False: tumor queries attend to the whole patch
}
DECODER_SETTINGS: dict[str, dict[str, Any]] = {
    # ours: queries from knowledge, background queries, supervised calibrated score per host
    "zept": {
        **_SHARED,
        "queries": "generated",
        "background_queries": 4,
        "score": "calibrated",
        "score_range": "organ",  # or "patch": min-max over the patch, one map for all tumors
        "prompt_probability": 0.2,
        "relative": True,  # compare each voxel with its own organ
        "score_in_maps": False,  # that of the organs' maps is evidence in the tumor maps too
        "prompts": "relative",  # from that comparison, or "organs": from the score of the organs' maps
        "gate": "neighborhood",  # a tumor lies in its host or next to it, or "voxel": in its host
    },
    # as the authors compute it: learned queries, one min-max normalized score for all tumors
    "paper": {
        **_SHARED,
        "queries": "learned",
        "background_queries": 0,
        "score": "minmax",
        "score_range": "patch",
        "prompt_probability": 0.5,
        "relative": False,
        "score_in_maps": True,
        "prompts": "organs",
        "gate": "voxel",
    },
}
_TRAINING = {
    "alignment": True,  # of queries with knowledge; without it those two terms count nothing
    "hiding_probability": 0.0,  # of a batch in which one labeled tumor type is treated as if it had no query
    "descriptions": "own",  # or "shuffled", a control: organs, and tumors, exchange theirs among each other
    "learning_rate": 1e-3,  # of AdamW, at the start of nnU-Net's polynomial schedule
    "warmup_iterations": 0,  # over which the learning rate rises from zero
    "weight_decay": 1e-2,  # none on norms, biases and tokens
    "gradient_norm": 12.0,  # at which gradients are clipped; nnU-Net's
    "unlabeled_host_weight": 1.0,  # of voxels of an organ with synthetic anomalies that are none: 0 tells nothing
}
TRAINING_SETTINGS: dict[str, dict[str, Any]] = {
    # stage_one_share: of the training, before tumors enter
    "zept": {**_TRAINING, "stage_one_share": 0.2, "synthetic_anomalies": True, "organs_include_tumors": False},
    "paper": {**_TRAINING, "stage_one_share": 0.5, "synthetic_anomalies": False, "organs_include_tumors": True},
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "queries": ("generated", "learned"),
    "score": ("calibrated", "minmax"),
    "score_range": ("organ", "patch"),
    "prompts": ("relative", "organs"),
    "gate": ("neighborhood", "voxel"),
    "descriptions": ("own", "shuffled"),
}
_SHARES = ("prompt_probability", "hiding_probability", "unlabeled_host_weight", "stage_one_share")
_POSITIVE = ("learning_rate", "gradient_norm")  # numbers; the weight decay may be zero


def build_block(
    dataset_json: Mapping[str, Any],
    variant: str = "zept",
    source: str = "dataset.json",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the block for a dataset.

    Args:
        variant: ours, or "paper".
        settings: decoder or training settings that differ from the variant's.

    Raises:
        ZePTError: the dataset's labels or its `zept` block cannot be understood, or a setting is unknown.
    """
    decoder, training, anomalies = own_parts(dataset_json, variant, source, settings)
    texts = model_texts(dataset_json, training, anomalies, source)
    bank = KnowledgeBank.build(texts, declared_source(dataset_json, source))
    return {
        "version": VERSION,
        "taxonomy": Taxonomy.from_dataset_json(dict(dataset_json), source).to_dict(),
        "knowledge": bank.to_dict(),
        "decoder": decoder,
        "training": training,
        "anomalies": anomalies,
    }


def own_parts(
    dataset_json: Mapping[str, Any], variant: str, source: str, settings: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """What a variant has of its own: decoder settings, training settings, and the queries for abnormal tissue.

    Raises:
        ZePTError: as `build_block`.
    """
    settings = dict(settings or {})
    decoder, training = DECODER_SETTINGS[variant], TRAINING_SETTINGS[variant]
    unknown = sorted(set(settings) - set(decoder) - set(training))
    if unknown:
        raise ZePTError(f"unknown settings {unknown}; there are {', '.join([*decoder, *training])}")
    decoder, training = ({k: settings.get(k, v) for k, v in group.items()} for group in (decoder, training))
    check_settings(decoder, training, source)
    taxonomy = Taxonomy.from_dataset_json(dict(dataset_json), source)
    abnormal = unlabeled_organs(taxonomy) if training["synthetic_anomalies"] else ()
    if training["hiding_probability"]:
        abnormal = (*abnormal, *labeled_hosts(taxonomy))
    anomalies = {f"abnormal {o.name}": o.name for o in taxonomy.organs if o.name in abnormal}
    taken = {normalize_name(name) for name in anomalies} & {normalize_name(c.name) for c in taxonomy.classes}
    if taken:
        raise ZePTError(f"{source}: {sorted(taken)} are names of queries for abnormal tissue; rename these labels")
    return decoder, training, anomalies


def model_texts(
    dataset_json: Mapping[str, Any], training: Mapping[str, Any], anomalies: Mapping[str, str], source: str
) -> dict[str, Description]:
    """Every text that a model of this dataset needs a vector of: its classes' and those of abnormal tissue.

    Raises:
        ZePTError: as `class_texts`.
    """
    texts = class_texts(dataset_json, source, with_unseen=False)
    texts |= {name: describe_abnormal(organ) for name, organ in anomalies.items()}
    if training["descriptions"] == "shuffled":
        taxonomy = Taxonomy.from_dataset_json(dict(dataset_json), source)
        groups = [[o.name for o in taxonomy.organs], [t.name for t in taxonomy.tumors], list(anomalies)]
        others = {name: group[i - 1] for group in groups for i, name in enumerate(group)}
        texts = {name: texts[other] for name, other in others.items()}
    return texts


def check_planned_texts(planned: Mapping[str, Any], dataset_json: Mapping[str, Any], plans_file: str) -> None:
    """Raise where a description in dataset.json was edited since the plans were made. Nothing is encoded for it.

    Raises:
        ZePTError: names the classes.
    """
    texts = model_texts(dataset_json, planned["training"], planned["anomalies"], "dataset.json")
    now = {name: text_key(d.text) for name, d in texts.items() if d.is_own}
    then = planned["knowledge"].get("own_texts", {})
    edited = sorted(n for n in now.keys() | then.keys() if now.get(n) != then.get(n))
    if edited:
        raise ZePTError(
            f"the descriptions of {edited} in dataset.json are others than {plans_file} was planned with: plan again "
            "(zept plan -d ID), or restore them"
        )


def unlabeled_organs(taxonomy: Taxonomy) -> tuple[str, ...]:
    """Organs whose tumors nobody labeled: training puts synthetic anomalies into them, each with a query of its own.

    None where a tumor may lie anywhere in the body: then every organ's tumors are labeled.
    """
    tumors = taxonomy.trained_tumors
    if any(not t.hosts for t in tumors):
        return ()
    hosts = labeled_hosts(taxonomy)
    return tuple(o.name for o in taxonomy.organs if o.name not in hosts)


def labeled_hosts(taxonomy: Taxonomy) -> tuple[str, ...]:
    """Organs that host a tumor that training labels."""
    return tuple(dict.fromkeys(host for t in taxonomy.trained_tumors for host in t.hosts))


def check_settings(decoder: Mapping[str, Any], training: Mapping[str, Any], source: str) -> None:
    """Refuse what no model would read as it was meant.

    Raises:
        ZePTError: a setting is missing, unknown, or of a value that it cannot have.
    """
    for name, found, wanted in (
        ("decoder", decoder, DECODER_SETTINGS["zept"]),
        ("training", training, TRAINING_SETTINGS["zept"]),
    ):
        unlike = sorted(set(found) ^ set(wanted))
        if unlike:
            raise ZePTError(f"{source}: the {name} settings want {', '.join(wanted)}; missing or unknown: {unlike}")
        for key, default in wanted.items():
            value = found[key]
            if key in _CHOICES:
                wish, fits = f"one of {', '.join(_CHOICES[key])}", value in _CHOICES[key]
            elif isinstance(default, bool):
                wish, fits = "true or false", isinstance(value, bool)
            elif key in (*_SHARES, *_POSITIVE, "weight_decay"):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if key in _SHARES:
                    wish, fits = "a number from 0 to 1", is_number and 0 <= value <= 1
                elif key in _POSITIVE:
                    wish, fits = "a number above 0", is_number and 0 < value < float("inf")
                else:
                    wish, fits = "a number of 0 or more", is_number and 0 <= value < float("inf")
            else:
                least = 0 if key in ("background_queries", "warmup_iterations") else 1
                is_whole = isinstance(value, int) and not isinstance(value, bool)
                wish, fits = f"a whole number of {least} or more", is_whole and value >= least
            if not fits:
                raise ZePTError(f"{source}: {name} setting {key!r} wants {wish}, got {value!r}")
    if decoder["score"] == "minmax" and (decoder["score_range"], decoder["relative"]) != ("patch", False):
        raise ZePTError(f"{source}: score 'minmax' has score_range 'patch' and no relative features")
    if decoder["prompts"] == "relative" and (decoder["score_range"] == "patch" or not decoder["relative"]):
        raise ZePTError(f"{source}: prompts 'relative' want relative features and score_range 'organ'; set 'organs'")


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
    missing = [key for key in ("taxonomy", "knowledge", "decoder", "training") if key not in block]
    if missing:
        raise ZePTError(f"{source}: the 'zept' block lacks {missing}; plan again (zept plan)")
    check_settings(block["decoder"], block["training"], source)
    bank = KnowledgeBank.from_dict(block["knowledge"])
    anomalies = dict(block.get("anomalies", {}))
    thresholds_of(block, Taxonomy.from_dict(block["taxonomy"]), source)
    bank.matrix([*_class_names(Taxonomy.from_dict(block["taxonomy"])), *anomalies])
    return {**block, "knowledge": bank.to_dict(), "anomalies": anomalies}


def thresholds_of(block: Mapping[str, Any], taxonomy: Taxonomy, source: str = "plans.json") -> list[float | None]:
    """The logit from which each tumor is reported (`zept calibrate`), None where that is nnU-Net's argmax.

    Raises:
        ZePTError: one belongs to no tumor of the model, or is no number.
    """
    found = block.get("thresholds", {})
    names = [t.name for t in taxonomy.tumors]
    for name, entry in found.items():
        value = entry.get("logit") if isinstance(entry, Mapping) else None
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name not in names or not is_number:
            raise ZePTError(
                f"{source}: a threshold wants a tumor of the model and a number as its 'logit', got {name!r}: "
                f"{entry!r}; remove the thresholds (zept calibrate MODEL_FOLDER --remove), then calibrate again"
            )
    return [float(found[name]["logit"]) if name in found else None for name in names]


def add_tumor_to_block(
    block: Mapping[str, Any],
    name: str,
    hosts: tuple[str, ...],
    label: int,
    description: str | None = None,
    source: KnowledgeSource | None = None,
) -> dict[str, Any]:
    """A copy of `block` with one more tumor, marked as added after training.

    Args:
        description: replaces the built-in one.
        source: of its vector; default: the package's vectors and encoder.

    Raises:
        ZePTError: a tumor of the same hosts has the same description; the model's queries are learned per class, and
            it has none for abnormal tissue in the hosts, or gave it to another tumor of theirs; or the name exists.
    """
    if block["decoder"]["queries"] == "learned" and (not hosts or {*hosts} - {*block["anomalies"].values()}):
        raise ZePTError(
            f"cannot add {name!r}: this model learned one query per class (as ZePTTrainerPaper does), so a new class "
            "means training again. Train with ZePTTrainer, whose queries are generated from descriptions"
        )
    taxonomy = Taxonomy.from_dict(block["taxonomy"]).with_tumor(name, label, hosts)
    *others, tumor = taxonomy.tumors
    same_place = [t for t in others if set(t.hosts) == set(tumor.hosts)]
    twin = next((t.name for t in same_place if t.added), None)
    if block["decoder"]["queries"] == "learned" and twin is not None:
        raise ZePTError(
            f"cannot add {name!r}: {twin!r} was added in the same host, and this model's queries are learned: both "
            f"would take the one for abnormal tissue there, and nothing would tell them apart. Remove {twin!r} first "
            "(zept remove-tumor), or train with queries that are generated from descriptions"
        )
    text = describe_tumor(name, hosts, description)
    old = KnowledgeBank.from_dict(block["knowledge"])
    bank = old.with_classes({name: text}, source or built_in())
    refuse_twin(name, next((t.name for t in same_place if old.vectors[t.name] == bank.vectors[name]), None), text)
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
    """What differs between two blocks, in words: taxonomy, settings, knowledge, queries for abnormal tissue."""
    found = [part for part in ("taxonomy", "decoder", "training") if a[part] != b[part]]
    anomalies = [block.get("anomalies", {}) for block in (a, b)]
    knowledge = [
        {**block["knowledge"], "vectors": {n: v for n, v in block["knowledge"]["vectors"].items() if n not in names}}
        for block, names in zip((a, b), anomalies, strict=True)
    ]
    if json.dumps(knowledge[0], sort_keys=True) != json.dumps(knowledge[1], sort_keys=True):
        found.append("knowledge")
    if anomalies[0] != anomalies[1]:
        found.append("set of organs with a query for abnormal tissue")
    return found


def _class_names(taxonomy: Taxonomy) -> list[str]:
    return [o.name for o in taxonomy.organs] + [t.name for t in taxonomy.tumors]
