"""The method's formulas as plain loops over queries and voxels: NumPy, float64, one case at a time.

Letters as in `backbone.py`, without B. Maps are (Q, V) or (U, V) and features (C, V): voxels stand flattened.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

Array = np.ndarray
Module = Any  # a module under test; its parameters are read here by name
Hosts = tuple[tuple[int, ...], ...]
SCORE_LIMIT = 8.0  # of a hint in a tumor map


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


# ---------------------------------------------------------------------------------------------------- layers
def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


def log_softmax(z: Array) -> Array:
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def linear(layer: Module, x: Array) -> Array:
    """x (..., D_in)."""
    y = x @ array(layer.weight).T
    return y if layer.bias is None else y + array(layer.bias)


def layer_norm(layer: Module, x: Array) -> Array:
    rows = []
    for row in x:
        normed = (row - row.mean()) / math.sqrt(row.var() + layer.eps)
        rows.append(normed * array(layer.weight) + array(layer.bias))
    return np.array(rows)


def gelu(x: Array) -> Array:
    return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))), otypes=[float])(x)


def feed_forward(layers: Module, x: Array) -> Array:
    norm, widen, _, narrow = layers
    return linear(narrow, gelu(linear(widen, layer_norm(norm, x))))


def attention(layer: Module, q: Array, x: Array, may_attend: Array | None = None) -> Array:
    """q (N, D), x (V, D), may_attend bool (N, V): each query averages the values of the tokens that it may attend."""
    queries, keys, values = linear(layer.to_q, q), linear(layer.to_k, x), linear(layer.to_v, x)
    per_head = q.shape[1] // layer.heads
    attended = np.zeros_like(q)
    for head in range(layer.heads):
        part = slice(head * per_head, (head + 1) * per_head)
        for i in range(len(q)):
            allowed = [j for j in range(len(x)) if may_attend is None or may_attend[i, j]]
            scores = np.array([queries[i, part] @ keys[j, part] / math.sqrt(per_head) for j in allowed])
            for share, j in zip(softmax(scores), allowed, strict=True):
                attended[i, part] += share * values[j, part]
    return linear(layer.to_out, attended)


# ---------------------------------------------------------------------------------------------------- log-odds
def conjunction(u: float, a: float) -> float:
    """Log-odds of σ(u)σ(a)."""
    both = sigmoid(u) * sigmoid(a)
    not_both = sigmoid(-u) + sigmoid(u) * sigmoid(-a)
    return math.log(both) - math.log(not_both)


def union(logits: list[float]) -> float:
    """Log-odds of 1 − ∏(1 − σ(zᵢ))."""
    some, none = 0.0, 1.0
    for z in logits:
        some += none * sigmoid(z)
        none *= sigmoid(-z)
    return math.log(some) - math.log(none)


def over_hosts(maps: Array, hosts: tuple[int, ...]) -> Array:
    """The union of some organs' maps (Q, V) → (V)."""
    return np.array([union([maps[i, v] for i in hosts]) for v in range(maps.shape[1])])


# ---------------------------------------------------------------------------------------------------- grouping
def assign(scores: Array, noise: Array | None = None, temperature: float = 1.0, hard: bool = True) -> Array:
    """scores (N, V): every voxel is shared out among the queries, or given to the best one."""
    assignment = np.zeros_like(scores)
    for j in range(scores.shape[1]):
        noisy = scores[:, j] if noise is None else scores[:, j] + noise[:, j]
        if hard:
            assignment[np.argmax(noisy), j] = 1
        else:
            assignment[:, j] = softmax(noisy / temperature)
    return assignment


def assign_backward(soft: Array, upstream: Array) -> Array:
    """∂/∂scores of Σ upstream · softmax over the queries, at temperature 1."""
    gradient = np.zeros_like(soft)
    for j in range(soft.shape[1]):
        for i in range(soft.shape[0]):
            for k in range(soft.shape[0]):
                gradient[i, j] += upstream[k, j] * soft[k, j] * ((i == k) - soft[i, j])
    return gradient


