"""The ablation benchmark covers every switch, each by settings that the plans accept."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import pytest

from tests.small_plans import DATASET_JSON
from zept_nnunet.plans_block import DECODER_SETTINGS, TRAINING_SETTINGS, build_block

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = {"width", "heads", "grouping_scales", "advanced_layers", "background_queries", "prompt_probability"}


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation  # type: ignore[import-not-found]

    yield ablation
    for name in ("ablation", "zero_shot"):
        sys.modules.pop(name, None)


def test_every_switch_has_a_variant_that_changes_it(ablation: ModuleType) -> None:
    default = build_block(deepcopy(DATASET_JSON))
    switched = set()
    for name, settings in ablation.VARIANTS.items():
        block = build_block(deepcopy(DATASET_JSON), settings=settings)
        changed = {k for part in ("decoder", "training") for k, v in block[part].items() if v != default[part][k]}
        assert changed == set(settings), name
        switched |= changed
    switches = set(DECODER_SETTINGS["zept"]) | set(TRAINING_SETTINGS["zept"])
    # the published score is more than a switch: its maps have no healthy logit (ZePTTrainerPaper)
    assert switches - SIZES - {"score"} == switched - SIZES
