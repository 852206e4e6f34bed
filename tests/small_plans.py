"""Plans of a U-Net small enough for a test, and a dataset.json to go with them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from zept_nnunet.network.zept import ZePT
from zept_nnunet.plans_block import build_block

DATASET_JSON: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "spleen": 2, "pancreas": 3, "liver_tumor": 4, "spleen_tumor": 5},
    "numTraining": 5,
    "file_ending": ".nii.gz",
}


def make_plans(dimensions: int = 3, network_class: str = "PlainConvUNet") -> dict[str, Any]:
    """Plans with one configuration, "3d_fullres" or "2d", of three stages."""
    conv, norm = f"torch.nn.modules.conv.Conv{dimensions}d", f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d"
    blocks = "n_conv_per_stage" if network_class == "PlainConvUNet" else "n_blocks_per_stage"
    configuration = {
        "data_identifier": "nnUNetPlans_x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 24, 16][:dimensions],
        "spacing": [1.0] * dimensions,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{network_class}",
            "arch_kwargs": {
                "n_stages": 4,
                "features_per_stage": [8, 16, 16, 16],
                "conv_op": conv,
                "kernel_sizes": [[3] * dimensions] * 4,
                "strides": [[1] * dimensions] + [[2] * dimensions] * 3,
                blocks: [1] * 4,
                "n_conv_per_stage_decoder": [1] * 3,
                "conv_bias": True,
                "norm_op": norm,
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset999_Small",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 90.0, "std": 50.0, "percentile_00_5": -60.0, "percentile_99_5": 240.0}
        },
        "configurations": {"3d_fullres" if dimensions == 3 else "2d": configuration},
    }


def make_plans_manager(dimensions: int = 3, **kwargs: Any) -> tuple[PlansManager, str]:
    plans = make_plans(dimensions, **kwargs)
    return PlansManager(plans), next(iter(plans["configurations"]))


def make_network(
    dimensions: int = 3,
    dataset_json: dict[str, Any] | None = None,
    variant: str = "zept",
    deep_supervision: bool = True,
    block: dict[str, Any] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> ZePT:
    manager, configuration = make_plans_manager(dimensions, **kwargs)
    torch.manual_seed(seed)
    block = block if block is not None else build_block(deepcopy(dataset_json or DATASET_JSON), variant)
    return ZePT(block, manager.get_configuration(configuration), 1, deep_supervision)