def grouping(block: Module, q: Array, x: Array, noise: Array | None = None) -> Array:
    """q ← CrossAttention(q, x); G_i = W_o[Σ_j Â_ij W_v x_j / (Σ_j Â_ij + 1)] + q_i; q_i ← G_i + MLP(LN(G_i)).

    q (N, D), x (V, D), noise (N, V).
    """
    q = q + attention(block.attention, layer_norm(block.norm, q), x)
    queries, keys, values = linear(block.to_q, q), linear(block.to_k, x), linear(block.to_v, x)
    scores = np.zeros((len(q), len(x)))
    for i in range(len(q)):
        for j in range(len(x)):
            scores[i, j] = queries[i] @ keys[j] / math.sqrt(q.shape[1])
    assignment = assign(scores, noise, block.temperature)
    grouped = []
    for i in range(len(q)):
        members = [j for j in range(len(x)) if assignment[i, j]]
        gathered = sum((values[j] for j in members), start=np.zeros(q.shape[1])) / (len(members) + 1)
        grouped.append(linear(block.to_out, gathered) + q[i])
    return np.array(grouped) + feed_forward(block.feed_forward, np.array(grouped))


# ---------------------------------------------------------------------------------------------------- maps
def mask_head(head: Module, q: Array, features: Array) -> Array:
    """z_i(v) = ⟨LN(W q_i), F(v)⟩; ours ⟨·,·⟩/√C + b(q_i)."""
    weights = layer_norm(head.norm, linear(head.project, q))
    z = np.zeros((len(q), features.shape[1]))
    for i in range(len(q)):
        for v in range(features.shape[1]):
            z[i, v] = weights[i] @ features[:, v]
            if head.bias is not None:
                z[i, v] = z[i, v] / math.sqrt(len(features)) + linear(head.bias, q[i])[0]
    return z


def calibrated_score(support: Array, healthy: Array) -> Array:
    """Log-odds of "in the organ, and not its healthy tissue"."""
    score = np.zeros_like(support)
    for i in range(support.shape[0]):
        for v in range(support.shape[1]):
            score[i, v] = conjunction(support[i, v], -healthy[i, v])
    return score


def minmax_score(organ_maps: Array) -> Array:
    """−max_i z_i(v), from 0 to 1 over the patch: (V)."""
    score = np.array([-max(organ_maps[:, v]) for v in range(organ_maps.shape[1])])
    low, high = min(score), max(score)
    return (score - low) / max(high - low, 1e-6)


def calibrated_prompts(support: Array, score: Array, hosts: Hosts, threshold: float) -> Array:
    """bool (U, V): the hosts' anomalous voxels, else the hosts' support, else everything."""
    prompts = []
    for its in hosts:
        mask = [True] * support.shape[1]
        if its:
            mask = [bool(z > threshold) for z in over_hosts(score, its)]
            if not any(mask):
                mask = [bool(z > 0) for z in over_hosts(support, its)]
            if not any(mask):
                mask = [True] * support.shape[1]
        prompts.append(mask)
    return np.array(prompts)


def minmax_prompts(score: Array, num_tumors: int, threshold: float) -> Array:
    """bool (U, V): one mask for every tumor."""
    mask = [bool(s >= threshold) for s in score]
    return np.array([mask if any(mask) else [True] * len(score)] * num_tumors)


def tumor_maps(
    evidence: Array,
    support: Array,
    hints: list[tuple[float, Array]],
    hosts: Hosts,
    unlike: tuple[float, Array] | None = None,
    grid: tuple[int, ...] | None = None,
) -> Array:
    """Log-odds of σ(u)σ(a): u the hosts' support, a = ⟨LN(W t), F(v)⟩ + Σ weight · clamped hint of the hosts.

    evidence (U, V), support (Q, V), hints: weight and (Q, V); `unlike` likewise, summed over hosts by their σ(u). With
    the `grid` of the voxels u is the highest of a voxel and its neighbors.
    """
    z = np.array(evidence)
    gate = support if grid is None else highest_nearby(support, grid)
    for k, its in enumerate(hosts):
        if not its:
            continue  # anywhere in the body
        for v in range(z.shape[1]):
            for weight, hint in hints:
                z[k, v] += weight * min(max(union([hint[i, v] for i in its]), -SCORE_LIMIT), SCORE_LIMIT)
            if unlike is not None:
                weight, deviates = unlike
                hint = sum(sigmoid(support[i, v]) * deviates[i, v] for i in its)
                z[k, v] += weight * hint
            z[k, v] = conjunction(union([gate[i, v] for i in its]), z[k, v])
    return z


