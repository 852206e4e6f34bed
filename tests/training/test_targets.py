from __future__ import annotations

import pytest
import torch

from zept_nnunet.errors import ZePTError
from zept_nnunet.taxonomy import Taxonomy
from zept_nnunet.training.targets import Annotations, anomaly_labels, make_targets

KIDNEYS = {"left kidney": 2, "right kidney": 3}
PLAIN = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, **KIDNEYS, "liver tumor": 4, "kidney tumor": 5, "ignore": 6},
}


def test_support_holds_tumors_and_healthy_does_not() -> None:
    taxonomy = Taxonomy.from_dataset_json(PLAIN)
    labels = torch.tensor([[0, 1, 4, 2, 5, 6]]).view(1, 1, 1, 6)
    t = make_targets(labels, taxonomy)
    assert t.healthy[0, 0].int().tolist() == [[0, 1, 0, 0, 0, 0]]
    assert t.support[0, 0].int().tolist() == [[0, 1, 1, 0, 0, 0]]
    assert t.tumor[0, 0].int().tolist() == [[0, 0, 1, 0, 0, 0]]
    assert t.is_valid is not None and t.is_valid[0, 0].int().tolist() == [[1, 1, 1, 1, 1, 0]]
    paper = make_targets(labels, taxonomy, organs_include_tumors=True)
    assert torch.equal(paper.healthy, paper.support) and torch.equal(paper.abnormal, t.abnormal)
    assert t.abnormal[0, 0].int().tolist() == [[0, 0, 1, 0, 0, 0]]


def test_an_anomaly_belongs_to_its_organ_and_is_not_healthy() -> None:
    taxonomy = Taxonomy.from_dataset_json({**PLAIN, "labels": {**PLAIN["labels"], "spleen": 6, "ignore": 7}})  # type: ignore[dict-item]
    anomalies = anomaly_labels(taxonomy, ["spleen"])
    assert anomalies == {6: 8}  # beyond every label, the ignore label too
    t = make_targets(torch.tensor([[0, 6, 8, 4]]).view(1, 1, 1, 4), taxonomy, anomalies=anomalies)
    spleen = [o.name for o in taxonomy.organs].index("spleen")
    assert t.abnormal[0, spleen].int().tolist() == [[0, 0, 1, 0]]
    assert t.support[0, spleen].int().tolist() == [[0, 1, 1, 0]]
    assert t.healthy[0, spleen].int().tolist() == [[0, 1, 0, 0]]
    assert not make_targets(torch.zeros(1, 1, 1, 4), taxonomy).abnormal.any()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_kidney_tumor_belongs_to_the_nearest_kidney(dimensions: int) -> None:
    taxonomy = Taxonomy.from_dataset_json(PLAIN)
    labels = torch.zeros(1, 1, *[24] * dimensions, dtype=torch.int16)
    labels[..., 1:8] = 2
    labels[..., 5:8] = 5  # beside the left kidney
    labels[..., 16:23] = 3
    t = make_targets(labels, taxonomy)
    assert torch.equal(t.support[0, 1], (labels[0, 0] == 2) | (labels[0, 0] == 5))
    assert torch.equal(t.support[0, 2], labels[0, 0] == 3)


def test_annotations_by_pattern() -> None:
    taxonomy = Taxonomy.from_dataset_json(PLAIN)
    annotations = Annotations(taxonomy, {"lits_*": ["liver", "liver_tumor"], "kits_*": ["kidney tumor"]})
    assert annotations.of_case("lits_3") == (True, False, False, True, False)
    assert annotations.of_case("other") == (True,) * 5
    assert annotations.of_batch(["kits_1", "lits_1"]).int().tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 1, 0]]
    labels = [c.label for c in taxonomy.classes]
    assert annotations.labels_in("lits_3") == {labels[0], labels[3]} and annotations.labels_in("other") == set(labels)
    assert Annotations(taxonomy, {}).labels_in("lits_3") is None
    assert annotations.unmatched(["lits_1", "LiTS_2"]) == ["kits_*"]


def test_two_patterns_that_disagree_are_an_error() -> None:
    annotations = Annotations(Taxonomy.from_dataset_json(PLAIN), {"a*": ["liver"], "ab*": ["kidney tumor"]})
    assert annotations.of_case("ac")[0]
    with pytest.raises(ZePTError, match="a\\*"):
        annotations.of_case("abc")
