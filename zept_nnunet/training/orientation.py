"""Which array axis runs from left to right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def left_right_axis(properties: Mapping[str, Any], transpose_forward: Sequence[int]) -> int | None:
    """Axis (0, 1, 2) of the preprocessed array along which left and right lie; None where the file does not say.

    `properties` are nnU-Net's, as its SimpleITK and nibabel readers write them.
    """
    if "sitk_stuff" in properties:  # direction: physical axis × index axis; SimpleITK arrays are (z, y, x)
        direction = np.asarray(properties["sitk_stuff"]["direction"], dtype=float)
        size = round(len(direction) ** 0.5)
        if size < 3:
            return None
        index_axis = int(np.abs(direction.reshape(size, size)[0]).argmax())
    elif "nibabel_stuff" in properties:  # nnU-Net transposes nibabel's (x, y, z) to (z, y, x) too
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=float)[:3, :3]
        index_axis = int(np.abs(affine[0] / np.linalg.norm(affine, axis=0)).argmax())
    else:
        return None
    return list(transpose_forward).index(2 - index_axis)
