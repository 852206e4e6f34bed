"""A preset for small experiments on a CPU: a third of the channels, everything else as ZePTPlanner plans it."""

from __future__ import annotations

from zept_nnunet.plans.zept_planner import ZePTPlanner


class ZePTSmallPlanner(ZePTPlanner):
    """Plans `ZePTSmallPlans.json`: 12 channels at the finest scale where nnU-Net has 32, about a sixth of its work.

    For comparisons that must run many trainings (benchmarks/), not for accuracy.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
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
        self.UNet_base_num_features = 12
        self.UNet_max_features_2d = self.UNet_max_features_3d = 96
