"""A preset for small experiments on a CPU: few channels, small patches, everything else as ZePTPlanner plans it."""

from __future__ import annotations

from types import MappingProxyType

from zept_nnunet.plans.zept_planner import ZePTPlanner


class ZePTSmallPlanner(ZePTPlanner):
    """Plans `ZePTSmallPlans.json`: 16 channels at the finest scale (nnU-Net: 32), one convolution there and in each
    stage of the decoder, patches of some 30,000 voxels.

    On a CPU, channels cost by multiples of 8: with 12 a pass took 0.23 s where 16 took 0.16 s, and 0.10 s with the
    fewer convolutions (two cores, batch 2).

    On the phantom of size `small` a batch holds 61,000 voxels in place of the 221,000 of whole volumes, and a training
    of equal length in time sees more patches around small organs and lesions.
    Queries of 64 numbers (128): beside so few channels they would take most of the time. A small network on a short
    schedule learns faster at a higher rate: 4e-3, as the comparison trainers have it (docs/method.md).

    For comparisons that must run many trainings (benchmarks/), not for accuracy.
    """

    for_cpu = True
    settings = MappingProxyType({"width": 64, "heads": 4, "learning_rate": 4e-3})

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 0.08,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "ZePTSmallPlans",
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
        self.UNet_base_num_features = 16
        self.UNet_max_features_2d = self.UNet_max_features_3d = 128
        stages = len(self.UNet_blocks_per_stage_encoder)
        self.UNet_blocks_per_stage_encoder = (1, *[2] * (stages - 1))
        self.UNet_blocks_per_stage_decoder = (1,) * (stages - 1)
