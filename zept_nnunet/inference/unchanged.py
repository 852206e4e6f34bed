"""Does a model with an added tumor say of the other classes what it said before? Asked on a small input."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.model_folder import CHECKPOINTS, read_json
from zept_nnunet.training.trainer import ZePTTrainer

_TOLERANCE = 1e-3  # in log-odds: sums over another number of queries are rounded differently
_LEAST_VOXELS = 8  # per axis
_NUM_DRAWN = 4096  # voxels with random maps, in which every class wins somewhere


class _Model(NamedTuple):
    network: Any
    label_manager: Any  # nnU-Net's, which makes labels of logits
    meaning: list[frozenset[str]]  # of each label value, the names in dataset.json that it belongs to
    x: Tensor  # (1, C, *), the same for every model


def check_unchanged(before: Path, after: Path, configuration: str) -> None:
    """Compare what both models say of the classes that both have, with every checkpoint of every fold.

    Logits of all shared channels, and the labels that nnU-Net makes of them, with thresholds, on a small random input;
    and the labels of random maps, as the weights may let few classes win on that input. Labels are compared where
    neither model finds a class that the other lacks. A threshold of such a class does not count: a removed tumor takes
    its own along, and its hosts are then decoded without it.

    Args:
        before, after: model folders whose checkpoints hold the same weights; `after` has more classes, or fewer.

    Raises:
        ZePTError: a logit differs by more than rounding, or a label differs.
    """
    old, new = (_read(folder, configuration) for folder in (before, after))
    for model, other in ((old, new), (new, old)):
        shared = {t.name for t in other.network.taxonomy.tumors}
        named = zip(model.network.taxonomy.tumors, model.network.thresholds, strict=True)
        model.network.thresholds = [t if tumor.name in shared else None for tumor, t in named]
    _compare(old, _drawn(old.network), new, _drawn(new.network), before)
    for path in sorted(p for c in CHECKPOINTS for p in after.glob(f"fold_*/{c}")):
        weights = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["network_weights"]
        _compare(old, _logits(old, weights), new, _logits(new, weights), before / path.relative_to(after))


def _read(folder: Path, configuration: str) -> _Model:
    """The model without its weights."""
    manager = PlansManager(read_json(folder / "plans.json"))
    dataset_json = read_json(folder / "dataset.json")
    settings = manager.get_configuration(configuration)
    label_manager = manager.get_label_manager(dataset_json)
    channels = len(dataset_json.get("channel_names") or dataset_json.get("modality") or {"0": "CT"})
    network: Any = ZePTTrainer.build_network_architecture(
        manager, settings, channels, label_manager.num_segmentation_heads, False
    )
    strides = np.prod([np.broadcast_to(s, len(settings.patch_size)) for s in settings.pool_op_kernel_sizes], axis=0)
    size = [int(s) * max(2, -(-_LEAST_VOXELS // int(s))) for s in strides]
    generator = torch.Generator().manual_seed(0)
    noise, grain = (torch.randn(1, channels, *(n // k for n in size), generator=generator) for k in (1, 4))
    blocks = torch.nn.functional.interpolate(grain, size=size, mode="nearest")
    return _Model(network.eval(), label_manager, _names_by_label(dataset_json["labels"]), noise + 2 * blocks)


def _names_by_label(labels: Mapping[str, Any]) -> list[frozenset[str]]:
    """Of each label value from 0, the names that dataset.json has for it; of a region's values, several."""
    named = {
        name: {int(v) for v in (values if isinstance(values, list | tuple) else [values])}
        for name, values in labels.items()
        if name != "ignore"
    }
    highest = max(v for values in named.values() for v in values)
    return [frozenset(n for n, values in named.items() if v in values) for v in range(highest + 1)]


def _logits(model: _Model, weights: dict[str, Any]) -> Tensor:
    model.network.load_state_dict(weights)
    with torch.inference_mode():
        logits: Tensor = model.network(model.x)
    return logits


def _drawn(network: Any) -> Tensor:
    """Logits (1, heads, V) of random maps, the same for classes of one name."""

    def maps(classes: Any) -> Tensor:
        drawn = [
            5 * torch.randn(_NUM_DRAWN, generator=torch.Generator().manual_seed(zlib.crc32(c.name.encode())))
            for c in classes
        ]
        return torch.stack(drawn)[None] if drawn else torch.empty(1, 0, _NUM_DRAWN)

    organs = maps(network.taxonomy.organs)
    logits: Tensor = network._channels(organs, maps(network.taxonomy.tumors), support=organs)
    return logits


def _compare(old: _Model, before: Tensor, new: _Model, after: Tensor, source: Path) -> None:
    """Raise where logits (1, heads, *) of shared channels, or labels, differ."""
    channels = [
        dict(zip(m.network.taxonomy.channels, z.unbind(1), strict=True)) for m, z in ((old, before), (new, after))
    ]
    shared = channels[0].keys() & channels[1].keys()
    difference = torch.stack([(channels[0][c] - channels[1][c]).abs().max() for c in shared]).max().item()
    if not difference <= _TOLERANCE:
        raise _changed(source, f"by {difference:.3g} in log-odds")
    alone = set().union(*old.meaning) ^ set().union(*new.meaning)
    codes = {m: -1 if m & alone else i for i, m in enumerate((*old.meaning, *new.meaning))}
    found = []
    for model, logits in ((old, before), (new, after)):
        values = model.label_manager.convert_logits_to_segmentation(logits[0]).long()
        found.append(torch.tensor([codes[m] for m in model.meaning])[values])
    if old.label_manager.has_regions:
        margin = before[0].abs().amin(0)
    else:
        best, second = before[0].topk(2, dim=0).values
        margin = best - second
    is_wrong = (found[0] != found[1]) & (found[0] >= 0) & (found[1] >= 0) & (margin > 2 * _TOLERANCE)
    if is_wrong.any():
        raise _changed(source, f"another label in {int(is_wrong.sum())} of {is_wrong.numel()} voxels")


def _changed(source: Path, how: str) -> ZePTError:
    return ZePTError(
        f"{source}: with the change, the classes that the model had would come out differently ({how}, on a test "
        "input). Nothing was written; please report this"
    )
