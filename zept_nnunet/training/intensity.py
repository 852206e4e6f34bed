"""What a normalized intensity means in Hounsfield units, from the plans."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

_NOISE_HU, _NOISE = 10.0, 0.1  # least spread within an organ: CT, and normalized units elsewhere


@dataclass(frozen=True)
class IntensityScale:
    """How one image channel was normalized: HU per normalized unit, and the clipping range in normalized units."""

    hu_per_unit: float
    low: float = -math.inf
    high: float = math.inf


def intensity_scales(plans: PlansManager, configuration: ConfigurationManager) -> tuple[IntensityScale | None, ...]:
    """Per image channel the scale of nnU-Net's CTNormalization; None for every other normalization."""
    scales: list[IntensityScale | None] = []
    for channel, scheme in enumerate(configuration.normalization_schemes):
        if scheme != "CTNormalization":
            scales.append(None)
            continue
        seen = plans.foreground_intensity_properties_per_channel[str(channel)]
        std = max(float(seen["std"]), 1e-8)
        low, high = ((float(seen[key]) - float(seen["mean"])) / std for key in ("percentile_00_5", "percentile_99_5"))
        scales.append(IntensityScale(std, low, high))
    return tuple(scales)


def noise_floors(
    plans: PlansManager, configuration: ConfigurationManager, num_input_channels: int
) -> tuple[float, ...]:
    """Per input channel the image noise in normalized units; for a cascade's one-hot channels too."""
    scales = intensity_scales(plans, configuration)
    noise = [_NOISE if scale is None else _NOISE_HU / scale.hu_per_unit for scale in scales]
    return tuple(noise + [_NOISE] * (num_input_channels - len(noise)))