def highest_nearby(maps: Array, grid: tuple[int, ...]) -> Array:
    """(Q, V) on a grid → (Q, V): the highest of each voxel and its neighbors."""
    fine = maps.reshape(-1, *grid)
    highest = np.empty_like(fine)
    for place in np.ndindex(*grid):
        window = tuple(slice(max(i - 1, 0), i + 2) for i in place)
        highest[(slice(None), *place)] = fine[(slice(None), *window)].reshape(len(fine), -1).max(1)
    return highest.reshape(len(fine), -1)


# ---------------------------------------------------------------------------------------------------- network
class Maps(NamedTuple):
    """What the network gives for one case; maps from the coarsest scale to the finest."""

    support: list[Array]  # (Q, V)
    healthy: list[Array]
    tumor: list[Array]  # (U, V)
    deviation: Array | None  # (Q, V)
    organ_embedding: Array  # (Q, E)
    tumor_embedding: Array  # (U, E)
    prompts: list[Array]  # bool (U, V), of the grouping scales


def advanced_layer(layer: Module, t: Array, x: Array, may_attend: Array, may_attend_query: Array) -> Array:
    t = t + attention(layer.cross_attention, layer_norm(layer.cross_norm, t), x, may_attend)
    normed = layer_norm(layer.self_norm, t)
    t = t + attention(layer.self_attention, normed, normed, may_attend_query)
    return t + feed_forward(layer.feed_forward, t)


def joint_attention(layer: Module, q: Array, may_attend_query: Array) -> Array:
    normed = layer_norm(layer.norm, q)
    return q + attention(layer.attention, normed, normed, may_attend_query)


def visibility(is_added: list[bool]) -> Array:
    """Row: who looks. An added query is seen by itself alone."""
    n = len(is_added)
    return np.array([[i == j or not is_added[j] for j in range(n)] for i in range(n)])


def given_queries(network: Module, knowledge: list[list[Array]], hosts: Hosts) -> tuple[Array, Array]:
    """Generated: MLP of the knowledge + token; a tumor's also from the mean of its hosts' queries."""
    generated = []
    for generator, vectors in zip((network.organ_queries, network.tumor_queries), knowledge, strict=True):
        first, _, second = generator.mlp
        rows = [linear(second, gelu(linear(first, k * math.sqrt(len(k))))) + array(generator.token) for k in vectors]
        generated.append(np.array(rows))
    organs, tumors = generated
    for k, its in enumerate(hosts):
        mean = sum((organs[i] for i in its), start=np.zeros(organs.shape[1])) / max(len(its), 1)
        tumors[k] = tumors[k] + linear(network.host_to_tumor, mean)
    return organs, tumors


def shrink_to(score: Array, shape: tuple[int, ...], size: tuple[int, ...]) -> Array:
    """(Q, V) on a grid → the highest of the voxels that each coarse one covers, (Q, V of `size`)."""
    fine = score.reshape(-1, *shape)
    coarse = np.empty((len(fine), *size))
    for place in np.ndindex(*size):
        window = tuple(slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(place, shape, size, strict=True))
        coarse[(slice(None), *place)] = fine[(slice(None), *window)].reshape(len(fine), -1).max(1)
    return coarse.reshape(len(fine), -1)


