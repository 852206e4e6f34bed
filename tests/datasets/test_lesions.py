"""The lesion types, and that a painted lesion has the properties that were drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from zept_nnunet.datasets.lesions import (
    DEVELOPMENT,
    FINAL,
    KINDS,
    LESION_TYPES,
    PROPERTIES,
    SEEN,
    Lesion,
    draw_lesion,
    lesion_fields,
    of_role,
    outside_of_seen,
    property_range,
)
from zept_nnunet.datasets.phantom_parameters import ORGANS, PHASES
from zept_nnunet.training.anomalies import RANGES

AXES = [np.arange(-40, 40.5, 1.0)] * 3
BALL = Lesion("spleen tumor", "hypodense", 15.0, -40.0, 1.0, 4.0, 0.0, 6.0, 0.0, 0.0, 0.0, (1.0, 0.0, 0.0), 0)


def test_types_cover_every_kind_and_name_real_hosts() -> None:
    assert {a.kind for t in LESION_TYPES.values() for a in t.appearances} == set(KINDS)
    assert all(host in ORGANS for t in LESION_TYPES.values() for host in t.hosts)
    assert [t.name for t in of_role(SEEN)] == ["liver tumor", "kidney tumor"]
    assert [t.name for t in of_role(DEVELOPMENT)] == ["spleen tumor"]


@pytest.mark.parametrize("name", LESION_TYPES)
@pytest.mark.parametrize("phase", PHASES)
def test_drawn_lesions_stay_in_their_ranges(name: str, phase: str) -> None:
    kind = LESION_TYPES[name]
    looks = {a.kind: a for a in kind.appearances}
    rng = np.random.default_rng(0)
    for i in range(60):
        lesion = draw_lesion(kind, phase, rng, least_mm=12 if i % 2 else 0, most_mm=15 if i % 3 else np.inf)
        look = looks[lesion.kind]
        assert lesion.contrast_hu in look.contrast_hu[phase]
        for prop in (*(p for p in PROPERTIES if p != "contrast_hu"), "irregularity"):
            assert getattr(lesion, prop) in getattr(look, prop), prop
        assert np.linalg.norm(lesion.direction) == pytest.approx(1)


def test_final_types_lie_outside_of_the_seen_ranges_in_the_stated_properties() -> None:
    assert set(outside_of_seen(LESION_TYPES["pancreas tumor"])) == {"elongation", "edge_mm"}
    assert set(outside_of_seen(LESION_TYPES["stomach tumor"])) == {"contrast_hu", "texture_hu", "texture_mm"}
    assert outside_of_seen(LESION_TYPES["spleen tumor"]) == ()


def test_the_sign_of_contrast_of_one_final_type_occurs_nowhere_in_training() -> None:
    assert property_range(of_role(SEEN), "contrast_hu")[1] < 0
    low = property_range((LESION_TYPES["stomach tumor"],), "contrast_hu")[0]
    rims = [a.rim_hu.high for t in of_role(SEEN) for a in t.appearances if a.rim_hu is not None]
    assert low > max(*rims, RANGES["contrast_hu"][1])


def test_property_names_are_those_of_the_synthetic_anomalies() -> None:
    assert set(PROPERTIES) == set(RANGES)


@pytest.mark.parametrize("elongation", [1.0, 2.0])
def test_volume_is_that_of_the_ball(elongation: float) -> None:
    weight, _ = lesion_fields(replace(BALL, elongation=elongation), AXES, (0, 0, 0))
    assert (weight > 0.5).sum() == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.02)


def test_elongation_points_along_the_direction() -> None:
    weight, _ = lesion_fields(replace(BALL, elongation=2.0), AXES, (0, 0, 0))
    extent = np.ptp(np.argwhere(weight > 0.5), axis=0)
    assert extent[0] / extent[1] == pytest.approx(2.0, rel=0.1)
    assert extent[1] == extent[2]


def test_edge_width() -> None:
    fine = [np.arange(-30, 30, 0.05), np.array([-1.0, 0.0, 1.0]), np.array([-1.0, 0.0, 1.0])]
    weight = lesion_fields(BALL, fine, (0, 0, 0))[0][600:, 1, 1]
    inside, outside = (fine[0][600:][np.argmin(np.abs(weight - level))] for level in (0.9, 0.1))
    assert outside - inside == pytest.approx(4.0, abs=0.1)


def test_texture_has_the_stated_spread_around_the_contrast() -> None:
    _, contrast = lesion_fields(replace(BALL, texture_hu=8.0), AXES, (0, 0, 0))
    assert contrast.mean() == pytest.approx(-40, abs=1.5)
    assert contrast.std() == pytest.approx(8, rel=0.15)


def test_a_rim_is_brighter_than_the_center() -> None:
    _, contrast = lesion_fields(replace(BALL, edge_mm=1.0, rim_mm=4.0, rim_hu=5.0), AXES, (0, 0, 0))
    assert contrast[40, 40, 40] == pytest.approx(-40, abs=0.1)
    assert contrast[40, 40, 40 + 13] == pytest.approx(5, abs=0.5)


def test_nothing_beyond_its_reach() -> None:
    lesion = draw_lesion(LESION_TYPES["pancreas tumor"], "portal", np.random.default_rng(3))
    weight, _ = lesion_fields(lesion, [np.arange(-90, 91, 2.0)] * 3, (0, 0, 0))
    distance = np.sqrt(sum(a**2 for a in np.meshgrid(*[np.arange(-90, 91, 2.0)] * 3, indexing="ij")))
    assert not weight[distance > lesion.reach_mm].any()
    assert weight.max() > 0.9


def test_pancreas_and_stomach_are_the_final_types() -> None:
    assert [t.name for t in of_role(FINAL)] == ["pancreas tumor", "stomach tumor"]
