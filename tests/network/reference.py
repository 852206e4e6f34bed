"""The method's formulas as plain loops over queries and voxels: NumPy, float64, one case at a time.

Letters as in `backbone.py`, without B. Maps are (Q, V) or (U, V) and features (C, V): voxels stand flattened.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

Array = np.ndarray
Module = Any  # a module under test; its parameters are read here by name
Hosts = tuple[tuple[int, ...], ...]
Grid = tuple[int, ...]
SCORE_LIMIT = 8.0  # of a hint in a tumor map
EVIDENCE_FLOOR = 4.0  # log-odds; evidence further against a class counts by its logarithm at inference
LOGIT_LIMIT = 1000.0
INSIDE = 0.05  # share of a voxel above which an organ is there
SAMPLES = 1025  # of an organ's voxels, for median and MAD


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


def less_certain(z: float, floor: float) -> float:
    """What lies d below −floor counts as −floor − log(1 + d)."""
    return z if z >= -floor else -floor - math.log(1 + (-floor - z))


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
    if not block.groups:
        return q + feed_forward(block.feed_forward, q)
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
        bias = 0.0 if head.bias is None else linear(head.bias, q[i])[0]
        for v in range(features.shape[1]):
            z[i, v] = weights[i] @ features[:, v]
            if head.bias is not None:
                z[i, v] = z[i, v] / math.sqrt(len(features)) + bias
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
    hosts: Hosts,
    score: tuple[float, Array] | None = None,
    unlike: tuple[float, Array] | None = None,
    grid: Grid | None = None,
    floor: float | None = None,
    added: frozenset[int] = frozenset(),
) -> Array:
    """Log-odds of σ(u)σ(a): u the hosts' support, a = ⟨LN(W t), F(v)⟩ + w₁ · clamped score + w₂ · Σ_h σ(u_h)·d_h.

    Of those that were `added` the first of these is taken less its mean over the hosts, where there is a third, and d_h
    counts in full.

    evidence (U, V), support (Q, V). score: its weight, and (Q, V), of which the hosts' union counts, or (V) for all;
    unlike: its weight and (Q, V). With the `grid` of the voxels u is the highest of a voxel and its neighbors.
    """
    z = np.array(evidence)
    gate = support if grid is None else highest_nearby(support, grid)
    for k, its in enumerate(hosts):
        if not its:
            continue  # anywhere in the body
        if k in added and unlike is not None:
            shares = [sigmoid(union([support[i, v] for i in its])) ** 2 for v in range(z.shape[1])]
            z[k] -= sum(share * a for share, a in zip(shares, z[k], strict=True)) / (sum(shares) + 64)
        for v in range(z.shape[1]):
            if score is not None:
                weight, maps = score
                hint = maps[v] if maps.ndim == 1 else union([maps[i, v] for i in its])
                z[k, v] += weight * min(max(hint, -SCORE_LIMIT), SCORE_LIMIT)
            if unlike is not None:
                weight, deviates = unlike
                z[k, v] += weight * sum((k in added or sigmoid(support[i, v])) * deviates[i, v] for i in its)
            if floor is not None:
                z[k, v] = less_certain(z[k, v], floor)
            z[k, v] = conjunction(union([gate[i, v] for i in its]), z[k, v])
    return z


def highest_nearby(maps: Array, grid: Grid) -> Array:
    """(Q, V) on a grid → (Q, V): the highest of each voxel and its neighbors."""
    fine = maps.reshape(-1, *grid)
    highest = np.empty_like(fine)
    for place in np.ndindex(*grid):
        window = tuple(slice(max(i - 1, 0), i + 2) for i in place)
        highest[(slice(None), *place)] = fine[(slice(None), *window)].reshape(len(fine), -1).max(1)
    return highest.reshape(len(fine), -1)


# ---------------------------------------------------------------------------------------------------- relative
def pooling_and_smoothing(spacing: tuple[float, ...]) -> tuple[Grid, Grid]:
    """Of each axis: voxels finer than 3 mm are pooled by 2; thick ones, over twice the finest, not even smoothed."""
    is_thick = [mm > 2 * min(spacing) for mm in spacing]
    pooling = tuple(2 if mm < 3 and not thick else 1 for mm, thick in zip(spacing, is_thick, strict=True))
    return pooling, tuple(1 if thick else 3 for thick in is_thick)


def pool(maps: Array, window: Grid) -> Array:
    """(C, *) → (C, /): the mean of each window; at the far border, of what is left of it."""
    pooled = np.empty((len(maps), *(-(-n // w) for n, w in zip(maps.shape[1:], window, strict=True))))
    for place in np.ndindex(*pooled.shape[1:]):
        part = tuple(slice(i * w, (i + 1) * w) for i, w in zip(place, window, strict=True))
        pooled[(slice(None), *place)] = maps[(slice(None), *part)].reshape(len(maps), -1).mean(1)
    return pooled


def mean_around(maps: Array, kernel: Grid) -> Array:
    """(C, *) → (C, *): the mean of a box, of which the part on the grid counts."""
    means = np.empty_like(maps)
    for place in np.ndindex(*maps.shape[1:]):
        box = tuple(slice(max(i - k // 2, 0), i + k // 2 + 1) for i, k in zip(place, kernel, strict=True))
        means[(slice(None), *place)] = maps[(slice(None), *box)].reshape(len(maps), -1).mean(1)
    return means


def smooth_inside(maps: Array, weights: Array, kernel: Grid, passes: int) -> Array:
    """(C, *) and (*) → (C, *): averages over the organ's own voxels; far outside, plain ones."""
    weights = weights[None] + 1e-4
    above, below = maps * weights, weights
    for _ in range(passes):
        above, below = mean_around(above, kernel), mean_around(below, kernel)
    return above / below


