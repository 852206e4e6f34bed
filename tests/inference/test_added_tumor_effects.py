"""What an added tumor changes in what a model reports, and what it leaves (docs/method.md, "What an added tumor
changes").
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import zept_nnunet.trainers
from tests.inference.model_folder import make_model_folder
from tests.network.narrow import TWO_KIDNEYS, narrow_block, randomize
from tests.small_plans import DATASET_JSON, make_network, make_plans
from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.add_tumor import TumorRequest, add_tumors, extend_dataset_json
from zept_nnunet.inference.predict import _NetworkWithScores
from zept_nnunet.network.heads import at_thresholds
from zept_nnunet.network.zept import ZePT
from zept_nnunet.plans_block import add_tumor_to_block, build_block

TOLERANCE = 1e-5  # log-odds: attention sums over another number of queries
ADDED = 7  # its label and its channel
ORGANS = slice(1, 5)  # channels
SPLEEN = 4
REGIONS: dict[str, Any] = {
    **DATASET_JSON,
    "labels": {"background": 0, "liver": [1, 2], "liver tumor": 2, "spleen": 3},
    "regions_class_order": [1, 2, 3],
}


def predictor(block: dict[str, Any], weights: ZePT | None = None) -> ZePT:
    """Without deep supervision; every part has left its starting point."""
    network = randomize(make_network(2, block=block, deep_supervision=False)).eval()
    if weights is not None:
        network.load_state_dict(weights.state_dict())
    return network


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def grown() -> dict[str, Any]:
    return add_tumor_to_block(narrow_block(), "spleen tumor", ("spleen",), ADDED)


@pytest.fixture(scope="module")
def models(grown: dict[str, Any]) -> tuple[ZePT, ZePT]:
    """Before and after a tumor of the spleen was added."""
    before = predictor(narrow_block())
    return before, predictor(grown, before)


@pytest.fixture(scope="module")
def logits(models: tuple[ZePT, ZePT], image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return models[0](image), models[1](image)


def manager(dataset_json: dict[str, Any]) -> LabelManager:
    return PlansManager(make_plans(2)).get_label_manager(dataset_json)


PLAIN = {**DATASET_JSON, "labels": TWO_KIDNEYS}
PLAIN_PLUS = {**PLAIN, "labels": {**TWO_KIDNEYS, "spleen tumor": ADDED}}


def decode(dataset_json: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """(B, heads, *) → labels (B, *), by nnU-Net."""
    labels = manager(dataset_json)
    return torch.stack([torch.as_tensor(labels.convert_logits_to_segmentation(z)) for z in logits])


def assert_equal_to_rounding(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------------- logits
def test_logits_of_organs_and_of_trained_tumors_stay(
    models: tuple[ZePT, ZePT], image: torch.Tensor, logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    old, new = logits
    assert new.shape[1] == old.shape[1] + 1 and old[:, ORGANS].std() > 1
    others = [c for c in range(ADDED) if c != SPLEEN]
    assert_equal_to_rounding(new[:, others], old[:, others])
    with torch.no_grad():
        scores = [m.forward_scores(image, with_prompts=True) for m in models]
    for name in ("support", "anomaly", "prompts"):
        assert_equal_to_rounding(scores[1][name], scores[0][name])
    assert_equal_to_rounding(scores[1]["tumor_logits"][:, :-1], scores[0]["tumor_logits"])


def test_its_hosts_channel_is_at_most_as_sure_as_it_is_unsure(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    old, new = logits
    lowered = torch.minimum(old[:, SPLEEN], -new[:, ADDED])
    assert (lowered < old[:, SPLEEN]).any() and (lowered == old[:, SPLEEN]).any()
    assert_equal_to_rounding(new[:, SPLEEN], lowered)


def test_tumors_are_added_in_any_order(image: torch.Tensor) -> None:
    """None of them sees another."""
    trained = narrow_block()
    base = predictor(trained)
    requests = [("spleen tumor", ("spleen",)), ("abdominal mass", ("liver", "spleen"))]
    found = []
    for order in (requests, requests[::-1]):
        block = trained
        for i, (name, hosts) in enumerate(order):
            block = add_tumor_to_block(block, name, hosts, ADDED + i)
        with torch.no_grad():
            found.append(predictor(block, base)(image))
    assert_equal_to_rounding(found[1], found[0][:, [*range(ADDED), ADDED + 1, ADDED]])
    assert (found[0][:, ADDED] - found[0][:, ADDED + 1]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------- labels
def test_a_label_stays_or_becomes_the_added_tumors(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Its host's may also become another's, which is almost as sure."""
    old, new = logits
    before, after = decode(PLAIN, old), decode(PLAIN_PLUS, new)
    first, second = old.topk(2, 1).values.unbind(1)
    rival = new[:, :ADDED].amax(1)  # background is among them, with a logit of 0
    is_tied = old[:, 2] == old[:, 3]  # both kidneys, lowered by a trained tumor of both
    is_clear = (first - second > 1e-3) & ((new[:, ADDED] - rival).abs() > 1e-3)
    assert is_clear[~is_tied].float().mean() > 0.98
    wins = new[:, ADDED] > rival
    assert torch.equal((after == ADDED)[is_clear], wins[is_clear])
    assert (before[~wins & is_clear & (after != before)] == SPLEEN).all()
    assert not ((before == SPLEEN) & (after == 0)).any()
    assert wins.any() and len(before[wins].unique()) > 1


