"""Foreground sampling that does not dilute tumors among organs."""

from __future__ import annotations

from typing import Any

import numpy as np

TUMOR_SHARE = 0.5
"""Of the patches that nnU-Net centers on foreground, the share that is centered on a tumor where the case has one."""


class TumorFavoringDataset:
    """A preprocessed dataset whose foreground locations are, half of the time, those of tumors alone.

    nnU-Net draws uniformly among the classes that a case holds: with 25 organs a tumor would be drawn once in 26 times.
    """

    def __init__(self, dataset: Any, tumor_labels: frozenset[int]):
        self.dataset = dataset
        self.tumor_labels = tumor_labels
        self.identifiers = dataset.identifiers

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        """As nnU-Net's datasets: data, segmentation, previous segmentation, properties."""
        data, seg, seg_prev, properties = self.dataset.load_case(identifier)
        locations = properties.get("class_locations") or {}
        tumors = {key: where for key, where in locations.items() if len(where) and self._is_tumor(key)}
        if tumors and np.random.uniform() < TUMOR_SHARE:
            # the key of all annotated voxels stays: nnU-Net needs it with an ignore label, and drops it otherwise
            keep = {key: where for key, where in locations.items() if isinstance(key, tuple) and -1 in key}
            properties = {**properties, "class_locations": {**tumors, **keep}}
        return data, seg, seg_prev, properties

    def _is_tumor(self, key: Any) -> bool:
        labels = key if isinstance(key, (tuple, list)) else (key,)
        return all(int(label) in self.tumor_labels for label in labels)
