"""What the alignment compares with descriptions: the mean token where a class is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.small_plans import make_network
from zept_nnunet.losses import ZePTLoss
from zept_nnunet.network.zept import ZePT
from zept_nnunet.training.targets import Targets, make_targets


@torch.no_grad()
def test_embedding_equals_a_loop(dimensions: int, image: Tensor) -> None:
    network = make_network(dimensions).eval()
    output = network(image)
    scale = network.num_grouping - 1  # of the decoder's, coarse to fine
    features = network.decoder(network.encoder(image))[scale]
    tokens = network.token_norms[scale](network.to_tokens[scale](features.flatten(2).transpose(1, 2)))
    coarse = network._refine(image, network.decoder(network.encoder(image)), network.hosts).coarse[scale][0]
    maps = torch.cat((coarse, output.tumor[len(network.support_heads) - 1 - scale]), 1).flatten(2)
    found = torch.cat((output.organ_embedding, output.tumor_embedding), 1)
    for case in range(2):
        for c in range(5):
            total, count = torch.zeros(tokens.shape[-1]), 0.0
            for token, z in zip(tokens[case], maps[case, c], strict=True):
                share = 1 / (1 + float(torch.exp(-z)))
                total, count = total + share * token, count + share
            wanted = network.to_knowledge.weight @ (total / count) + network.to_knowledge.bias
            torch.testing.assert_close(found[case, c], wanted, rtol=0, atol=1e-5)


@dataclass
class Aligned:
    network: ZePT
    terms: dict[str, Tensor]


def align(network: ZePT, image: Tensor, label_map: Tensor) -> Tensor:
    """Both terms of the alignment, with their gradient."""
    output = network(image)
    whole = make_targets(label_map, network.taxonomy)
    annotated = torch.ones(len(image), network.num_organs + network.num_tumors, dtype=torch.bool)
    first, second = ZePTLoss(network, batch_dice=True)._alignment(output, whole, annotated)
    return first + second


def test_the_alignment_cannot_be_solved_by_the_queries(dimensions: int, image: Tensor) -> None:
    """It trains what tokens say and how they are read, and nothing that a description went through."""
    network = make_network(dimensions)
    labels = torch.randint(0, 6, image.shape)
    align(network, image, labels).backward()
    moved = {n for n, p in network.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert {n.split(".")[0] for n in moved} == {
        "encoder", "decoder", "to_tokens", "token_norms", "to_knowledge", "log_temperature"
    }  # fmt: skip
    assert not any("seg_layers" in n for n in moved)


@torch.no_grad()
def test_equal_regions_have_equal_embeddings_whatever_their_descriptions(dimensions: int, image: Tensor) -> None:
    network = make_network(dimensions).eval()
    queries = network._refine(image, network.decoder(network.encoder(image)), network.hosts)
    queries = queries._replace(tokens=torch.randn(2, 30, network.to_tokens[0].out_features))
    embedding = network._embed(queries, torch.randn(2, 1, 30).expand(-1, 4, -1))
    assert torch.allclose(embedding, embedding[:, :1].expand_as(embedding), atol=1e-6)
    nothing = network._embed(queries, torch.full((2, 3, 30), -200.0))
    assert nothing.isfinite().all()


@pytest.mark.parametrize("shown", [(), (1,), (1, 4), (1, 2, 3, 4, 5)])
def test_classes_that_the_patch_does_not_show_are_left_out(shown: tuple[int, ...], image: Tensor) -> None:
    """The loss over a patch with some classes is that of a model that has these classes alone."""
    from zept_nnunet.losses.alignment import query_to_knowledge, query_to_query

    dimensions = image.ndim - 2
    network = make_network(dimensions).eval()
    labels = torch.zeros(image.shape, dtype=torch.long)
    for place, label in enumerate(shown):
        labels[:, :, 2 * place : 2 * place + 2] = label
    found = align(network, image, labels)
    if not shown:
        assert found == 0
        return
    target: Targets = make_targets(labels, network.taxonomy)
    which = [c for c in range(5) if bool(torch.cat((target.support, target.tumor), 1)[:, c].any())]
    output = network(image)
    embedding = torch.cat((output.organ_embedding, output.tumor_embedding), 1)[:, which]
    every = torch.ones(2, len(which), dtype=torch.bool)
    loss = ZePTLoss(network, batch_dice=True)
    positives = loss.positives[which][:, which]
    others = [c for c in range(5) if c not in which]
    knowledge = loss.knowledge[which + others]  # the own ones first
    wanted = query_to_knowledge(embedding, knowledge, output.temperature, every)
    wanted = wanted + query_to_query(embedding, positives, output.temperature, every)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_class_that_the_case_does_not_label_is_left_out(image: Tensor) -> None:
    network = make_network(image.ndim - 2).eval()
    labels = torch.randint(0, 6, image.shape)
    output, target = network(image), make_targets(labels, network.taxonomy)
    loss = ZePTLoss(network, batch_dice=True)
    annotated = torch.ones(2, 5, dtype=torch.bool)
    everything = loss._alignment(output, target, annotated)
    annotated[:, 3] = False
    without = loss._alignment(output, target, annotated)
    assert all(a != b for a, b in zip(everything, without, strict=True))
    annotated[:] = False
    assert all(term == 0 for term in loss._alignment(output, target, annotated))