def test_on_a_tie_the_class_that_was_there_before_wins() -> None:
    z = torch.zeros(1, 8, 1, 2)
    z[:, SPLEEN, :, 1] = z[:, ADDED, :, 1] = 3.0  # the first voxel: 0 against background
    assert decode(PLAIN_PLUS, z).flatten().tolist() == [0, SPLEEN]


@pytest.mark.parametrize(("tumor_first", "wanted"), [(True, ADDED), (False, SPLEEN)])
def test_its_map_above_one_half_wins_against_its_host_however_sure_that_is(
    grown: dict[str, Any], tumor_first: bool, wanted: int
) -> None:
    """Its host never learned what this tumor looks like. Without `tumor_first` the stronger of both wins."""
    block = deepcopy(grown)
    block["decoder"]["tumor_first"] = tumor_first
    healthy, tumors = torch.full((1, 4, 1, 2), -5.0), torch.full((1, 3, 1, 2), -5.0)
    healthy[:, SPLEEN - 1] = 3.0
    tumors[:, -1, :, 0], tumors[:, -1, :, 1] = 0.5, -0.5
    network = predictor(block)
    z = network.to_channels(healthy, tumors, network.thresholds)
    assert decode(PLAIN_PLUS, z).flatten().tolist() == [wanted, SPLEEN]


