"""Which array axis runs from left to right, and trainers that do not mirror along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import join, load_pickle
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from zept_nnunet.taxonomy import Taxonomy


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


class KeepsSides(nnUNetTrainer):
    """nnU-Net's trainer, which mirrors nothing that would swap left and right structures of its `taxonomy`."""

    taxonomy: Taxonomy

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, tuple[int, ...]]:
        """nnU-Net's, without the mirroring that would swap left and right structures."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if self.taxonomy.is_lateral:
            swapped = self._left_right_axes()
            mirror_axes = tuple(a for a in mirror_axes if a not in swapped)
            self.inference_allowed_mirroring_axes = mirror_axes or None
            self.print_to_log_file(f"left and right are told apart: mirroring only along axes {mirror_axes}")
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def _left_right_axes(self) -> set[int]:
        """The patch's axes along which left and right lie, over all cases; all axes where a file does not say."""
        dimensions = len(self.configuration_manager.patch_size)
        axes: set[int] = set()
        for case in self.dataset_class.get_identifiers(self.preprocessed_dataset_folder):
            properties = load_pickle(join(self.preprocessed_dataset_folder, case + ".pkl"))
            axis = left_right_axis(properties, self.plans_manager.transpose_forward)
            if axis is None:
                return set(range(dimensions))
            axes.add(axis - (3 - dimensions))  # 2D drops the first axis
        return axes
