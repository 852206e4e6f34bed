"""Label map → what each query should find, on the device; and which classes a case annotates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor

from zept_nnunet.declarations import annotated_for
from zept_nnunet.names import normalize_name
from zept_nnunet.taxonomy import Taxonomy


@dataclass(frozen=True)
class Targets:
    """Boolean targets of one scale."""

    support: Tensor  # (B, Q, *): the organ with its tumors
    healthy: Tensor  # (B, Q, *): the organ without them
    tumor: Tensor  # (B, U, *)
    abnormal: Tensor  # (B, Q, *): the organ's tumors and synthetic anomalies
    is_valid: Tensor | None  # (B, 1, *): False where the label is "ignore"; None without an ignore label


def anomaly_labels(taxonomy: Taxonomy, organs: Iterable[str]) -> dict[int, int]:
    """Organ label → a label of its synthetic anomalies, beyond all labels that a file can hold."""
    taken = [c.label for c in taxonomy.classes] + [taxonomy.ignore_label or 0]
    labels = {o.name: o.label for o in taxonomy.organs}
    return {labels[name]: max(taken) + 1 + i for i, name in enumerate(organs)}


def make_targets(
    label_map: Tensor,
    taxonomy: Taxonomy,
    organs_include_tumors: bool = False,
    anomalies: Mapping[int, int] | None = None,
) -> Targets:
    """Expand an integer label map (B, 1, *).

    `organs_include_tumors`: the healthy target holds tumors too, as in the authors' code.
    `anomalies`: as from `anomaly_labels`; like a tumor an anomaly belongs to its organ and is not healthy.
    """
    anomalies = anomalies or {}
    label_map = label_map.round() if label_map.is_floating_point() else label_map
    healthy = _equals(label_map, [o.label for o in taxonomy.organs])
    tumor = _equals(label_map, [t.label for t in taxonomy.tumors])
    support = healthy.clone()
    for k, organs in enumerate(taxonomy.host_indices()):
        owner = _nearest_host(healthy[:, list(organs)]) if len(organs) > 1 else None
        for position, i in enumerate(organs):
            in_this_host = tumor[:, k] if owner is None else tumor[:, k] & (owner == position)
            support[:, i] |= in_this_host
    organ_labels = [o.label for o in taxonomy.organs]
    for organ, value in anomalies.items():
        support[:, organ_labels.index(organ)] |= label_map[:, 0] == value
    is_valid = None if taxonomy.ignore_label is None else label_map != taxonomy.ignore_label
    return Targets(support, support if organs_include_tumors else healthy, tumor, support & ~healthy, is_valid)


def _nearest_host(healthy: Tensor, grid: int = 12) -> Tensor:
    """Which of several hosts is nearest: bool (B, H, *) → index (B, *). A kidney tumor belongs to one kidney.

    Found on a coarse grid of the patch, by how far each host's tissue reaches after repeated blurring.
    """
    size = [min(grid, n) for n in healthy.shape[2:]]
    blur = F.avg_pool3d if healthy.ndim == 5 else F.avg_pool2d
    reach = F.interpolate(healthy.float(), size, mode="area")  # adaptive average pooling
    for _ in range(max(size)):
        # padded by hand: pooling refuses an axis of fewer than 3 voxels, padding or not
        reach = reach + 1e-2 * blur(F.pad(reach, (1, 1) * (reach.ndim - 2)), 3, stride=1)
    return F.interpolate(reach.argmax(1, keepdim=True).float(), healthy.shape[2:], mode="nearest")[:, 0]


def _equals(label_map: Tensor, labels: list[int]) -> Tensor:
    values = torch.tensor(labels, device=label_map.device, dtype=label_map.dtype)
    return label_map == values.view(1, -1, *[1] * (label_map.ndim - 2))


class Annotations:
    """Which classes a case labels, by patterns of case identifiers (`zept.annotated` in dataset.json)."""

    def __init__(self, taxonomy: Taxonomy, patterns: Mapping[str, Iterable[str]]):
        self.names = [c.name for c in taxonomy.classes]
        self._labels = [c.label for c in taxonomy.classes]
        self._patterns = {pattern: tuple(names) for pattern, names in patterns.items()}

    @property
    def is_partial(self) -> bool:
        """Whether any pattern is given."""
        return bool(self._patterns)

    def unmatched(self, cases: Iterable[str]) -> list[str]:
        """The patterns that match none of these cases."""
        cases = list(cases)
        return [pattern for pattern in self._patterns if not any(fnmatchcase(case, pattern) for case in cases)]

    def of_case(self, case: str) -> tuple[bool, ...]:
        """One bool per class, organs first. A case that matches no pattern labels every class.

        Raises:
            ZePTError: two patterns match the case and disagree.
        """
        named = annotated_for(case, self._patterns)
        if named is None:
            return (True,) * len(self.names)
        labeled = {normalize_name(name) for name in named}
        return tuple(normalize_name(name) in labeled for name in self.names)

    def labels_in(self, case: str) -> frozenset[int] | None:
        """Label values of the classes that a case labels; None: no pattern is given, so all."""
        if not self.is_partial:
            return None
        return frozenset(v for v, is_labeled in zip(self._labels, self.of_case(case), strict=True) if is_labeled)

    def of_batch(self, cases: Iterable[str]) -> Tensor:
        """bool (B, Q + U)."""
        return torch.tensor([self.of_case(str(c)) for c in cases], dtype=torch.bool).reshape(-1, len(self.names))
