"""The any-tumor network with relative evidence."""

from __future__ import annotations

import pytest
import torch

from tests.small_plans import make_plans_manager
from zept_nnunet.network.any_tumor_rel import AnyTumorRelative, organ_support
from zept_nnunet.training.baseline_trainers import nnUNetTrainerAnyTumorRel, nnUNetTrainerBaseline


def make(dimensions: int = 3, deep_supervision: bool = True, network: str = "PlainConvUNet") -> AnyTumorRelative:
    manager, name = make_plans_manager(dimensions, network_class=network)
    configuration = manager.get_configuration(name)
    manager.plans["foreground_intensity_properties_per_channel"] = {
        "0": {"mean": 50.0, "std": 40.0, "percentile_00_5": -150.0, "percentile_99_5": 250.0}
    }
    torch.manual_seed(0)
    return nnUNetTrainerAnyTumorRel.build_network_architecture(manager, configuration, 1, 5, deep_supervision)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_shapes_and_a_gradient_for_every_parameter(dimensions: int, network: str) -> None:
    model = make(dimensions, network=network)
    for parameter in model.relative.layers[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 1, *[16, 24, 16][:dimensions])
    outputs = model(x)
    assert [o.shape[1] for o in outputs] == [5] * 3 and outputs[0].shape[2:] == x.shape[2:]
    sum(o.square().mean() for o in outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, g in gradients.items() if g is None] == []
    # residual blocks start as the identity: nothing reaches their convolutions yet
    learning = {n: g for n, g in gradients.items() if n.startswith(("relative.", "decoder.")) and n.endswith("weight")}
    assert "relative.features.project.weight" in learning and "decoder.seg_layers.2.layer.weight" in learning
    assert [n for n, g in learning.items() if "encoder" not in n and not g.abs().sum() > 0] == []


def test_the_same_weights_without_deep_supervision_and_at_first_the_plain_network() -> None:
    model, plain = make(), make(deep_supervision=False)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 1, 16, 24, 16)
    torch.testing.assert_close(plain(x), model(x)[0])
    head = model.decoder.seg_layers[-1]
    raw = model.decoder(model.encoder(x))[0][:, : head.layer.out_channels]
    torch.testing.assert_close(raw, model(x)[0])


def test_evidence_counts_inside_the_organs_alone() -> None:
    logits = torch.tensor([0.0, 4.0, -4.0, 9.0]).view(1, 4, 1, 1, 1)
    support = organ_support(logits).flatten()
    z = torch.tensor([0.0, 4.0, -4.0], dtype=torch.float64)
    p = torch.softmax(z, 0)[1:]
    torch.testing.assert_close(support.double(), torch.log(p / (1 - p)), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(organ_support(logits * 1000)).all()


def test_the_comparison_trainers_are_real_subclasses() -> None:
    assert issubclass(nnUNetTrainerAnyTumorRel, nnUNetTrainerBaseline)
    names = [c.__name__ for c in nnUNetTrainerBaseline.__mro__]
    assert names.index("Budgeted") < names.index("_Comparable") < names.index("nnUNetTrainer")
