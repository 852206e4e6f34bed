"""nnU-Net's default planner, with the query decoder counted and the `zept` block written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from zept_nnunet.network.relative import KEPT_PER_VOXEL, ORGANS_PER_CHUNK, VOXELS_AT_ONCE, pooling_of
from zept_nnunet.plans_block import build_block
from zept_nnunet.taxonomy import Taxonomy

# nnU-Net counts one element per voxel and channel of a convolution. Counting what autograd keeps for the backward pass
# (tests/plans does), such an element stands for about 2.5 tensors: the convolution's input and those of norm and
# nonlinearity. A map keeps about 4, for it goes through the conjunction and through Dice and BCE; these are float32.
_TENSORS_PER_ELEMENT = 2.5
_ELEMENTS_PER_MAP = 2


class ZePTPlanner(ExperimentPlanner):
    """Plans `ZePTPlans.json`.

    Patch and batch fit the GPU budget with the query decoder in it: it asks for maps per class at every scale, and for
    tokens, keys and values at the scales where queries look at the image. Everything else is nnU-Net's default.

    `settings`: of the decoder or the training, where a preset's differ from the defaults.
    `for_cpu`: on a CPU the relative head crops each organ to where it is, and what it keeps is not counted.
    """

    settings: Mapping[str, Any] = MappingProxyType({})
    for_cpu = False
    _pooled = 1  # voxels of the configuration that is being planned, that the relative head makes one of

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "ZePTPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ):
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.block = build_block(
            self.dataset_json, source=f"{self.raw_dataset_folder}/dataset.json", settings=self.settings
        )

    def get_plans_for_configuration(self, spacing: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """nnU-Net's; remembers how the relative head pools voxels of this spacing."""
        self._pooled = math.prod(pooling_of([float(s) for s in spacing]))
        planned: dict[str, Any] = super().get_plans_for_configuration(spacing, *args, **kwargs)
        return planned

    # upstream's is static, and called through the instance
    def static_estimate_VRAM_usage(
        self,
        patch_size: tuple[int, ...],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: tuple[str, ...],
    ) -> int:
        """Elements of all feature maps of one sample: the U-Net's, without its class-sized layers, and the queries'."""
        u_net = ExperimentPlanner.static_estimate_VRAM_usage(
            patch_size, input_channels, 1, arch_class_name, arch_kwargs, arch_kwargs_req_import
        )
        pooled = None if self.for_cpu else self._pooled
        return int(u_net) + query_feature_map_size(
            patch_size, arch_kwargs["strides"], Taxonomy.from_dict(self.block["taxonomy"]), self.block, pooled
        )

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write the plans with the `zept` block: planning again would drop the key."""
        plans["zept"] = self.block
        super().save_plans(plans)


def query_feature_map_size(
    patch_size: tuple[int, ...],
    strides: list[Any],
    taxonomy: Taxonomy,
    block: dict[str, Any],
    pooled: int | None = None,
) -> int:
    """Elements of the query path's feature maps for one sample, in the unit of `compute_conv_feature_map_size`.

    Args:
        patch_size: voxels per axis.
        strides: of the encoder's stages, each an int or one per axis.
        taxonomy: gives Q organ and U tumor queries.
        block: the plans' `zept` block; its decoder settings, and the organs that have a query for abnormal tissue.
        pooled: voxels that the relative head makes one of; None: its own are not counted.
    """
    decoder = block["decoder"]
    num_organs, num_tumors = len(taxonomy.organs), len(taxonomy.tumors)
    voxels = decoder_voxels(patch_size, strides)
    # support and healthy map per organ, one map per tumor and per query for abnormal tissue, at every scale
    maps = (2 * num_organs + num_tumors + len(block["anomalies"])) * sum(voxels)
    if decoder["relative"]:
        maps += num_organs * voxels[-1]  # the deviation from the organ, at the finest scale
    kept = 0
    if decoder["relative"] and pooled is not None:
        at_once = min(min(num_organs, ORGANS_PER_CHUNK) * voxels[-1] // pooled, VOXELS_AT_ONCE)
        kept = at_once * KEPT_PER_VOXEL

    grouped = voxels[: max(1, min(decoder["grouping_scales"], len(voxels) - 1))]
    layers = [0] * len(grouped)
    for i in range(decoder["advanced_layers"]):
        layers[i % len(grouped)] += 1
    for n, advanced in zip(grouped, layers, strict=True):
        tokens = 2  # before and after their norm
        tokens += 4  # grouping: keys and values of its attention, and of the assignment
        tokens += 2 * advanced  # keys and values of each advanced layer
        kept += n * tokens * decoder["width"]
        kept += n * 3 * (num_organs + decoder["background_queries"])  # the assignment: scores, soft, hard
    return int(_ELEMENTS_PER_MAP * maps + kept / _TENSORS_PER_ELEMENT)


def decoder_voxels(patch_size: tuple[int, ...], strides: list[Any]) -> list[int]:
    """Voxels of each decoder scale, coarse to fine; the bottleneck is none."""
    size = np.array(patch_size, dtype=np.int64)
    voxels = []
    for stride in strides[:-1]:
        size = size // np.array(stride, dtype=np.int64)
        voxels.append(int(size.prod()))
    return voxels[::-1]
