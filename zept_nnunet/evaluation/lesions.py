"""Lesions: connected components, and their one-to-one matching as panoptica defines it.

Kofler et al., "Panoptica: instance-wise evaluation of 3D semantic and instance segmentation maps" (2023):
26-connected components (cc3d); pairs are taken by descending intersection over union as long as it reaches the
threshold, and each component is taken once. panoptica itself cannot be a dependency: it wants numpy below 2.3 and
pandas below 3. The tests hold this module equal to its results.
"""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np

DEFAULT_MATCHING_IOU = 0.1
"""A detection counts from this overlap on, as in nnDetection (Baumgartner et al., MICCAI 2021) and PI-CAI."""


@dataclass(frozen=True)
class LesionCounts:
    """How many lesions the reference holds, how many were predicted, and how many of both match."""

    reference: int
    predicted: int
    matched: int

    @property
    def false_positives(self) -> int:
        return self.predicted - self.matched


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """(Z, Y, X) bool → its 26-connected components, 1 … n, and n."""
    labels, count = cc3d.connected_components(np.ascontiguousarray(mask).view(np.uint8), return_N=True)
    return labels, int(count)


def match_lesions(
    reference: np.ndarray, prediction: np.ndarray, matching_iou: float = DEFAULT_MATCHING_IOU
) -> LesionCounts:
    """Count and match the lesions of two masks (Z, Y, X) bool."""
    box = bounding_box(reference, prediction)
    if box is None:
        return LesionCounts(0, 0, 0)
    ours, n_ours = components(reference[box])
    theirs, n_theirs = components(prediction[box])
    both = (ours > 0) & (theirs > 0)
    pairs, intersections = np.unique(np.stack([ours[both], theirs[both]]).astype(np.int64), axis=1, return_counts=True)
    our_size = component_sizes(ours, n_ours)
    their_size = component_sizes(theirs, n_theirs)
    ious = intersections / (our_size[pairs[0]] + their_size[pairs[1]] - intersections)
    taken_ours: set[int] = set()
    taken_theirs: set[int] = set()
    for i in np.argsort(-ious, kind="stable"):
        r, p = int(pairs[0, i]), int(pairs[1, i])
        if ious[i] >= matching_iou and r not in taken_ours and p not in taken_theirs:
            taken_ours.add(r)
            taken_theirs.add(p)
    return LesionCounts(n_ours, n_theirs, len(taken_ours))


def component_sizes(labels: np.ndarray, count: int) -> np.ndarray:
    """(count + 1,) voxels of each component, counted slice by slice; entry 0 is the background."""
    sizes = np.zeros(count + 1, dtype=np.int64)
    for plane in labels:
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    return sizes


def bounding_box(*masks: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds every True of all masks (equal shapes); None where there is none."""
    box = []
    for axis in range(masks[0].ndim):
        others = tuple(a for a in range(masks[0].ndim) if a != axis)
        occupied = np.flatnonzero(np.logical_or.reduce([m.any(axis=others) for m in masks]))
        if not len(occupied):
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)
