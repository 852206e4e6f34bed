"""Synthetic anomalies: where they are painted, what is left alone, what is drawn."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import ndimage

from zept_nnunet.errors import ZePTError
from zept_nnunet.training import anomalies
from zept_nnunet.training.anomalies import (
    FAINTEST_HU,
    HYPODENSE_SHARE,
    RANGES,
    InsertAnomalies,
    _neighborhood_share,
    with_anomalies,
)
from zept_nnunet.training.intensity import IntensityScale, intensity_scales, noise_floors

HOSTS = {1: 101, 2: 102}  # host → value of its anomalies
TUMOR, OTHER = 3, 4
SHAPE, SPACING = (16, 40, 48), (5.0, 2.5, 2.5)
CT = IntensityScale(60.0, -3.0, 3.0)


def sample(dimensions: int = 3, channels: int = 1) -> dict[str, torch.Tensor]:
    """Two hosts (the first with a tumor), another organ, padding; noise."""
    labels = torch.zeros(1, *SHAPE, dtype=torch.int16)
    labels[:, 2:15, 4:36, 2:22] = 1
    labels[:, 6:10, 10:16, 6:12] = TUMOR
    labels[:, 2:15, 4:36, 22:40] = 2
    labels[:, 2:15, 4:36, 40:46] = OTHER
    labels[:, :, :, -1] = -1
    image = 0.2 * torch.randn(channels, *SHAPE, generator=torch.Generator().manual_seed(0))
    if dimensions == 2:
        return {"image": image[:, 8], "segmentation": labels[:, 8]}
    return {"image": image, "segmentation": labels}


def transform(dimensions: int = 3, scales: tuple[IntensityScale | None, ...] = (CT,), **kwargs: object):
    return InsertAnomalies(HOSTS, [TUMOR], SPACING[-dimensions:], scales, **{"probability": 1.0, **kwargs})


def copies(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in data.items()}


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomalies, "GRADIENT_PROBABILITY", 0.0)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_only_hosts_change_and_the_value_names_the_host(dimensions: int) -> None:
    before, insert = sample(dimensions), transform(dimensions)
    given, found = copies(before), {101: 0, 102: 0}
    for seed in range(40):
        np.random.seed(seed)
        after = insert(**before)
        old, new = before["segmentation"], after["segmentation"]
        assert new.dtype == torch.int16 and after["image"].dtype == torch.float32
        for host, value in HOSTS.items():
            found[value] += int((new == value).sum())
            assert (old[new == value] == host).all()
        assert torch.equal(new[~torch.isin(old, torch.tensor([1, 2]))], old[~torch.isin(old, torch.tensor([1, 2]))])
        assert set(new.unique().tolist()) <= {-1, 0, 1, 2, TUMOR, OTHER, 101, 102}
        is_untouchable = ~torch.isin(old, torch.tensor([1, 2]))
        assert torch.equal(after["image"][is_untouchable], before["image"][is_untouchable])
        assert after["image"].min() >= CT.low and after["image"].max() <= CT.high
    assert min(found.values()) > 100
    for key, value in given.items():  # the sample itself is left as it was
        assert torch.equal(before[key], value)


def test_labeled_voxels_are_darker_by_the_drawn_contrast(no_gradients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = {**RANGES, "contrast_hu": (-60.0, -60.0, "HU"), "edge_mm": (0.1, 0.1, "mm"), "radius_mm": (9.0, 9.0, "mm")}
    monkeypatch.setattr(anomalies, "HYPODENSE_SHARE", 1.0)
    before = sample()
    before["image"] *= 0
    insert = transform(ranges=ranges, max_anomalies=1)
    deepest, sizes = [], []
    for seed in range(30):
        np.random.seed(seed)
        after = insert(**before)
        is_anomaly = after["segmentation"] >= 101
        if not is_anomaly.any():
            continue
        change = (after["image"] - before["image"]) * CT.hu_per_unit
        core = torch.from_numpy(ndimage.binary_erosion(is_anomaly[0].numpy()))[None]
        deepest += change[core].tolist()
        sizes.append(int(is_anomaly.sum()) * math.prod(SPACING))
        unlabeled = change[(~is_anomaly) & (before["segmentation"] > 0)].mean()
        assert change[is_anomaly].mean() < -30 and abs(unlabeled) < 6
    assert len(sizes) > 20
    assert np.mean(deepest) == pytest.approx(-60, abs=4)
    ball = 4 / 3 * math.pi * 9.0**3
    assert 0.6 * ball < np.median(sizes) < 1.1 * ball  # cut at the host's surface, never larger


def test_the_label_is_where_the_blend_is_above_one_half_and_reaches_the_surface(
    no_gradients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the surface the change fades, as partial volume asks, and the label stays."""
    ranges = {**RANGES, "contrast_hu": (-80.0, -80.0, "HU"), "texture_hu": (0.0, 0.0, "HU")}
    monkeypatch.setattr(anomalies, "HYPODENSE_SHARE", 1.0)
    before, insert = sample(), transform(ranges=ranges, max_anomalies=1)
    before["image"] *= 0
    at_surface = 0
    for seed in range(10):
        np.random.seed(seed)
        after = insert(**before)
        blend = after["image"] * CT.hu_per_unit / -80.0
        is_labeled = after["segmentation"] >= 101
        host = int(after["segmentation"].max()) - 100
        organ = (before["segmentation"] == host) | (host == 1) & (before["segmentation"] == TUMOR)
        inside = _neighborhood_share(organ[0])[None] == 1
        assert torch.equal(is_labeled & inside, (blend > 0.5) & inside)
        assert not ((blend > 0.5) & ~is_labeled).any()
        at_surface += int((is_labeled & ~inside & (blend < 0.5)).sum())
        assert ((blend > 0.02) & (blend < 0.98)).any()  # a soft edge
    assert at_surface > 20


