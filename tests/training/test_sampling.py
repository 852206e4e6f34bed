"""What a training patch may be centered on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zept_nnunet.training.sampling import TUMOR_SHARE, ForegroundDataset

LOCATIONS = {key: np.zeros((0 if key == 4 else 5, 4)) for key in (1, 2, 3, 4, (-1, 1))}


def drawn(tumors: tuple[int, ...], labeled: tuple[int, ...] | None, locations: dict[Any, Any]) -> list[set[Any]]:
    """The classes that each of 400 loads offers."""
    properties = {"class_locations": locations, "spacing": 1}
    inner = SimpleNamespace(identifiers=["a"], load_case=lambda identifier: ("data", "seg", None, properties))
    dataset = ForegroundDataset(inner, tumors, lambda case: labeled)
    assert dataset.identifiers == ["a"]
    np.random.seed(0)
    loads = [dataset.load_case("a") for _ in range(400)]
    assert all(load[:3] == ("data", "seg", None) and load[3]["spacing"] == 1 for load in loads)
    assert properties["class_locations"] is locations and len(locations) == len(LOCATIONS)  # the case's own stay
    return [set(load[3]["class_locations"]) for load in loads]


def test_half_of_the_time_tumors_alone() -> None:
    offered = drawn((3, 4), None, LOCATIONS)
    share = np.mean([classes == {3, (-1, 1)} for classes in offered])
    assert share == pytest.approx(TUMOR_SHARE, abs=0.08)
    assert all(classes in ({3, (-1, 1)}, set(LOCATIONS)) for classes in offered)


def test_without_tumors_nothing_changes() -> None:
    assert all(classes == set(LOCATIONS) for classes in drawn((), None, LOCATIONS))


@pytest.mark.parametrize("tumors", [(), (3, 4)])
def test_what_the_case_does_not_label_is_no_foreground(tumors: tuple[int, ...]) -> None:
    """Stray voxels of classes 2 and 3 stand in the label map of a case that labels 1 and 4."""
    assert all(classes == {1, 4, (-1, 1)} for classes in drawn(tumors, (1, 4), LOCATIONS))


def test_regions_count_by_their_members() -> None:
    locations = {(1, 3): np.zeros((5, 4)), (3,): np.zeros((5, 4)), (2,): np.zeros((5, 4)), 4: [], (-1, 1, 2, 3): []}
    assert all(classes == {(1, 3), (-1, 1, 2, 3)} for classes in drawn((3,), (1,), locations))
    assert {(3,), (-1, 1, 2, 3)} in drawn((3,), None, locations)
