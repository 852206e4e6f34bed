"""The losses as plain loops over cases, classes, queries and voxels: NumPy, float64.

Letters as in `backbone.py`; V voxels of a scale.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tests.network.reference import Array, Grid, Hosts, Module, array, log_softmax, sigmoid, softplus


# ---------------------------------------------------------------------------------------------------- alignment
def relation(i: int, j: int, hosts: Hosts, num_organs: int) -> float:
    """Of two classes, organs first: tumors are related to each other, and half as much to their hosts."""
    tumors = [k - num_organs for k in (i, j) if k >= num_organs]
    if i == j or not tumors:
        return 0.0
    return 1.0 if len(tumors) == 2 else 0.5 * (min(i, j) in hosts[tumors[0]])


def published_alignment(embedding: Array, knowledge: Array, hosts: Hosts, num_organs: int, temperature: float) -> float:
    """One case: both terms sum −log p over the class itself and every related one; neither L2 norm nor row sums."""
    n = len(embedding)
    total = 0.0
    for i in range(n):
        for others in (knowledge[:n], embedding):
            log_p = log_softmax(np.array([embedding[i] @ other for other in others]) / temperature)
            for j in range(n):
                if i == j or relation(i, j, hosts, num_organs):
                    total -= log_p[j] / n
    return total


def query_to_knowledge(embeddings: Array, knowledge: Array, temperature: float, shown: list[list[int]]) -> float:
    """Mean over the classes that each case shows of −log p(own description), by cosine similarity to all.

    embeddings (B, N, E), knowledge (M, E).
    """
    terms = []
    for embedding, there in zip(embeddings, shown, strict=True):
        for i in there:
            log_p = log_softmax(np.array([cosine(embedding[i], k) for k in knowledge]) / temperature)
            terms.append(-log_p[i])
    return float(np.mean(terms)) if terms else 0.0


def query_to_query(
    embeddings: Array, hosts: Hosts, num_organs: int, temperature: float, shown: list[list[int]]
) -> float:
    """Mean over the same queries of −log p(related ones) among the others shown; without relatives one is left out."""
    terms = []
    for embedding, there in zip(embeddings, shown, strict=True):
        for i in there:
            others = [j for j in there if j != i]
            related = [relation(i, j, hosts, num_organs) for j in others]
            if sum(related):
                log_p = log_softmax(np.array([cosine(embedding[i], embedding[j]) for j in others]) / temperature)
                terms.append(-sum(share * z for share, z in zip(related, log_p, strict=True)) / sum(related))
    return float(np.mean(terms)) if terms else 0.0


def shown_classes(wanted: Wanted, annotated: set[str], hidden: str | None, taxonomy: Module, number: int) -> list[int]:
    """Of the first `number` classes, those that a case labels and shows in a voxel that is not ignored."""
    masks = [*wanted.support, *wanted.tumor]
    names = [c.name for c in taxonomy.classes]
    return [
        i for i in range(number) if (masks[i] & wanted.is_valid).any() and names[i] in annotated and names[i] != hidden
    ]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


# ---------------------------------------------------------------------------------------------------- segmentation
def annotated_dice_bce(logits: Array, target: Array, annotated: Array, weights: Array, batch_dice: bool) -> float:
    """Mean of the BCE over the annotated (case, class) pairs, and of 1 − Dice over those of them that show the class.

    The BCE of a class is the mean over the voxels of the cases that annotate it; its Dice is of each such case, or of
    all of them together. logits, target, weights (B, N, V), annotated (B, N); what is ignored weighs 0.
    """
    entropies, overlaps = [], []
    for c in range(logits.shape[1]):
        cases = [b for b in range(len(logits)) if annotated[b, c]]
        total, weight = 0.0, 0.0
        for b in cases:
            for z, y, w in zip(logits[b, c], target[b, c], weights[b, c], strict=True):
                total += w * (softplus(-z) if y else softplus(z))
                weight += w
        entropies += [total / max(weight, 1.0)] * len(cases)
        for group in [cases] if batch_dice else [[b] for b in cases]:
            overlap, predicted, wanted = 0.0, 0.0, 0.0
            for b in group:
                for z, y, w in zip(logits[b, c], target[b, c], weights[b, c], strict=True):
                    overlap += w * sigmoid(z) * y
                    predicted += w * sigmoid(z)
                    wanted += w * y
            if wanted:
                overlaps += [1 - (2 * overlap + 1e-5) / (predicted + wanted + 1e-5)] * len(group)
    return (float(np.mean(entropies)) if entropies else 0.0) + (float(np.mean(overlaps)) if overlaps else 0.0)


# ---------------------------------------------------------------------------------------------------- all terms
class Wanted(NamedTuple):
    """What each map should show of one case, bool (Q or U, V), and where nothing is ignored, bool (V)."""

    support: Array
    healthy: Array
    tumor: Array
    abnormal: Array  # (Q, V)
    is_valid: Array


def targets(label_map: Array, taxonomy: Module, anomalies: dict[int, int]) -> Wanted:
    """Of one case, from its label map (*). An organ's support holds its tumors, of a tumor that may lie in several
    organs the voxels that are nearest to this one, and its synthetic anomalies; only its own label is healthy.

    anomalies: label of an organ → label of its synthetic anomalies.
    """
    organs, tumors = [o.name for o in taxonomy.organs], [t.name for t in taxonomy.tumors]
    organ_of = {o.label: o.name for o in taxonomy.organs}
    tumor_of = {t.label: t for t in taxonomy.tumors}
    holds = {value: organ_of[label] for label, value in anomalies.items()}
    shape = label_map.shape
    support, healthy = np.zeros((len(organs), *shape), bool), np.zeros((len(organs), *shape), bool)
    tumor, is_valid = np.zeros((len(tumors), *shape), bool), np.zeros(shape, bool)
    for place in np.ndindex(*shape):
        value = int(label_map[place])
        is_valid[place] = value != taxonomy.ignore_label
        if value in organ_of:
            support[(organs.index(organ_of[value]), *place)] = True
            healthy[(organs.index(organ_of[value]), *place)] = True
        elif value in tumor_of:
            tumor[(tumors.index(tumor_of[value].name), *place)] = True
            hosts = tumor_of[value].hosts
            if hosts:
                labels = {o.name: o.label for o in taxonomy.organs}
                nearest = min(hosts, key=lambda host: distance(label_map == labels[host], place))
                support[(organs.index(nearest), *place)] = True
        elif value in holds:
            support[(organs.index(holds[value]), *place)] = True
    support, healthy, tumor = (m.reshape(len(m), -1) for m in (support, healthy, tumor))
    return Wanted(support, healthy, tumor, support & ~healthy, is_valid.ravel())


def distance(mask: Array, place: Grid) -> float:
    """From a voxel to the nearest one of a mask, along the axis where they are furthest apart."""
    return min((max(abs(i - j) for i, j in zip(place, other, strict=True)) for other in np.argwhere(mask)), default=1e9)


class Told(NamedTuple):
    """Which maps the labels of one case judge: bool, of each organ or tumor."""

    support: list[bool]
    healthy: list[bool]
    tumor: list[bool]
    abnormal: list[bool]


def told(annotated: set[str], taxonomy: Module, anomalies: dict[int, int]) -> Told:
    """annotated: the names of the classes that the case labels. What it does not label is unknown there.

    An organ's healthy tissue and its abnormal tissue are known where all of its tumors are labeled; of an organ that
    nobody labels tumors of, where it is labeled and so may hold synthetic anomalies. A labeled tumor lies in any of its
    hosts: which of it is whose is not told where one of several hosts is not labeled.
    """
    support, healthy, abnormal = [], [], []
    for organ in taxonomy.organs:
        its = [t for t in taxonomy.tumors if organ.name in t.hosts or not t.hosts]
        shared = [t for t in its if len(t.hosts) > 1 and t.name in annotated]
        knows_whose = all(host in annotated for t in shared for host in t.hosts)
        knows_tumors = all(t.name in annotated for t in its)
        support.append(organ.name in annotated and knows_whose)
        healthy.append(organ.name in annotated and knows_tumors)
        if its:
            abnormal.append(knows_tumors and knows_whose)
        else:
            abnormal.append(organ.label in anomalies and organ.name in annotated)
    return Told(support, healthy, [t.name in annotated for t in taxonomy.tumors], abnormal)


class Judge(NamedTuple):
    """Of a batch at one scale: the targets of each case, and which maps its labels judge."""

    wanted: list[Wanted]
    told: dict[str, Array]  # kind → bool (B, Q or U)
    open_organs: list[int]  # whose voxels count λ where no synthetic anomaly is
    unlabeled_host_weight: float
    batch_dice: bool

    def term(self, maps: Array, kind: str, which: list[int] | None = None) -> float:
        """maps (B, N, *), of the organs or tumors of these indices, or of all; `kind`: a field of `Wanted`."""
        which = list(range(maps.shape[1])) if which is None else which
        target = np.array([getattr(case, kind)[which] for case in self.wanted])
        weights = np.ones(target.shape)
        for b, case in enumerate(self.wanted):
            weights[b, :, ~case.is_valid] = 0
            for n, organ in enumerate(which):
                if kind == "abnormal" and organ in self.open_organs:
                    weights[b, n, case.support[organ] & ~case.abnormal[organ]] *= self.unlabeled_host_weight
        logits = maps.reshape(target.shape)
        return annotated_dice_bce(logits, target, self.told[kind][:, which], weights, self.batch_dice)


def zept_loss(
    network: Module,
    output: dict[str, Any],
    label_maps: list[Array],
    annotated: list[set[str]],
    anomalies: dict[int, int],
    batch_dice: bool,
    unlabeled_host_weight: float = 1.0,
    hidden: str | None = None,
) -> dict[str, float]:
    """The terms of the loss of a batch, without their weights.

    output: as the network gives it, maps (B, N, *) from fine to coarse; label_maps (B, *) likewise; annotated: of each
    case the classes that it labels. hidden: a tumor whose own map counts nothing.
    """
    taxonomy, num_organs = network.taxonomy, len(network.taxonomy.organs)
    is_told = {
        kind: np.array([getattr(told(names, taxonomy, anomalies), kind) for names in annotated])
        for kind in Told._fields
    }
    if hidden is not None:
        is_told["tumor"][:, [t.name for t in taxonomy.tumors].index(hidden)] = False
    open_organs = [i for i, organ in enumerate(taxonomy.organs) if organ.label in anomalies]
    terms = dict.fromkeys(("organ_support", "organ_healthy", "tumor", "anomaly", "deviation"), 0.0)
    shares = [0.5**s for s in range(len(output["support"]))]  # each scale half of the next finer one
    for s, share in enumerate(shares):
        wanted = [targets(label_map, taxonomy, anomalies) for label_map in label_maps[s]]
        judge = Judge(wanted, is_told, open_organs, unlabeled_host_weight, batch_dice)
        share = share / sum(shares)
        terms["organ_support"] += share * judge.term(output["support"][s], "support")
        if network.is_calibrated:
            terms["organ_healthy"] += share * judge.term(output["healthy"][s], "healthy")
        if output["tumor"]:
            terms["tumor"] += share * judge.term(output["tumor"][s], "tumor")
        if output["anomaly"]:
            with_query = [organ for (organ,) in network.anomaly_hosts]
            terms["anomaly"] += share * judge.term(output["anomaly"][s], "abnormal", with_query)
        if output["deviation"] is not None and s == 0:
            terms["deviation"] = judge.term(output["deviation"], "abnormal")

    knowledge = np.concatenate((array(network.knowledge_organs), array(network.knowledge_tumors)))
    hosts, temperature = taxonomy.host_indices(), min(max(output["temperature"], 0.01), 1.0)
    embeddings = np.concatenate((output["organ_embedding"], output["tumor_embedding"]), 1)
    to_query = 0.0
    if network.is_calibrated:
        finest = [targets(label_map, taxonomy, anomalies) for label_map in label_maps[0]]
        shown = [
            shown_classes(case, labels, hidden, taxonomy, embeddings.shape[1])
            for case, labels in zip(finest, annotated, strict=True)
        ]
        to_knowledge = query_to_knowledge(embeddings, knowledge, temperature, shown)
        to_query = query_to_query(embeddings, hosts, num_organs, temperature, shown)
    else:
        of_cases = [published_alignment(e, knowledge, hosts, num_organs, temperature) for e in embeddings]
        to_knowledge = float(np.mean(of_cases))
    return {**terms, "query_to_knowledge": to_knowledge, "query_to_query": to_query}