def test_draws_stay_in_their_ranges_and_are_mostly_hypodense() -> None:
    rng, insert = np.random.default_rng(0), transform()
    drawn = [insert.draw(rng) for _ in range(2000)]
    for key, (low, high, _) in RANGES.items():
        values = np.array([getattr(a, key) for a in drawn]).ravel()
        assert low <= values.min() and values.max() <= high, key
        wanted = high - low if key != "edge_mm" else RANGES["radius_mm"][0] - low
        assert np.ptp(values) > 0.95 * wanted, key
    contrast = np.array([a.contrast_hu[0] for a in drawn])
    assert np.mean(contrast < 0) == pytest.approx(HYPODENSE_SHARE, abs=0.02)
    assert not np.any((contrast > FAINTEST_HU[0]) & (contrast < FAINTEST_HU[1]))
    assert all(a.edge_mm <= a.radius_mm for a in drawn)


def test_repeatable_by_numpy_seed_whatever_torch_does() -> None:
    results = []
    for torch_seed in (0, 1):
        torch.manual_seed(torch_seed)
        np.random.seed(7)
        results.append([transform()(**sample()) for _ in range(3)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["segmentation"], b["segmentation"])
    assert not torch.equal(results[0][0]["image"], results[0][1]["image"])


def test_nothing_without_a_host_or_in_a_sliver_or_at_probability_zero(no_gradients: None) -> None:
    absent, sliver = sample(), sample()
    absent["segmentation"][(absent["segmentation"] == 1) | (absent["segmentation"] == 2)] = OTHER
    sliver["segmentation"][:] = 0
    sliver["segmentation"][0, 5, 5:8, 5:8] = 1
    for seed in range(10):
        np.random.seed(seed)
        for data in (absent, sliver):
            after = transform()(**data)
            assert torch.equal(after["segmentation"], data["segmentation"])
            assert torch.equal(after["image"], data["image"])
        after = transform(probability=0.0)(**sample())
        assert torch.equal(after["image"], sample()["image"])


def test_an_anomaly_never_fills_its_host(no_gradients: None) -> None:
    small = sample()
    small["segmentation"][:] = 0
    small["segmentation"][0, 4:9, 8:18, 8:18] = 1
    most = 0
    for seed in range(40):
        np.random.seed(seed)
        after = transform(max_anomalies=1)(**small)["segmentation"]
        most = max(most, int((after == 101).sum()))
    assert 8 <= most <= 0.5 * 500


def test_benign_gradients_change_the_image_and_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomalies, "GRADIENT_PROBABILITY", 1.0)
    before = sample()
    np.random.seed(0)
    after = transform(probability=0.0)(**before)
    assert torch.equal(after["segmentation"], before["segmentation"])
    change = (after["image"] - before["image"]) * CT.hu_per_unit
    in_host = torch.isin(before["segmentation"], torch.tensor([1, 2]))
    assert change[~in_host].abs().max() == 0
    assert 0.5 < change[in_host].abs().max() < 40
    steps = change[:, :, :, 1:] - change[:, :, :, :-1]
    same = before["segmentation"][:, :, :, 1:] == before["segmentation"][:, :, :, :-1]
    assert steps[same].abs().max() < 3  # smooth


