"""The plans' U-Net as a feature extractor.

Letters in shape comments: B batch, C channels, Q organ queries, U tumor queries, E knowledge width, D query width,
V voxels of a scale (flattened), `*` spatial axes in nnU-Net's order.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from zept_nnunet.errors import ZePTError


class KnowledgeFingerprint(nn.Module):
    """Refuses weights that were trained with other classes or other knowledge.

    It stands where a stock decoder keeps its `seg_layers`, so that `-pretrained_weights`, which skips these keys,
    carries a model to other classes, while resuming and predicting compare the fingerprints.
    """

    fingerprint: Tensor

    def __init__(self, digest: bytes):
        super().__init__()
        self.register_buffer("fingerprint", torch.tensor(list(digest), dtype=torch.uint8))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "fingerprint")
        if found is not None and not torch.equal(found.cpu(), self.fingerprint.cpu()):
            raise ZePTError(
                "this checkpoint was trained with other classes, knowledge or decoder settings than the plans "
                "describe. Wanted: the plans.json that was saved beside the checkpoint. Use the model folder's "
                "own plans.json, or carry the weights over with -pretrained_weights"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class FeatureDecoder(nn.Module):
    """The stages of a U-Net decoder without its class-sized segmentation layers."""

    def __init__(self, unet_decoder: Any, fingerprint: KnowledgeFingerprint, deep_supervision: bool):
        super().__init__()
        self.stages: nn.ModuleList = unet_decoder.stages
        self.transpconvs: nn.ModuleList = unet_decoder.transpconvs
        self.seg_layers = fingerprint
        self.deep_supervision = deep_supervision  # nnU-Net switches this attribute

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Features of every decoder scale, coarse to fine: (B, C_l, *_l)."""
        x, features = skips[-1], []
        for upsample, stage, skip in zip(self.transpconvs, self.stages, reversed(skips[:-1]), strict=True):
            x = stage(torch.cat((upsample(x), skip), dim=1))
            features.append(x)
        return features


def check_wrappable(configuration: ConfigurationManager, source: str) -> None:
    """Look at the plans' network without its weights.

    Raises:
        ZePTError: it has no encoder and U-Net decoder that can be taken apart.
    """
    with torch.device("meta"):
        _take_apart(_make_unet(configuration, 1, True, initialize=False), configuration, source)


def build_backbone(
    configuration: ConfigurationManager, num_input_channels: int, digest: bytes, deep_supervision: bool
) -> tuple[nn.Module, FeatureDecoder, list[int]]:
    """Encoder, feature decoder, and the decoder's channels, coarse to fine.

    Raises:
        ZePTError: the plans' network cannot be taken apart.
    """
    unet = _make_unet(configuration, num_input_channels, deep_supervision, initialize=True)
    encoder, decoder = _take_apart(unet, configuration, "plans.json")
    channels = list(encoder.output_channels[-2::-1])
    return encoder, FeatureDecoder(decoder, KnowledgeFingerprint(digest), deep_supervision), channels


def _make_unet(
    configuration: ConfigurationManager, num_input_channels: int, deep_supervision: bool, initialize: bool
) -> nn.Module:
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        num_input_channels,
        1,
        allow_init=initialize,
        deep_supervision=deep_supervision,
    )


def _take_apart(unet: nn.Module, configuration: ConfigurationManager, source: str) -> tuple[Any, Any]:
    encoder: Any = getattr(unet, "encoder", None)
    decoder: Any = getattr(unet, "decoder", None)
    if (
        not hasattr(decoder, "stages")
        or not hasattr(decoder, "transpconvs")
        or not hasattr(encoder, "output_channels")
        or len(decoder.stages) != len(encoder.output_channels) - 1
    ):
        raise ZePTError(
            f"{source}: the network class {configuration.network_arch_class_name!r} cannot be wrapped: ZePT needs "
            "a U-Net with an encoder (output_channels) and a decoder (stages, transpconvs), such as PlainConvUNet or "
            "ResidualEncoderUNet. Plan with nnUNetv2_plan_and_preprocess (any of its U-Net planners) or zept plan"
        )
    return encoder, decoder