def test_a_stock_prediction_changes_only_to_the_added_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over windows and folds, whose logits nnU-Net averages in half precision."""
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(zept_nnunet.trainers.__path__[0])))
    before = make_model_folder(tmp_path)
    after = add_tumors(before, [TumorRequest("pancreas tumor", ("pancreas",))]).folder
    image = torch.randn(1, 18, 26, 16, generator=torch.Generator().manual_seed(0))
    found, labels = [], []
    for folder in (before, after):
        stock = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
        stock.initialize_from_trained_model_folder(str(folder), (0, 1))
        found.append(stock.predict_logits_from_preprocessed_data(image).float())
        labels.append(torch.as_tensor(stock.label_manager.convert_logits_to_segmentation(found[-1])))
    (host,) = (c for c, name in enumerate(stock.dataset_json["labels"]) if name == "pancreas")
    others = [c for c in range(6) if c != host]
    torch.testing.assert_close(found[1][others], found[0][others], rtol=2e-3, atol=2e-3)  # one unit in the last place
    score = found[1][-1]
    assert (found[1][host] <= torch.minimum(found[0][host], -score) + 0.01).all()
    is_sure = found[0].topk(2, 0).values.diff(dim=0).abs()[0] > 0.01
    changed = is_sure & (labels[1] != labels[0])
    assert (labels[1][changed] == 6).any() and (labels[0][changed & (labels[1] != 6)] == host).all()
    assert (labels[1][(score > 0.01) & (score > found[1][others].amax(0) + 0.01)] == 6).all()


# ---------------------------------------------------------------------------------------------------- regions
def test_the_added_region_is_painted_over_the_others_and_is_in_none(image: torch.Tensor) -> None:
    block = build_block(deepcopy(REGIONS), settings={"width": 16, "heads": 4})
    before = predictor(block)
    after = predictor(add_tumor_to_block(block, "liver cyst", ("liver",), 4), before)
    plus = deepcopy(REGIONS)
    extend_dataset_json(plus, TumorRequest("liver cyst", ("liver",), label=4))
    with torch.no_grad():
        old, new = before(image), after(image)
    assert_equal_to_rounding(new[:, :3], old)  # the liver's region holds its trained tumor, not this one
    labels = [decode(d, z) for d, z in ((REGIONS, old), (plus, new))]
    is_clear = (new.abs() > 1e-3).all(1)
    painted = new[:, 3] > 0
    assert torch.equal(labels[1][~painted & is_clear], labels[0][~painted & is_clear])
    assert (labels[1][painted & is_clear] == 4).all()
    weaker = painted & is_clear & (old.amax(1) > new[:, 3])
    assert weaker.any()  # it wins by its place in the order, not by its logit


# ---------------------------------------------------------------------------------------------------- thresholds
def test_a_threshold_lowers_its_hosts_alone_and_no_score(
    models: tuple[ZePT, ZePT], grown: dict[str, Any], image: torch.Tensor, logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    threshold = -1.5
    calibrated = predictor({**grown, "thresholds": {"spleen tumor": {"logit": threshold}}}, models[0])
    with torch.no_grad():
        z, scores = calibrated(image), calibrated.forward_scores(image)["tumor_logits"]
        assert torch.equal(scores, models[1].forward_scores(image)["tumor_logits"])
    new = logits[1]
    margin = new[:, ADDED] - threshold
    others = [c for c in range(ADDED) if c != SPLEEN]
    assert torch.equal(z[:, others], new[:, others])
    assert_equal_to_rounding(z[:, ADDED], margin)
    assert_equal_to_rounding(z[:, SPLEEN], torch.minimum(new[:, SPLEEN], -margin))
    labels = decode(PLAIN_PLUS, z)
    reported = (labels == ADDED) & (margin > 1e-3)
    assert reported.any() and (new[:, SPLEEN][reported] > new[:, ADDED][reported]).any()  # its host was stronger
    assert not (labels == SPLEEN)[margin > 1e-3].any()


def test_below_its_threshold_a_host_may_lose_a_voxel_to_a_class_that_is_sure_as_well() -> None:
    """It stays above background, no higher than the threshold is far."""
    organs, tumor = torch.tensor([[[5.0], [2.0]]]), torch.tensor([[[-3.0]]])
    for threshold, wanted in ((None, 0), (1.0, 0), (-2.0, 1)):  # at −2 the first organ is capped at 1
        healthy, _ = at_thresholds(organs, tumor, ((0,),), [threshold])
        assert healthy.argmax(1).item() == wanted and (healthy > 0).all()


def test_a_threshold_of_a_tumor_without_hosts_lowers_every_organ() -> None:
    organs, tumor = torch.tensor([[[5.0], [2.0]]]), torch.tensor([[[3.0]]])
    healthy, shifted = at_thresholds(organs, tumor, ((),), [1.0])
    assert healthy.flatten().tolist() == [-2.0, -2.0] and shifted.item() == 2.0


# ---------------------------------------------------------------------------------------------------- what follows
def test_probabilities_share_with_the_added_tumor_and_those_of_regions_do_not() -> None:
    z = torch.tensor([0.0, 2.0, -1.0, -5.0])[:, None, None]
    plus = {**REGIONS, "labels": {**REGIONS["labels"], "cyst": 4}, "regions_class_order": [1, 2, 3, 4]}
    plain = {**DATASET_JSON, "labels": {"background": 0, "liver": 1, "spleen": 2, "liver tumor": 3}}
    before = manager(plain).apply_inference_nonlin(z)
    more = {**plain, "labels": {**plain["labels"], "cyst": 4}}
    after = manager(more).apply_inference_nonlin(torch.cat((z, torch.full((1, 1, 1), 2.0))))
    assert (after[:4] < 0.6 * before).all()
    torch.testing.assert_close(after[:4] / after[:4].sum(), before / before.sum())
    regions = [manager(d).apply_inference_nonlin(z[: len(d["labels"]) - 1]) for d in (REGIONS, plus)]
    assert torch.equal(regions[1][:3], regions[0])


def test_in_an_ensemble_of_configurations_a_label_can_change_between_classes_that_were_there() -> None:
    """nnUNetv2_ensemble averages probabilities: one model spends some of its on the added tumor, which loses."""
    labels = {"background": 0, "liver": 1, "spleen": 2}
    one, other = torch.tensor([0.0, 2.0, -5.0]), torch.tensor([0.0, -5.0, 1.0])
    plain, plus = ({**DATASET_JSON, "labels": d} for d in (labels, {**labels, "cyst": 3}))

    def ensemble(dataset_json: dict[str, Any], *members: torch.Tensor) -> int:
        probabilities = [manager(dataset_json).apply_inference_nonlin(z[:, None, None]) for z in members]
        mean = (sum(probabilities) / len(members)).numpy()  # type: ignore[union-attr]
        return int(manager(dataset_json).convert_probabilities_to_segmentation(mean).item())

    with_added = torch.cat((one, torch.tensor([2.5]))), torch.cat((other, torch.tensor([-9.0])))
    assert ensemble(plain, one, other) == 1
    assert ensemble(plus, *with_added) == 2
    folds = [sum(members) / 2 for members in ((one, other), with_added)]  # of which logits are averaged
    assert [decode(d, z[None, :, None, None]).item() for d, z in zip((plain, plus), folds, strict=True)] == [0, 0]


def test_postprocessing_may_take_what_an_added_tumor_cuts_off() -> None:
    """It was determined on the trained labels, to which the added one is background."""
    segmentation = np.zeros((1, 1, 8), dtype=np.uint8)
    segmentation[..., 1:7] = 1
    keep_largest = {"labels_or_regions": [1, 2]}
    untouched = remove_all_but_largest_component_from_segmentation(segmentation, **keep_largest)
    assert np.array_equal(untouched, segmentation)
    segmentation[..., 5] = ADDED
    after = remove_all_but_largest_component_from_segmentation(segmentation, **keep_largest)
    assert after.flatten().tolist() == [0, 1, 1, 1, 1, ADDED, 0, 0]


def test_anomaly_maps_and_prompts_gain_those_of_the_added_tumors_host(
    models: tuple[ZePT, ZePT], image: torch.Tensor
) -> None:
    before, after = (_NetworkWithScores(m, True, True) for m in models)
    assert before.host_names == ("liver", "left kidney", "right kidney")
    assert after.host_names == (*before.host_names, "spleen") == after.prompt_names
    with torch.no_grad():
        old, new = before(image), after(image)
    for start, number in ((7, 2), (9, 3), (12, 3)):  # tumors, anomaly maps, prompts, after as many new ones
        added = 1 + (start > 7) + (start > 9)
        assert_equal_to_rounding(new[:, start + added : start + added + number], old[:, start : start + number])


# ---------------------------------------------------------------------------------------------------- other settings
def learned_block() -> dict[str, Any]:
    return build_block(deepcopy(DATASET_JSON), settings={"queries": "learned", "width": 16, "heads": 4})


def test_with_learned_queries_words_say_nothing_and_a_host_takes_one_added_tumor(image: torch.Tensor) -> None:
    block = learned_block()
    base = predictor(block)
    found = []
    for text in ("a dark mass", "a bright cyst with a thin wall"):
        grown = add_tumor_to_block(block, "pancreas tumor", ("pancreas",), 6, text)
        with torch.no_grad():
            found.append(predictor(grown, base)(image))
    assert torch.equal(*found)
    with torch.no_grad():
        assert_equal_to_rounding(found[0][:, [0, 1, 2, 4, 5]], base(image)[:, [0, 1, 2, 4, 5]])  # all but its host's
    with pytest.raises(ZePTError, match="'pancreas tumor' was added in the same host"):
        add_tumor_to_block(grown, "pancreas cyst", ("pancreas",), 7)
    with pytest.raises(ZePTError, match="learned one query per class"):
        add_tumor_to_block(block, "liver cyst", ("liver",), 6)


def test_the_published_score_does_not_lower_the_host_of_an_added_tumor(image: torch.Tensor) -> None:
    """It lowers organs that had a tumor, or a query for abnormal tissue, in training: then and at inference alike."""
    settings = {"score": "minmax", "score_range": "patch", "relative": False, "prompts": "organs"}
    settings |= {"score_in_maps": True, "width": 16, "heads": 4, "tumor_first": False}
    for synthetic in (True, False):
        block = build_block(deepcopy(DATASET_JSON), settings=settings | {"synthetic_anomalies": synthetic})
        before = predictor(block)
        after = predictor(add_tumor_to_block(block, "pancreas tumor", ("pancreas",), 6), before)
        with torch.no_grad():
            old, new = before(image), after(image)
            assert_equal_to_rounding(new[:, :6], old)
            before.decoder.deep_supervision = True
            trained = before(image)
        pancreas = 2
        assert_equal_to_rounding(old[:, 1 + pancreas], trained.healthy[0][:, pancreas])
        lowered = trained.support[0][:, pancreas] - trained.healthy[0][:, pancreas]
        assert (lowered.max() > 0.9) == synthetic
