"""`plans["zept"]`: everything that a model needs besides its weights, as plain JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from datetime import date
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.knowledge import Description, KnowledgeBank, KnowledgeSource, built_in
from zept_nnunet.knowledge.bank import PlannedText, planned_texts
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.knowledge.dataset import class_texts, declared_source
from zept_nnunet.knowledge.texts import describe_abnormal, describe_organ, describe_tumor, is_users
from zept_nnunet.knowledge.vectors import text_key
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy

VERSION = 7

_SHARED = {
    "width": 128,  # D
    "heads": 8,
    "grouping_scales": 3,  # the coarsest decoder scales
    "advanced_layers": 4,
    "grouping": True,  # False: organ queries attend to the image, and no voxel is assigned to one
    "self_prompting": True,  # False: tumor queries attend to the whole patch
    "tumor_first": True,  # above one half a tumor's map wins against those of its hosts; False: the strongest wins
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
    "alignment": 0.1,  # weight of its two terms, 0 for none
    "hiding_probability": 0.0,  # of a batch in which one labeled tumor type is treated as if it had no query
    "descriptions": "own",  # or "shuffled", a control: organs, and tumors, get those of others
    "learning_rate": 1e-3,  # of AdamW, at the start of nnU-Net's polynomial schedule
    "warmup_iterations": 0,  # over which the learning rate rises from zero
    "weight_decay": 1e-2,  # none on norms, biases and tokens
    "gradient_norm": 12.0,  # at which gradients are clipped; nnU-Net's
    "unlabeled_host_weight": 1.0,  # of voxels of an organ with synthetic anomalies that are none: 0 tells nothing
}
TRAINING_SETTINGS: dict[str, dict[str, Any]] = {
    # stage_one_share: of the training, before tumors enter
    "zept": {**_TRAINING, "stage_one_share": 0.2, "synthetic_anomalies": True, "organs_include_tumors": False},
    "paper": {
        **_TRAINING,
        "alignment": 1.0,  # of theirs nobody has measured another weight
        "stage_one_share": 0.5,
        "synthetic_anomalies": False,
        "organs_include_tumors": True,
    },
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
        ZePTError: the dataset's labels or its `zept` block cannot be understood, a setting is unknown, or two classes
            of one place have the same description or vector.
    """
    decoder, training, anomalies = own_parts(dataset_json, variant, source, settings)
    texts = model_texts(dataset_json, training, anomalies, source)
    knowledge = declared_source(dataset_json, source)
    by_name = [name for name, d in texts.items() if not knowledge.reads_text(name, d)]
    if training["descriptions"] == "shuffled" and by_name:
        raise ZePTError(
            f"{source}: 'descriptions: shuffled' exchanges texts, but the vectors of {by_name} in the file of "
            "zept.vectors belong to the classes' names; exchange the tensors in that file, or use one of "
            "`zept knowledge encode`"
        )
    bank = KnowledgeBank.build(texts, knowledge)
    taxonomy = Taxonomy.from_dataset_json(dict(dataset_json), source)
    if training["descriptions"] == "own":  # exchanged texts may meet in one place
        places = places_of(taxonomy)
        knowledge.refuse_twins(bank.vectors, places, {name: texts[name] for name in places})
    return {
        "version": VERSION,
        "taxonomy": taxonomy.to_dict(),
        "knowledge": bank.to_dict(),
        "decoder": decoder,
        "training": training,
        "anomalies": anomalies,
    }