def zept(
    network: Module, features: list[Array], unlike: Array | None, grids: list[tuple[int, ...]] | None = None
) -> Maps:
    """Everything behind the U-Net, in eval mode with all tumors (no synthetic anomalies).

    features: (C, V) of every decoder scale, coarse to fine, on `grids`; unlike (Q, V): the relative head's logits.
    """
    taxonomy = network.taxonomy
    hosts, num_organs = taxonomy.host_indices(), len(taxonomy.organs)
    if network.is_learned:
        learned = array(network.decoder.seg_layers.queries)
        organs_given, tumors_given = learned[:num_organs], learned[num_organs:]
    else:
        knowledge = [list(array(network.knowledge_organs)), list(array(network.knowledge_tumors))]
        organs_given, tumors_given = given_queries(network, knowledge, hosts)

    q = np.concatenate((organs_given, array(network.background_queries)))
    tokens, prompts, support, healthy = [], [], [], []
    for scale, block in enumerate(network.grouping):
        x = layer_norm(network.token_norms[scale], linear(network.to_tokens[scale], features[scale].T))
        q = grouping(block, q, x)
        u = mask_head(network.support_heads[scale], q[:num_organs], features[scale])
        h = mask_head(network.healthy_heads[scale], q[:num_organs], features[scale]) if network.is_calibrated else u
        if network.is_calibrated:
            prompts.append(calibrated_prompts(u, calibrated_score(u, h), hosts, network.prompt_threshold))
        else:
            prompts.append(minmax_prompts(minmax_score(u), len(hosts), network.prompt_threshold))
        tokens.append(x)
        support.append(u)
        healthy.append(h)

    if network.relative_prompts and unlike is not None:
        assert grids is not None
        in_organ = mask_head(network.support_heads[-1], q[:num_organs], features[-1])
        found = calibrated_score(in_organ, -unlike)
        prompts = [
            calibrated_prompts(u, shrink_to(found, grids[-1], size), hosts, network.prompt_threshold)
            for u, size in zip(support, grids, strict=False)
        ]

    is_added = [False] * num_organs + [t.added for t in taxonomy.tumors]
    t = tumors_given
    for i, layer in enumerate(network.advanced):
        scale = i % len(tokens)
        t = advanced_layer(layer, t, tokens[scale], prompts[scale], visibility(is_added[num_organs:]))
    joint = joint_attention(network.joint, np.concatenate((q[:num_organs], t)), visibility(is_added))
    organs, tumors = joint[:num_organs], joint[num_organs:]

    tumor, deviation = [], None
    for scale, f in enumerate(features):
        if scale >= len(tokens):
            support.append(mask_head(network.support_heads[scale], organs, f))
            healthy.append(
                mask_head(network.healthy_heads[scale], organs, f) if network.is_calibrated else support[scale]
            )
        evidence = mask_head(network.tumor_heads[scale], tumors, f)
        if not network.is_calibrated:
            score = minmax_score(support[scale])
            tumor.append(evidence + score)
            owners = {i for its in hosts for i in its}
            healthy[scale] = np.array([z - score if i in owners else z for i, z in enumerate(healthy[scale])])
            continue
        score = calibrated_score(support[scale], healthy[scale])
        hints = [(softplus(network.score_weight.item()), score)] if network.score_in_maps else []
        relative = None
        if unlike is not None and scale == len(features) - 1:
            deviation = calibrated_score(support[scale], -unlike)  # in the organ, and unlike the rest of it
            relative = softplus(network.deviation_weight.item()), unlike
        grid = grids[scale] if grids is not None and network.gate_reaches_out else None
        tumor.append(tumor_maps(evidence, support[scale], hints, hosts, relative, grid))

    embeddings = []
    for final, given in ((organs, organs_given), (tumors, tumors_given)):
        e = linear(network.to_knowledge, final - given if network.is_calibrated else final)
        embeddings.append(e if network.is_calibrated else layer_norm(network.knowledge_norm, e))
    return Maps(support, healthy, tumor, deviation, embeddings[0], embeddings[1], prompts)


# ---------------------------------------------------------------------------------------------------- losses
def published_alignment(embedding: Array, knowledge: Array, positives: Array, temperature: float) -> float:
    """One case: both terms sum −log p over the class itself and every related one; neither L2 norm nor row sums."""
    n = len(embedding)
    total = 0.0
    for i in range(n):
        for others in (knowledge[:n], embedding):
            log_p = log_softmax(np.array([embedding[i] @ other for other in others]) / temperature)
            for j in range(n):
                if i == j or positives[i, j] > 0:
                    total -= log_p[j] / n
    return total


def soft_dice(logits: Array, target: Array) -> float:
    """Of one class over the voxels given: (V) each."""
    overlap, predicted, wanted = 0.0, 0.0, 0.0
    for z, y in zip(logits, target, strict=True):
        overlap += sigmoid(z) * y
        predicted += sigmoid(z)
        wanted += y
    return (2 * overlap + 1e-5) / (predicted + wanted + 1e-5)


def cross_entropy(logits: Array, target: Array) -> float:
    """Binary, mean over the voxels given: (V) each."""
    return sum(softplus(-z) if y else softplus(z) for z, y in zip(logits, target, strict=True)) / len(logits)
