from __future__ import annotations

import numpy as np
import pytest

from zept_nnunet.training.orientation import left_right_axis

AXIAL = (1.0, 0, 0, 0, 1, 0, 0, 0, 1)
SAGITTAL = (0.0, 0, 1, 1, 0, 0, 0, 1, 0)  # physical left–right runs along the file's third index


@pytest.mark.parametrize(
    ("direction", "transpose", "axis"),
    [(AXIAL, (0, 1, 2), 2), (AXIAL, (2, 0, 1), 0), (SAGITTAL, (0, 1, 2), 0), (SAGITTAL, (1, 0, 2), 1)],
)
def test_axis_follows_direction_and_transpose(direction: tuple, transpose: tuple, axis: int) -> None:
    assert left_right_axis({"sitk_stuff": {"direction": direction}}, transpose) == axis


def test_nibabel_affine_and_unknown_reader() -> None:
    affine = np.diag([-0.8, 0.8, 3.0, 1.0])
    assert left_right_axis({"nibabel_stuff": {"original_affine": affine}}, (0, 1, 2)) == 2
    assert left_right_axis({"spacing": (1, 1, 1)}, (0, 1, 2)) is None
