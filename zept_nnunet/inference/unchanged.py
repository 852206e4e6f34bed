"""Does a model with an added tumor say of the other classes what it said before? Asked on a small input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.model_folder import CHECKPOINTS, read_json
from zept_nnunet.training.trainer import ZePTTrainer

_TOLERANCE = 1e-3  # in log-odds: sums over another number of queries are rounded differently
_LEAST_VOXELS = 8  # per axis


def check_unchanged(before: Path, after: Path, configuration: str) -> None:
    """Compare the channels that both models have, fold by fold, on one random input. Thresholds do not count: a removed
    tumor takes its own along, and its hosts are then decoded without it.

    Args:
        before, after: model folders whose checkpoints hold the same weights; `after` has more classes, or fewer.

    Raises:
        ZePTError: a logit differs by more than rounding.
    """
    networks = [_network(folder, configuration) for folder in (before, after)]
    for fold in sorted(p.name for p in after.glob("fold_*")):
        name = next(c for c in CHECKPOINTS if (after / fold / c).is_file())
        weights = torch.load(after / fold / name, map_location="cpu", weights_only=False, mmap=True)["network_weights"]
        old, new = (_logits(network, x, weights) for network, x in networks)
        difference = max((old[names] - new[names]).abs().max().item() for names in old.keys() & new.keys())
        if not difference <= _TOLERANCE:
            raise ZePTError(
                f"{before / fold}: with the change, the classes that the model had would come out differently (by "
                f"{difference:.3g} in log-odds on a test input). Nothing was written; please report this"
            )


def _network(folder: Path, configuration: str) -> tuple[Any, Tensor]:
    """The model's network without its weights, and a small random input (1, C, *), the same for every call."""
    manager = PlansManager(read_json(folder / "plans.json"))
    dataset_json = read_json(folder / "dataset.json")
    settings = manager.get_configuration(configuration)
    channels = len(dataset_json.get("channel_names") or dataset_json.get("modality") or {"0": "CT"})
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    network: Any = ZePTTrainer.build_network_architecture(manager, settings, channels, heads, False)
    network.thresholds = [None] * network.num_tumors
    strides = np.prod([np.broadcast_to(s, len(settings.patch_size)) for s in settings.pool_op_kernel_sizes], axis=0)
    size = [int(s) * max(2, -(-_LEAST_VOXELS // int(s))) for s in strides]
    return network.eval(), torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))


def _logits(network: Any, x: Tensor, weights: dict[str, Any]) -> dict[tuple[str, ...], Tensor]:
    """The output of each channel, by the classes that it reports."""
    network.load_state_dict(weights)
    with torch.inference_mode():
        return dict(zip(network.taxonomy.channels, network(x)[0], strict=True))