def test_outside_ct_amplitudes_follow_the_organs_own_spread(no_gradients: None) -> None:
    """Two channels, the second ten times as strong; both signs occur."""
    data, signs = sample(channels=2), []
    data["image"][1] = data["image"][0] * 10
    insert = transform(scales=(None, None), max_anomalies=1, ranges={**RANGES, "texture_hu": (0.0, 0.0, "HU")})
    for seed in range(30):
        np.random.seed(seed)
        change = insert(**data)["image"] - data["image"]
        where = change[0] != 0
        if where.any():
            signs += [change[c][where].mean().sign().item() for c in (0, 1)]
            strength = [change[c].abs().max() / data["image"][c].std() for c in (0, 1)]
            assert all(0.1 < s < 90 / anomalies.TYPICAL_ORGAN_SD_HU * 1.2 for s in strength)
    assert 0.2 < np.mean(np.array(signs) > 0) < 0.8


def test_scales_come_from_the_plans() -> None:
    seen = {"mean": 80.0, "std": 40.0, "percentile_00_5": -120.0, "percentile_99_5": 200.0}
    plans = SimpleNamespace(foreground_intensity_properties_per_channel={"0": seen, "1": seen})
    configuration = SimpleNamespace(normalization_schemes=["CTNormalization", "ZScoreNormalization"])
    assert intensity_scales(plans, configuration) == (IntensityScale(40.0, -5.0, 3.0), None)
    assert noise_floors(plans, configuration, 3) == (10 / 40.0, 0.1, 0.1)  # CT, another channel, a cascade's


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_stands_in_nnunets_own_transforms_right_after_the_spatial_one(dummy_2d: bool) -> None:
    stock = nnUNetTrainer.get_training_transforms(
        SHAPE, (-0.5, 0.5), [[1, 1, 1], [0.5, 0.5, 0.5]], (0, 1, 2), dummy_2d, use_mask_for_norm=[False]
    )
    count, insert = len(stock.transforms), transform()
    composed = with_anomalies(stock, insert)
    position = composed.transforms.index(insert)
    assert isinstance(composed.transforms[position - 1], Convert2DTo3DTransform if dummy_2d else SpatialTransform)
    assert len(stock.transforms) == count and len(composed.transforms) == count + 1
    values: set[int] = set()
    for seed in range(5):
        np.random.seed(seed)
        torch.manual_seed(seed)
        after = composed(**sample())
        assert [tuple(s.shape) for s in after["segmentation"]] == [(1, *SHAPE), (1, 8, 20, 24)]
        values |= set(after["segmentation"][0].unique().tolist())
    assert values & {101, 102} and -1 not in values


def test_bad_set_up_is_refused() -> None:
    with pytest.raises(ZePTError, match="SpatialTransform"):
        with_anomalies(SimpleNamespace(transforms=[]), transform())
    with pytest.raises(ZePTError, match="hosts"):
        InsertAnomalies({TUMOR: 9}, [TUMOR], SPACING, [CT])
    with pytest.raises(ZePTError, match="spacing"):
        InsertAnomalies(HOSTS, [TUMOR], (1.0,), [CT])
    with pytest.raises(ZePTError, match="probability"):
        transform(probability=1.5)
    with pytest.raises(ZePTError, match="channels"):
        transform(scales=(CT, CT))(**sample())


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 1, 1), (4, 3, 7), (2, 9)])
def test_share_of_neighbors_in_a_crop_thinner_than_the_neighborhood(shape: tuple[int, ...]) -> None:
    mask = torch.from_numpy(np.random.default_rng(0).random(shape) < 0.5)
    share = _neighborhood_share(mask)
    for voxel in np.ndindex(*shape):
        window = tuple(slice(max(v - 1, 0), v + 2) for v in voxel)
        assert share[voxel].item() == pytest.approx(mask[window].float().mean().item())
