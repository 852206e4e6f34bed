"""Every variant of the ablation trains and predicts, from plans that stand in a file."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from tests.network.narrow import TWO_KIDNEYS
from tests.small_plans import DATASET_JSON
from tests.small_trainer import enter_stage, make_batch, make_trainer
from zept_nnunet.losses import TERMS
from zept_nnunet.network.zept import ZePT
from zept_nnunet.plans_block import add_tumor_to_block, build_block
from zept_nnunet.training.trainer import ZePTTrainer

NARROW = {"width": 16, "heads": 4}


def ablation_variants() -> dict[str, dict[str, Any]]:
    """Name → settings, as benchmarks/ablation.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        variants: dict[str, dict[str, Any]] = importlib.import_module("ablation").VARIANTS
    for name in ("ablation", "zero_shot"):
        sys.modules.pop(name, None)
    return variants


VARIANTS = ablation_variants()
DIMENSIONS = [(name, 2 + i % 2) for i, name in enumerate(VARIANTS)]
"""2D and 3D in turn: what a switch does with the number of axes is tested with the networks."""


def predictor(trainer: ZePTTrainer, file: Path, added: bool) -> ZePT:
    """The trained weights in a network that is built as nnU-Net builds it for prediction, from plans.json alone."""
    plans = dict(trainer.plans_manager.plans)
    if added:
        plans["zept"] = add_tumor_to_block(plans["zept"], "spleen tumor", ("spleen",), 7)
    file.write_text(json.dumps(plans))
    manager = PlansManager(str(file))
    configuration = manager.get_configuration(trainer.configuration_name)
    heads = len(trainer.taxonomy.channels) + added
    network = trainer.build_network_architecture(manager, configuration, 1, heads, enable_deep_supervision=False)
    assert isinstance(network, ZePT)
    network.load_state_dict(trainer._zept().state_dict())
    return network.eval()


@pytest.mark.parametrize(("name", "dimensions"), DIMENSIONS)
def test_a_variant_of_the_ablation_trains_and_predicts(
    name: str, dimensions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    block = build_block({**DATASET_JSON, "labels": TWO_KIDNEYS}, settings=NARROW | VARIANTS[name])
    trainer = make_trainer(tmp_path, monkeypatch, dimensions, block)
    batch = make_batch(trainer)
    for stage in (1, 2):
        before = torch.nn.utils.parameters_to_vector(trainer._zept().parameters()).detach().clone()
        result = enter_stage(trainer, stage).train_step(batch)
        assert set(result) == {"loss", *TERMS} and all(np.isfinite(v) for v in result.values())
        after = torch.nn.utils.parameters_to_vector(trainer._zept().parameters()).detach()
        assert after.isfinite().all() and not torch.equal(before, after)
    wanted = {"organ_support", "organ_healthy", "tumor", "query_to_knowledge", "query_to_query"}
    wanted |= {"deviation"} if block["decoder"]["relative"] else set()
    wanted |= {"anomaly"} if block["anomalies"] else set()
    assert {term for term in TERMS if result[term] > 0} == wanted
    weights = {t: float(block["training"]["alignment"]) if t.startswith("query_to_") else 1.0 for t in TERMS}
    assert result["loss"] == pytest.approx(sum(weights[t] * result[t] for t in TERMS), rel=1e-5)

    network = predictor(trainer, tmp_path / "plans.json", added="spleen" in block["anomalies"].values())
    with torch.no_grad():
        logits, scores = network(batch["data"]), network.forward_scores(batch["data"], with_prompts=True)
    shape, channels = batch["data"].shape[2:], len(network.taxonomy.channels)
    assert logits.shape == (2, channels, *shape) and torch.equal(logits, scores["logits"])
    assert scores["tumor_logits"].shape == (2, channels - 5, *shape)
    assert {scores[n].shape for n in ("anomaly", "support", "prompts")} == {(2, 4, *shape)}
    assert all(map_.isfinite().all() for map_ in (logits, *scores.values()))
    foreground = logits[:, 1:].flatten(2)
    assert (foreground.std(-1) > 1e-3).all()  # no map is a constant