def shared_settings(block: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a block that are of the plans, not of the method: those with one default for all variants."""
    return {
        name: block[part][name]
        for part, defaults in (("decoder", DECODER_SETTINGS), ("training", TRAINING_SETTINGS))
        for name in block[part]
        if len({str(settings[name]) for settings in defaults.values()}) == 1
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
    taxonomy = Taxonomy.from_dataset_json(dict(dataset_json), source)
    texts |= {name: describe_abnormal(taxonomy.reading(organ)) for name, organ in anomalies.items()}
    return _shuffled(texts, taxonomy, anomalies) if training["descriptions"] == "shuffled" else texts


def _shuffled(
    texts: Mapping[str, Description], taxonomy: Taxonomy, anomalies: Mapping[str, str]
) -> dict[str, Description]:
    """Organs, tumors and queries for abnormal tissue with the texts of others of their kind.

    Where no other is left, as in a group of one, it is a built-in text that nothing in the dataset has.
    """
    used = {d.text for d in texts.values()}
    organs = [describe_organ(e.name) for e in catalog() if e.kind == "organ"]
    borrowed = [
        organs,
        [describe_tumor(e.name) for e in catalog() if e.kind == "tumor"],
        [describe_abnormal(e.name) for e in catalog() if e.kind == "organ"],
    ]
    groups = [[o.name for o in taxonomy.organs], [t.name for t in taxonomy.tumors], list(anomalies)]
    found: dict[str, Description] = {}
    for group, further in zip(groups, borrowed, strict=True):
        spare = (d for d in further if d.text not in used)
        for i, name in enumerate(group):
            other = texts[group[i - 1]]
            found[name] = other if other.text != texts[name].text else next(spare)
    return found


def check_planned_texts(
    planned: Mapping[str, Any], dataset_json: Mapping[str, Any], plans_file: str, remedy: str = "zept plan -d ID"
) -> None:
    """Raise where a class's description was edited since the plans were made. Nothing is encoded for it.

    Plans by an earlier version say this only of the descriptions that the user wrote.

    Args:
        remedy: the command that makes the vectors again.

    Raises:
        ZePTError: names the classes, and whose descriptions were edited: the user's or the package's.
    """
    now = model_texts(dataset_json, planned["training"], planned["anomalies"], "dataset.json")
    then = planned_texts(planned["knowledge"])
    stale = {n for n, text in then.items() if n in now and text.key != text_key(now[n].text)}
    stale |= {n for n, d in now.items() if n not in then and d.is_own}
    own = sorted(n for n in stale if now[n].is_own or (n in then and is_users(then[n].origin)))
    edited = [f"the descriptions of {own} in dataset.json"] if own else []
    if stale - set(own):
        edited.append(f"the package's descriptions of {sorted(stale - set(own))}")
    if edited:
        raise ZePTError(
            f"{' and '.join(edited)} are others than {plans_file} was planned with: plan again ({remedy}), or restore "
            "them"
        )


def check_own_texts(
    block: Mapping[str, Any], dataset_json: Mapping[str, Any], folder: str, without: Collection[str] = ()
) -> None:
    """Raise where a model's own dataset.json holds a description that its vector was not made from.

    What the package says of a class does not matter: a trained model's vectors are what it was trained with, and an
    upgrade must not end it.

    Args:
        without: added tumors that are about to be removed.

    Raises:
        ZePTError: names the classes, and the commands that repair it.
    """
    if block["training"]["descriptions"] == "shuffled":  # a control: no class has its own text
        return
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    then = planned_texts(block["knowledge"])
    given = (dataset_json.get("zept") or {}).get("knowledge") or {}
    now = {normalize_name(name): text for name, text in given.items()}
    skipped = set(map(normalize_name, without))
    stale = [
        c.name
        for c in taxonomy.classes
        if normalize_name(c.name) not in skipped and not _fits(now.get(normalize_name(c.name)), then.get(c.name))
    ]
    added = [t.name for t in taxonomy.tumors if t.added and t.name in stale]
    trained = [name for name in stale if name not in added]
    repairs = []
    if added:
        names = " ".join(f"--name {name!r}" for name in added)
        repairs.append(
            f"to describe {added} in other words: zept remove-tumor {folder} {names}, then zept add-tumor with "
            "--description"
        )
    if trained:
        repairs.append(f"to describe {trained} in other words: plan (zept plan -d ID) and train again")
    if stale:
        raise ZePTError(
            f"the descriptions of {stale} in {folder}/dataset.json (zept.knowledge) were edited, and their vectors in "
            f"plans.json are still those of the old ones. Restore the descriptions; or, {'; '.join(repairs)}"
        )


def _fits(given: Any, planned: PlannedText | None) -> bool:
    """Whether an entry of `zept.knowledge`, or its absence, is what a class's vector was made from."""
    if given is None:
        return planned is None or not is_users(planned.origin)
    if isinstance(given, Mapping):
        # its text is the package's, and may have changed: only the name counts. Earlier versions did not keep it
        entry = catalog().find(str(given.get("like", "")))
        return planned is None or planned.origin == "own" or entry is None or planned.origin == f"like ({entry.name})"
    return planned is not None and planned.key == text_key(str(given))


def places_of(taxonomy: Taxonomy) -> dict[str, tuple[str, ...] | None]:
    """Class name → the hosts of a tumor, None of an organ. Of two classes of one place the vectors must differ."""
    return {o.name: None for o in taxonomy.organs} | {t.name: t.hosts for t in taxonomy.tumors}


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
            elif key in (*_SHARES, *_POSITIVE, "weight_decay", "alignment"):
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
    """The logit from which each tumor is reported (`zept calibrate`), None where none was chosen.

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
    description: str | Description | None = None,
    source: KnowledgeSource | None = None,
) -> dict[str, Any]:
    """A copy of `block` with one more tumor, marked as added after training.

    Args:
        description: replaces the built-in one.
        source: of its vector; default: the package's vectors and encoder.

    Raises:
        ZePTError: a tumor of the same hosts, or an organ, has the same description or vector; the model's queries are
            learned per class, and it has none for abnormal tissue in the hosts, or gave it to another tumor of theirs;
            or the name exists.
    """
    if block["decoder"]["queries"] == "learned" and (not hosts or {*hosts} - {*block["anomalies"].values()}):
        raise ZePTError(
            f"cannot add {name!r}: this model learned one query per class (as ZePTTrainerPaper does), so a new class "
            "means training again. Train with ZePTTrainer, whose queries are generated from descriptions"
        )
    taxonomy = Taxonomy.from_dict(block["taxonomy"]).with_tumor(name, label, hosts)
    *others, tumor = taxonomy.tumors
    twin = next((t.name for t in others if t.added and set(t.hosts) == set(tumor.hosts)), None)
    if block["decoder"]["queries"] == "learned" and twin is not None:
        raise ZePTError(
            f"cannot add {name!r}: {twin!r} was added in the same host, and this model's queries are learned: both "
            f"would take the one for abnormal tissue there, and nothing would tell them apart. Remove {twin!r} first "
            "(zept remove-tumor), or train with queries that are generated from descriptions"
        )
    text = describe_tumor(name, hosts, description)
    source = source or built_in()
    bank = KnowledgeBank.from_dict(block["knowledge"]).with_classes({name: text}, source)
    source.refuse_twins(bank.vectors, places_of(taxonomy), {name: text})
    return {
        **block,
        "taxonomy": taxonomy.to_dict(),
        "knowledge": bank.to_dict(),
        "added": {**block.get("added", {}), name: {"unseen": True, "added_at": date.today().isoformat()}},
    }


def fingerprint(block: Mapping[str, Any]) -> bytes:
    """32 bytes that stand for the trained classes, their knowledge and the decoder.

    An added tumor changes nothing, nor does `tumor_first`: weights know neither.
    """
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    vectors = block["knowledge"]["vectors"]
    content = {
        "organs": [[o.name, o.label, list(vectors[o.name])] for o in taxonomy.organs],
        "tumors": [[t.name, t.label, list(t.hosts), list(vectors[t.name])] for t in taxonomy.trained_tumors],
        "encoder": [block["knowledge"]["encoder"], block["knowledge"]["revision"]],
        "decoder": {name: value for name, value in block["decoder"].items() if name != "tumor_first"},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between two blocks, in words: taxonomy, settings, knowledge, queries for abnormal tissue."""
    found = [part for part in ("taxonomy", "decoder", "training") if a[part] != b[part]]
    anomalies = [block.get("anomalies", {}) for block in (a, b)]
    # texts are compared by their vectors: plans of earlier versions hold no keys
    knowledge = [
        {key: block["knowledge"][key] for key in ("encoder", "revision", "width")}
        | {"vectors": {n: v for n, v in block["knowledge"]["vectors"].items() if n not in names}}
        for block, names in zip((a, b), anomalies, strict=True)
    ]
    if json.dumps(knowledge[0], sort_keys=True) != json.dumps(knowledge[1], sort_keys=True):
        found.append("knowledge")
    if anomalies[0] != anomalies[1]:
        found.append("set of organs with a query for abnormal tissue")
    return found


def _class_names(taxonomy: Taxonomy) -> list[str]:
    return [o.name for o in taxonomy.organs] + [t.name for t in taxonomy.tumors]