def robust_statistics(x: Array, w: Array, floor: float) -> tuple[float, float]:
    """Mean and variance of (V) values: weighted median and 1.4826 · MAD of samples drawn systematically along the
    cumulated weights; then one reweighting by exp(−½((x − median)/spread)²), whose variance is doubled.
    """
    samples: list[float] = []
    running, total = 0.0, float(w.sum())
    for value, weight in zip(x, w, strict=True):
        running += weight
        while len(samples) < SAMPLES and running > (len(samples) + 0.5) / SAMPLES * total:
            samples.append(value)
    samples += [x[-1]] * (SAMPLES - len(samples))  # of an organ without any weight
    median = sorted(samples)[SAMPLES // 2]
    spread = max(1.4826 * sorted(abs(s - median) for s in samples)[SAMPLES // 2], floor)
    near = [weight * math.exp(-0.5 * ((value - median) / spread) ** 2) for value, weight in zip(x, w, strict=True)]
    all_near = max(sum(near), 1e-6)
    mean = sum(n * value for n, value in zip(near, x, strict=True)) / all_near
    return mean, 2 * sum(n * (value - mean) ** 2 for n, value in zip(near, x, strict=True)) / all_near


def relative_features(
    module: Module,
    image: Array,
    features: Array,
    support: Array,
    queries: Array | None,
    spacing: tuple[float, ...],
    noise: tuple[float, ...] = (0.1,),
) -> Array:
    """r = (R − μ)/s of each organ, its size, and the organ's share: (Q, num_features, /).

    image (C, *), features (C_f, *), support (Q, *), queries (Q, D) where they set the population's values.
    """
    pooling, kernel = pooling_and_smoothing(spacing)
    image = pool(image, pooling)
    projected = np.moveaxis(linear(module.project, np.moveaxis(pool(features, pooling), 0, -1)), -1, 0)
    shares = pool(np.vectorize(sigmoid)(support), pooling)
    floors = [*noise] * 3 + [0.1] * len(projected)  # of the spread: the noise of the image
    number = math.ceil((2 * len(floors) + 1) / 8) * 8
    related = np.zeros((len(support), number, *image.shape[1:]))
    for i, share in enumerate(shares):
        inside = np.where(share > INSIDE, share, 0)
        weights = inside**2
        values = [*(smooth_inside(image, weights, kernel, passes) for passes in (0, 1, 3)), projected]
        population = array(module.population)
        if queries is not None:
            population = population + linear(module.population_of, queries[i])
        own = weights.sum() / (weights.sum() + module.prior_voxels)
        for k, x in enumerate(np.concatenate(values)):
            mean, variance = robust_statistics(x.ravel(), weights.ravel(), floors[k])
            mean = own * mean + (1 - own) * population[k]
            log_variance = min(max(population[len(floors) + k], -10), 10)
            log_sigma = own * math.log(variance + floors[k] ** 2) / 2
            log_sigma += (1 - own) * math.log(math.exp(log_variance) + floors[k] ** 2) / 2
            for place in np.ndindex(*inside.shape):
                r = min(max((x[place] - mean) / math.exp(log_sigma), -10), 10) * inside[place]
                related[(i, k, *place)], related[(i, len(floors) + k, *place)] = r, abs(r)
        related[i, 2 * len(floors)] = inside
    return related


def leaky(x: Array) -> Array:
    return np.where(x > 0, x, 0.01 * x)


def relative_head(
    head: Module,
    image: Array,
    features: Array,
    support: Array,
    queries: Array | None,
    spacing: tuple[float, ...],
    noise: tuple[float, ...] = (0.1,),
) -> Array:
    """Two layers on a voxel's features and on the mean of its neighbors'; 0 where the organ is not: (Q, *)."""
    related = relative_features(head.features, image, features, support, queries, spacing, noise)
    share = 2 * head.features.num_channels  # the organ's own, among the features
    kernel = pooling_and_smoothing(spacing)[1]
    maps = []
    for organ in related:
        voxels = leaky(linear(head.of_voxel[0], np.moveaxis(organ, 0, -1)))
        around = np.moveaxis(mean_around(np.moveaxis(voxels, -1, 0), kernel), 0, -1)
        hidden = leaky(linear(head.layers[0], np.concatenate((voxels, around), -1)))
        logits = np.where(organ[share] > 0, linear(head.layers[2], hidden)[..., 0], 0)
        maps.append(interpolate(logits, support.shape[1:]))
    return np.array(maps)


def interpolate(coarse: Array, size: Grid) -> Array:
    """Linearly between the centers of the coarse voxels, which share out the fine grid evenly."""
    fine = np.zeros(size)
    for place in np.ndindex(*size):
        ends = []
        for i, n, m in zip(place, coarse.shape, size, strict=True):
            at = max((i + 0.5) * n / m - 0.5, 0)
            low = int(at)
            ends.append(((low, 1 - (at - low)), (min(low + 1, n - 1), at - low)))
        for corner in itertools.product(*ends):
            fine[place] += math.prod(share for _, share in corner) * coarse[tuple(index for index, _ in corner)]
    return fine


# ---------------------------------------------------------------------------------------------------- network
class Maps(NamedTuple):
    """What the network gives for one case; maps from the coarsest scale to the finest."""

    support: list[Array]  # (Q, V)
    healthy: list[Array]
    tumor: list[Array]  # (U, V), or (U + A, V) with synthetic anomalies
    score: Array  # (Q, V) or (V): of the finest maps
    deviation: Array | None  # (Q, V)
    organ_embedding: Array  # (Q, E)
    tumor_embedding: Array  # (U, E)
    prompts: list[Array | None]  # bool (U, V), of the grouping scales
    organ_prompts: Array  # bool (Q, V), of the finest grouping scale: of a tumor in that organ alone


def advanced_layer(layer: Module, t: Array, x: Array, may_attend: Array | None, may_attend_query: Array) -> Array:
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


def given_queries(network: Module, hosts: Hosts) -> tuple[Array, Array]:
    """Generated: MLP of the knowledge + token; a tumor's also from the mean of its hosts' queries.

    hosts: of each tumor, then of each query for abnormal tissue.
    """
    if network.is_learned:
        return learned_queries(network, hosts)
    knowledge = [
        array(network.knowledge_organs),
        np.concatenate((array(network.knowledge_tumors), array(network.knowledge_anomalies)))[: len(hosts)],
    ]
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


def learned_queries(network: Module, hosts: Hosts) -> tuple[Array, Array]:
    """One a class; an added tumor takes the mean of those for abnormal tissue in its hosts."""
    rows = list(array(network.decoder.seg_layers.queries))
    organs = [rows.pop(0) for _ in network.taxonomy.organs]
    trained = [rows.pop(0) for t in network.taxonomy.tumors if not t.added]
    abnormal = {organ: row for (organ,), row in zip(network.anomaly_hosts, rows, strict=True)}
    added = [
        np.mean([abnormal[i] for i in its], axis=0)
        for t, its in zip(network.taxonomy.tumors, hosts, strict=False)
        if t.added
    ]
    return np.array(organs), np.array([*trained, *added, *rows])[: len(hosts)]


def shrink_to(score: Array, shape: Grid, size: Grid) -> Array:
    """(Q, V) on a grid → the highest of the voxels that each coarse one covers, (Q, V of `size`)."""
    fine = score.reshape(-1, *shape)
    coarse = np.empty((len(fine), *size))
    for place in np.ndindex(*size):
        window = tuple(slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(place, shape, size, strict=True))
        coarse[(slice(None), *place)] = fine[(slice(None), *window)].reshape(len(fine), -1).max(1)
    return coarse.reshape(len(fine), -1)


def zept(
    network: Module,
    image: Array,
    features: list[Array],
    spacing: tuple[float, ...],
    is_training: bool = True,
) -> Maps:
    """Everything behind the U-Net, in eval mode with all tumors.

    image (C, *), features: (C, *) of every decoder scale, coarse to fine. Training has queries for abnormal tissue
    besides; at inference evidence far against a tumor counts by its logarithm.
    """
    taxonomy = network.taxonomy
    hosts, num_organs = taxonomy.host_indices(), len(taxonomy.organs)
    is_added = [False] * num_organs + [t.added for t in taxonomy.tumors]
    if is_training:
        is_added += [True] * len(network.anomaly_hosts)
        hosts = (*hosts, *network.anomaly_hosts)
    grids = [f.shape[1:] for f in features]
    features = [f.reshape(len(f), -1) for f in features]
    of_each_organ = tuple((i,) for i in range(num_organs))

    def score_of(u: Array, h: Array) -> Array:
        return calibrated_score(u, h) if network.score_per_organ else minmax_score(h)

    def prompts_of(u: Array, score: Array, its: Hosts) -> Array:
        if network.score_per_organ:
            return calibrated_prompts(u, score, its, network.prompt_threshold)
        return minmax_prompts(score, len(its), network.prompt_threshold)

    organs_given, tumors_given = given_queries(network, hosts)
    q = np.concatenate((organs_given, array(network.background_queries)))
    tokens, support, healthy = [], [], []
    for scale, block in enumerate(network.grouping):
        x = layer_norm(network.token_norms[scale], linear(network.to_tokens[scale], features[scale].T))
        q = grouping(block, q, x)
        u = mask_head(network.support_heads[scale], q[:num_organs], features[scale])
        h = mask_head(network.healthy_heads[scale], q[:num_organs], features[scale]) if network.is_calibrated else u
        tokens.append(x)
        support.append(u)
        healthy.append(h)
    scores = [score_of(u, h) for u, h in zip(support, healthy, strict=True)]

    unlike = None
    if network.relative is not None:  # for the organs that grouping found
        in_organ = mask_head(network.support_heads[-1], q[:num_organs], features[-1])
        args = in_organ.reshape(-1, *grids[-1]), q[:num_organs], spacing
        unlike = relative_head(network.relative, image, features[-1].reshape(-1, *grids[-1]), *args)
        unlike = unlike.reshape(num_organs, -1)
        if network.relative_prompts:
            found = calibrated_score(in_organ, -unlike)
            scores = [shrink_to(found, grids[-1], size) for size in grids[: len(tokens)]]

    prompts: list[Array | None] = [None] * len(tokens)
    organ_prompts = np.ones_like(support[-1], dtype=bool)
    if network.self_prompting:
        prompts = [prompts_of(u, score, hosts) for u, score in zip(support, scores, strict=True)]
        organ_prompts = prompts_of(support[-1], scores[-1], of_each_organ)

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
        score = score_of(support[scale], healthy[scale])
        if not network.is_calibrated:
            tumor.append(evidence + score if network.score_in_maps else evidence)
            in_training = [its for t, its in zip(taxonomy.tumors, hosts, strict=False) if not t.added]
            owners = {i for its in (*in_training, *network.anomaly_hosts) for i in its if network.score_in_maps}
            healthy[scale] = np.array([z - score if i in owners else z for i, z in enumerate(healthy[scale])])
            continue
        hint = (softplus(network.score_weight.item()), score) if network.score_in_maps else None
        relative = None
        if unlike is not None and scale == len(features) - 1:
            deviation = calibrated_score(support[scale], -unlike)  # in the organ, and unlike the rest of it
            relative = softplus(network.deviation_weight.item()), unlike
        grid = grids[scale] if network.gate_reaches_out else None
        floor = None if is_training else EVIDENCE_FLOOR
        added = frozenset(k for k, t in enumerate(taxonomy.tumors) if t.added)
        tumor.append(tumor_maps(evidence, support[scale], hosts, hint, relative, grid, floor, added))

    num_tumors, finest = len(taxonomy.tumors), len(tokens) - 1
    if network.is_calibrated and not is_training:
        healthy[-1] = np.vectorize(less_certain)(healthy[-1], EVIDENCE_FLOOR)
    if network.is_calibrated:
        maps = (support[finest], tumor[finest][:num_tumors])
        embeddings = [embed_regions(network, tokens[finest], m) for m in maps]
    else:
        queries = (organs, tumors[:num_tumors])
        embeddings = [layer_norm(network.knowledge_norm, linear(network.to_knowledge, q)) for q in queries]
    return Maps(support, healthy, tumor, score, deviation, embeddings[0], embeddings[1], prompts, organ_prompts)


def embed_regions(network: Module, tokens: Array, maps: Array) -> Array:
    """The mean token (V, D) where each map (N, V) says that its class is, in knowledge space: (N, E)."""
    means = []
    for z in maps:
        shares = [sigmoid(logit) for logit in z]
        total = sum(share * token for share, token in zip(shares, tokens, strict=True))
        means.append(total / max(sum(shares), 1e-6))
    return linear(network.to_knowledge, np.array(means).reshape(-1, tokens.shape[1]))


def channels(
    labels: dict[str, int | list[int]],
    taxonomy: Module,
    healthy: Array,
    tumor: Array,
    thresholds: dict[str, float] | None = None,
) -> Array:
    """nnU-Net's output of healthy (Q, V) and tumor maps (U, V): of each label its class, and 0 for the background; of
    each region the union of its classes. A tumor counts from its threshold, above which it also wins against its hosts;
    without regions it has one of 0 where none is given.

    labels: as in dataset.json, with added tumors last.
    """
    thresholds = dict(thresholds or {})
    if not taxonomy.has_regions:
        thresholds = {t.name: thresholds.get(t.name, 0.0) for t in taxonomy.tumors}
    maps = {o.name: np.array(z) for o, z in zip(taxonomy.organs, healthy, strict=True)}
    for t, z in zip(taxonomy.tumors, tumor, strict=True):
        maps[t.name] = z - thresholds.get(t.name, 0.0)
    for t in taxonomy.tumors:
        for organ in taxonomy.organs:
            if t.name in thresholds and (organ.name in t.hosts or not t.hosts):
                maps[organ.name] = np.array([min(z, -m) for z, m in zip(maps[organ.name], maps[t.name], strict=True)])
    value_of = {c.label: c.name for c in (*taxonomy.organs, *taxonomy.tumors)}
    output = []
    for name, values in labels.items():
        members = [maps[value_of[v]] for v in (values if isinstance(values, list) else [values]) if v]
        if members:
            output.append([union([z[v] for z in members]) for v in range(healthy.shape[1])])
        elif not taxonomy.has_regions and name == "background":
            output.append([0.0] * healthy.shape[1])
    return np.clip(output, -LOGIT_LIMIT, LOGIT_LIMIT)
