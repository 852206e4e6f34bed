"""Foreground sampling that does not dilute tumors among organs, nor look for what a case does not label."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

TUMOR_SHARE = 0.5
"""Of the patches that nnU-Net centers on foreground, the share that is centered on a tumor where the case has one."""


class ForegroundDataset:
    """A preprocessed dataset whose foreground locations are, half of the time, those of tumors alone.

    nnU-Net draws uniformly among the classes that a case holds: with 25 organs a tumor would be drawn once in 26 times.
    A class that the case does not label is no foreground, though a few voxels of it may stand in the label map.
    """

    def __init__(
        self,
        dataset: Any,
        tumor_labels: Collection[int],
        labeled_in: Callable[[str], Collection[int] | None] | None = None,
    ):
        """
        Args:
            tumor_labels: of every tumor; none where tumors are not learned.
            labeled_in: case → label values of the classes that it labels, None: all; without it, all of every case.
        """
        self.dataset = dataset
        self.tumor_labels = frozenset(tumor_labels)
        self.labeled_in = labeled_in
        self.identifiers = dataset.identifiers

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        """As nnU-Net's datasets: data, segmentation, previous segmentation, properties."""
        data, seg, seg_prev, properties = self.dataset.load_case(identifier)
        locations = properties.get("class_locations") or {}
        # the key of all annotated voxels stays: nnU-Net needs it with an ignore label, and drops it otherwise
        keep = {key: where for key, where in locations.items() if -1 in _values(key)}
        classes = {key: where for key, where in locations.items() if key not in keep}
        labeled = None if self.labeled_in is None else self.labeled_in(identifier)
        if labeled is not None:
            classes = {key: where for key, where in classes.items() if _values(key) & set(labeled)}
        tumors = {key: where for key, where in classes.items() if len(where) and _values(key) <= self.tumor_labels}
        if tumors and np.random.uniform() < TUMOR_SHARE:
            classes = tumors
        if len(classes) + len(keep) < len(locations):
            properties = {**properties, "class_locations": {**classes, **keep}}
        return data, seg, seg_prev, properties


def _values(key: Any) -> set[int]:
    """Label values of a class or of a region, as nnU-Net keys them; -1 stands for the ignore label."""
    return {int(label) for label in (key if isinstance(key, (tuple, list)) else (key,))}
