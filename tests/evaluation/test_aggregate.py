"""Aggregates by hand, and the bootstrap: reproducible, paired, over seeds and cases."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from zept_nnunet.evaluation.aggregate import Draws, Estimate, aggregate, difference, group
from zept_nnunet.evaluation.case import CaseResult, ClassResult
from zept_nnunet.evaluation.classes import EvaluatedClass
from zept_nnunet.evaluation.froc import Candidates
from zept_nnunet.evaluation.lesions import LesionCounts

NAN = float("nan")
TUMOR = EvaluatedClass("tumor", True, True, (1,), (1,), (1, 2))


def case(name: str, dsc: float, counts: tuple[int, int, int], max_score: float, healthy: bool) -> CaseResult:
    values = {("volume", "dsc"): dsc, ("volume", "max_score"): max_score}
    candidates = Candidates(np.array([9], dtype=np.uint16), np.array([counts[2]]), counts[0])
    entry = ClassResult(not healthy, healthy, values, {"": LesionCounts(*counts)}, {}, candidates)
    return CaseResult(name, {"tumor": entry})


def seeds() -> list[list[CaseResult]]:
    return [
        [
            case("a", 0.5, (2, 3, 1), 3.0, False),
            case("b", 0.9, (1, 1, 1), 1.0, False),
            case("c", NAN, (0, 2, 0), 2.0, True),
            case("d", NAN, (0, 0, 0), 0.5, True),
        ],
        [
            case("a", 0.7, (2, 2, 2), 3.0, False),
            case("b", 0.8, (1, 4, 0), 2.5, False),
            case("c", NAN, (0, 0, 0), 2.0, True),
            case("d", NAN, (0, 0, 0), 0.5, True),
        ],
    ]


def test_values_by_hand() -> None:
    found = {metric: e for (_, metric), e in aggregate(seeds(), TUMOR, Draws.make(50, 2, 4, 0)).items()}
    assert found["dsc"].value == pytest.approx((0.5 + 0.9 + 0.7 + 0.8) / 4)  # healthy cases are no Dice of 1
    assert found["dsc"].cases == 2
    assert found["lesion_recall"].value == pytest.approx((1 + 1 + 2 + 0) / 6)
    assert found["lesion_precision"].value == pytest.approx(4 / 12)
    assert found["false_positives_per_scan"].value == pytest.approx(8 / 8)
    assert found["false_positives_per_healthy_scan"].value == pytest.approx(2 / 4)
    assert found["false_positives_per_healthy_scan"].cases == 2
    truth = [1, 1, 0, 0]
    expected = np.mean([roc_auc_score(truth, [3, 1, 2, 0.5]), roc_auc_score(truth, [3, 2.5, 2, 0.5])])
    assert found["patient_auroc"].value == pytest.approx(expected)


def test_a_sample_that_draws_everything_once_is_the_value() -> None:
    draws = Draws(np.ones((1, 2)), np.ones((1, 4)))
    for key, estimate in aggregate(seeds(), TUMOR, draws).items():
        assert estimate.samples[0] == pytest.approx(estimate.value), key


def test_a_sample_equals_the_drawn_cases_evaluated_anew() -> None:
    """Seed 1 twice, seed 0 never; case a three times, case c once."""
    draws = Draws(np.array([[0.0, 2.0]]), np.array([[3.0, 0.0, 1.0, 0.0]]))
    a, _, c, _ = seeds()[1]
    expected = aggregate([[a, a, a, c]], TUMOR, Draws.make(1, 1, 4, 0))
    for key, estimate in aggregate(seeds(), TUMOR, draws).items():
        assert estimate.samples[0] == pytest.approx(expected[key].value, nan_ok=True), key


def test_the_same_seed_gives_the_same_samples() -> None:
    def samples(seed: int) -> np.ndarray:
        return aggregate(seeds(), TUMOR, Draws.make(200, 2, 4, seed))["volume", "dsc"].samples

    np.testing.assert_array_equal(samples(1), samples(1))
    assert not np.array_equal(samples(1), samples(2), equal_nan=True)


def test_the_interval_is_that_of_the_percentiles() -> None:
    samples = np.append(np.arange(1001) / 1000, [NAN, np.inf])
    assert Estimate(0.5, samples, 3).interval() == pytest.approx((0.025, 0.975))
    assert np.isnan(Estimate(NAN, np.full(5, NAN), 4).interval()).all()
    assert np.isnan(Estimate(0.5, np.full(5, 0.5), 1).interval()).all()  # one case has no spread


def test_methods_share_the_cases_and_not_the_seeds() -> None:
    ours, theirs = Draws.make(100, 3, 9, 5, 0), Draws.make(100, 3, 9, 5, 1)
    np.testing.assert_array_equal(ours.cases, theirs.cases)
    assert (ours.seeds != theirs.seeds).any()
    assert (ours.cases.sum(axis=1) == 9).all() and (ours.seeds.sum(axis=1) == 3).all()


def test_pairing_narrows_the_interval_of_a_constant_gain() -> None:
    rng = np.random.default_rng(0)
    dice = rng.uniform(0.1, 0.8, size=30)
    names = [f"{i}" for i in range(30)]
    ours = [[case(n, d + 0.1, (1, 1, 1), 1.0, False) for n, d in zip(names, dice, strict=True)]]
    theirs = [[case(n, d, (1, 1, 1), 1.0, False) for n, d in zip(names, dice, strict=True)]]
    a, b = (aggregate(r, TUMOR, Draws.make(300, 1, 30, 0, i)) for i, r in enumerate((ours, theirs)))
    gain = difference(a, b)["volume", "dsc"]
    assert gain.value == pytest.approx(0.1) and gain.interval() == pytest.approx((0.1, 0.1))
    low, high = a["volume", "dsc"].interval()
    assert high - low > 0.05


def test_only_the_cases_of_a_stratum_count() -> None:
    found = aggregate(seeds(), TUMOR, Draws.make(10, 2, 4, 0), cases=frozenset({"b"}))
    assert found["volume", "dsc"].value == pytest.approx(0.85)
    assert found["volume", "lesion_recall"].value == pytest.approx(1 / 2)


def test_a_group_is_the_mean_over_classes() -> None:
    estimates = aggregate(seeds(), TUMOR, Draws.make(10, 2, 4, 0))
    nothing = {k: type(e)(NAN, np.full(10, NAN), 0) for k, e in estimates.items()}
    found = group([estimates, estimates, nothing])["volume", "dsc"]
    assert found.value == pytest.approx(estimates["volume", "dsc"].value)
    np.testing.assert_allclose(found.samples, estimates["volume", "dsc"].samples)


def test_a_case_that_failed_does_not_count() -> None:
    broken = CaseResult("a", {"tumor": ClassResult(True, False, {("volume", "dsc"): NAN})})
    results = [[broken, *seeds()[0][1:]]]
    found = aggregate(results, TUMOR, Draws.make(10, 1, 4, 0))
    assert found["volume", "dsc"].value == pytest.approx(0.9)
    assert found["volume", "lesion_recall"].value == 1.0
    assert found["volume", "froc_score"].cases == 3
