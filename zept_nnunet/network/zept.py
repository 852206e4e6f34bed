"""ZePT's network (paper, figure 2), assembled.

What is unusual about it: no parameter depends on the number of classes. Queries are generated from knowledge vectors,
which stand in the plans; adding a tumor means adding a vector. What each part computes, as published and as ours, is
chosen by the plans' decoder settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from zept_nnunet.knowledge import KnowledgeBank
from zept_nnunet.network.backbone import build_backbone
from zept_nnunet.network.grouping import GroupingBlock
from zept_nnunet.network.heads import at_thresholds, keep_to_annotated, to_channels
from zept_nnunet.network.logits import LOGIT_LIMIT, conjunction, less_certain, union
from zept_nnunet.network.pooling import highest_nearby
from zept_nnunet.network.query_decoder import AdvancedLayer, JointAttention, MaskHead, QueryGenerator, query_visibility
from zept_nnunet.network.relative import RelativeHead, build_relative_head
from zept_nnunet.network.self_prompting import (
    calibrated_prompts,
    calibrated_score,
    minmax_prompts,
    minmax_score,
    over_hosts,
    shrink_to,
)
from zept_nnunet.plans_block import fingerprint, thresholds_of
from zept_nnunet.taxonomy import Taxonomy

LEARNED_QUERIES = "decoder.seg_layers.queries"
"""The table of learned queries, where there is one: of organs, trained tumors, and abnormal tissue."""
_EVIDENCE_FLOOR = 4.0  # log-odds; at inference, evidence further against a class counts by its logarithm
_PRIOR_VOXELS = 64.0  # that the mean of an added query's evidence over its hosts takes to be 0
_SCORE_LIMIT = 8.0  # of the score of the organs' maps; that of the relative head ranks healthy tissue far below it


def deviation(support: Tensor, unlike: Tensor) -> Tensor:
    """Log-odds that a voxel lies in the organ and is unlike the rest of it: (B, Q, *) twice → (B, Q, *)."""
    return conjunction(support.detach().to(unlike.dtype), unlike)


def inside_hosts(
    support: Tensor, unlike: Tensor, hosts: Sequence[Sequence[int]], to_the_edge: Collection[int] = ()
) -> list[Tensor | None]:
    """Σ_h σ(u_h)·unlike_h over the hosts of each tumor, (B, *), None without hosts; no gradient to `support`.

    Of the tumors `to_the_edge`, by their place in `hosts`, it is Σ_h unlike_h.

    Not the log-odds of a conjunction: the tumor's map is gated by its hosts' support already, and where that support is
    weak, as at a lesion on the organ's surface, two gates would hide what one lets through. In float32: float16 cannot
    hold the sum of many hosts.
    """
    inside = support.detach().float().sigmoid()
    sums: list[Tensor | None] = []
    for k, h in enumerate(hosts):
        of_hosts = unlike[:, list(h)].float()
        weighted = of_hosts if k in to_the_edge else inside[:, list(h)] * of_hosts
        sums.append(weighted.sum(1) if h else None)
    return sums


def centered_on(evidence: Tensor, support: Tensor) -> Tensor:
    """Evidence less its mean over an organ, (B, *) both; where little of the organ is in the patch, less of it."""
    weight = support.detach().float().sigmoid().square().flatten(1)
    mean = (weight * evidence.float().flatten(1)).sum(1) / (weight.sum(1) + _PRIOR_VOXELS)
    return evidence - mean.to(evidence.dtype).view(-1, *[1] * (evidence.ndim - 1))


class ZePTOutput(NamedTuple):
    """What training sees (deep supervision on). Lists go from the finest scale to the coarsest, as nnU-Net's do."""

    support: list[Tensor]  # (B, Q, *): the organ with any tumor in it
    healthy: list[Tensor]  # (B, Q, *): the organ's healthy tissue
    tumor: list[Tensor]  # (B, U, *): tumor maps; empty in stage I
    anomaly: list[Tensor]  # (B, A, *): maps of synthetic anomalies; empty in stage I and where there are none
    deviation: Tensor | None  # (B, Q, *): in the organ and unlike the rest of it, finest scale; None in stage I
    organ_embedding: Tensor  # (B, Q, E)
    tumor_embedding: Tensor  # (B, U, E); (B, 0, E) in stage I
    temperature: Tensor  # scalar, of the alignment
    anchor: Tensor  # a zero that depends on every query parameter: frozen ones get a gradient of exactly 0


class ZePT(nn.Module):
    """Deep supervision on: a `ZePTOutput`. Off: logits (B, heads, *)."""

    knowledge_organs: Tensor
    knowledge_tumors: Tensor
    sees: Tensor
    organ_queries: nn.Module
    tumor_queries: nn.Module
    host_to_tumor: nn.Module
    tumors_see: Tensor
    knowledge_anomalies: Tensor
    sees_training: Tensor
    tumors_see_training: Tensor
    annotated: Tensor

    def __init__(
        self,
        block: Mapping[str, Any],
        configuration: ConfigurationManager,
        num_input_channels: int,
        deep_supervision: bool = True,
        predict_tumors: bool = True,
        noise: Sequence[float] | float = 0.1,
    ):
        """
        Args:
            block: the plans' `zept` block.
            configuration: of the plans.
            num_input_channels: C.
            deep_supervision: see the class.
            predict_tumors: False where only organs were trained.
            noise: per image channel in normalized units, see `RelativeFeatures`.
        """
        super().__init__()
        settings = block["decoder"]
        self.taxonomy = taxonomy = Taxonomy.from_dict(block["taxonomy"])
        self.hosts = taxonomy.host_indices()
        self.num_organs, self.num_tumors = len(taxonomy.organs), len(taxonomy.tumors)
        # Regions need no order: each is decoded by itself, and a tumor's painted over those that hold it.
        self.own_threshold = 0.0 if settings["tumor_first"] and not taxonomy.has_regions else None
        found = thresholds_of(block, taxonomy) if predict_tumors else [None] * self.num_tumors
        self.thresholds = [self.own_threshold if t is None else t for t in found]
        self.predict_tumors = predict_tumors
        self.stage = 2  # the trainer sets 1 while only organs are learned
        self.restricts = False  # logits to the classes that are `annotated`: validation of partially labeled cases
        self.register_buffer(
            "annotated", torch.ones(1, self.num_organs + self.num_tumors, dtype=torch.bool), persistent=False
        )
        self.is_calibrated = settings["score"] == "calibrated"
        self.score_per_organ = settings["score_range"] == "organ"
        self.self_prompting, self.score_in_maps = settings["self_prompting"], settings["score_in_maps"]
        self.relative_prompts = settings["prompts"] == "relative"
        self.gate_reaches_out = settings["gate"] == "neighborhood"
        probability = torch.tensor(float(settings["prompt_probability"]))
        self.prompt_threshold = float(torch.logit(probability) if self.score_per_organ else probability)

        self.encoder, self.decoder, channels = build_backbone(
            configuration, num_input_channels, fingerprint(block), deep_supervision
        )
        width, heads, num_scales = settings["width"], settings["heads"], len(channels)
        self.num_grouping = max(1, min(settings["grouping_scales"], num_scales - 1))

        bank = KnowledgeBank.from_dict(block["knowledge"])
        for name, classes in (("organs", taxonomy.organs), ("tumors", taxonomy.tumors)):
            vectors = torch.from_numpy(bank.matrix(c.name for c in classes))
            self.register_buffer(f"knowledge_{name}", vectors, persistent=False)
        # Queries for abnormal tissue in an organ, synthetic where nobody labeled its tumors. Like that of an added
        # tumor each sees the others and is seen by none: what training shows it is what an added tumor will meet.
        organ_index = {organ.name: i for i, organ in enumerate(taxonomy.organs)}
        self.anomaly_hosts = tuple((organ_index[host],) for host in block["anomalies"].values())
        vectors = torch.from_numpy(bank.matrix(block["anomalies"]))
        self.register_buffer("knowledge_anomalies", vectors, persistent=False)
        self.added = {k for k, tumor in enumerate(taxonomy.tumors) if tumor.added and self.hosts[k]}
        # The authors lower the map of an organ by the score where it has a tumor. One that was added counts for nothing
        # there, or adding it would change its host's map.
        in_training = [h for h, t in zip(self.hosts, taxonomy.tumors, strict=True) if not t.added]
        self.lowered = sorted({organ for h in (*in_training, *self.anomaly_hosts) for organ in h})
        added = [False] * self.num_organs + [t.added for t in taxonomy.tumors]
        self._is_added = added + [True] * len(self.anomaly_hosts)
        for name, flags in (("", added), ("_training", self._is_added)):
            sees, tumors_see = self._visibility(flags)
            self.register_buffer(f"sees{name}", sees, persistent=False)
            self.register_buffer(f"tumors_see{name}", tumors_see, persistent=False)

        # queries
        self.is_learned = settings["queries"] == "learned"
        if self.is_learned:  # sized by the classes: under seg_layers, where -pretrained_weights skips them
            trained = self.num_organs + len(taxonomy.trained_tumors) + len(self.anomaly_hosts)
            self.decoder.seg_layers.queries = nn.Parameter(torch.randn(trained, width) * 0.02)
        else:
            self.organ_queries = QueryGenerator(bank.width, width)
            self.tumor_queries = QueryGenerator(bank.width, width)
            self.host_to_tumor = nn.Linear(width, width)
        self.background_queries = nn.Parameter(torch.randn(settings["background_queries"], width) * 0.02)

        # one feature pyramid for grouping and prompting
        grouped = range(self.num_grouping)
        self.to_tokens = nn.ModuleList(nn.Linear(channels[s], width) for s in grouped)
        self.token_norms = nn.ModuleList(nn.LayerNorm(width) for _ in grouped)
        self.grouping = nn.ModuleList(GroupingBlock(width, heads, groups=settings["grouping"]) for _ in grouped)
        self.advanced = nn.ModuleList(AdvancedLayer(width, heads) for _ in range(settings["advanced_layers"]))
        self.joint = JointAttention(width, heads)

        # maps: one head a scale
        scaled = self.is_calibrated
        self.support_heads = nn.ModuleList(MaskHead(width, c, scaled) for c in channels)
        self.healthy_heads = nn.ModuleList(MaskHead(width, c, scaled) for c in (channels if scaled else []))
        self.tumor_heads = nn.ModuleList(MaskHead(width, c, scaled) for c in channels)
        self.score_weight: nn.Parameter | None = None
        if scaled and self.score_in_maps:
            self.score_weight = nn.Parameter(torch.tensor(-1.0))  # softplus: 0.31
        self.relative: RelativeHead | None = None
        if settings["relative"]:
            spacing = configuration.spacing[-len(configuration.patch_size) :]
            self.relative = build_relative_head(spacing, channels[-1], num_input_channels, noise, query_width=width)
            self.deviation_weight = nn.Parameter(torch.tensor(2.95))  # softplus: 3.0

        # alignment
        self.to_knowledge = nn.Linear(width, bank.width)
        self.knowledge_norm = nn.Identity() if scaled else nn.LayerNorm(bank.width)
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    # ------------------------------------------------------------------------------------------------ forward
    def forward(self, x: Tensor) -> ZePTOutput | Tensor:
        """(B, C, *) → `ZePTOutput` while `decoder.deep_supervision` is on, else logits (B, heads, *)."""
        features = self.decoder(self.encoder(x))
        if self.decoder.deep_supervision:
            return self._training_output(x, features)
        healthy, tumor, support, *_ = self._finest_maps(x, features)
        return self._channels(healthy, tumor, support)

    def forward_scores(self, x: Tensor, with_prompts: bool = False) -> dict[str, Tensor]:
        """Scores for ranking and for anomaly maps, in log-odds within ±1000.

        (B, C, *) → `tumor_logits` (B, U, *), `anomaly` and `support` (B, Q, *), and `logits` (B, heads, *), which are
        what `forward` returns. With prompts also `prompts` (B, Q, *), 0 or 1: where a tumor of that organ alone may
        attend at the finest grouped scale.
        """
        healthy, tumor, support, anomaly, queries = self._finest_maps(x, self.decoder(self.encoder(x)))
        limit = LOGIT_LIMIT
        prompts = {"prompts": self._organ_prompts(queries, x.shape[2:])} if with_prompts else {}
        return prompts | {
            "logits": self._channels(healthy, tumor, support),
            "tumor_logits": tumor.clamp(-limit, limit),
            "anomaly": anomaly.clamp(-limit, limit),
            "support": support.clamp(-limit, limit),
        }

    def _channels(self, healthy: Tensor, tumor: Tensor, support: Tensor) -> Tensor:
        """nnU-Net's output, decoded at the thresholds of calibrated tumors; scores do not depend on these."""
        if self.restricts:
            healthy, tumor = keep_to_annotated(healthy, tumor, support, self.hosts, self.annotated)
        return self.to_channels(healthy, tumor, self.thresholds)

    def to_channels(self, healthy: Tensor, tumor: Tensor, thresholds: Sequence[float | None]) -> Tensor:
        """Maps (B, Q, *) and (B, U, *), as nnU-Net decodes them at these thresholds → (B, heads, *)."""
        return to_channels(self.taxonomy, *at_thresholds(healthy, tumor, self.hosts, thresholds))

    def forward_embeddings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the alignment compares with descriptions: the features where each class is, in knowledge space.

        (B, C, *) → embeddings (B, Q + U, E), and (B, Q + U) in how many voxels of the input each class's map is above
        one half: the embedding of one that is not there says nothing. U counts trained and added tumors.
        """
        features = self.decoder(self.encoder(x))
        queries = self._refine(x, features, self.hosts if self.predict_tumors else ())
        voxels = (self._class_maps(queries, features, len(features) - 1) > 0).flatten(2).sum(2)
        return self._embed(queries, self._class_maps(queries, features, self.num_grouping - 1)), voxels

    def _finest_maps(self, x: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, _Queries]:
        """healthy, tumor, support, anomaly at the finest scale, and the queries that they were made from."""
        queries = self._refine(x, features, self.hosts if self.predict_tumors else ())
        support, healthy = self._organ_maps(queries.organs, features, -1)
        unlike = queries.unlike
        anomaly = self._score(support, healthy) if unlike is None else deviation(support, unlike)
        if queries.tumors is None:
            tumor = support.new_full((support.shape[0], self.num_tumors, *support.shape[2:]), -LOGIT_LIMIT)
        else:
            args = queries.tumors, self.hosts, features, -1, support, healthy, unlike
            tumor, healthy = self._tumor_maps(*args, floor=_EVIDENCE_FLOOR)
        if self.is_calibrated:
            # nnU-Net averages windows and resamples: surfaces would move away from where an organ's absence is surest
            healthy = less_certain(healthy, _EVIDENCE_FLOOR)
        return healthy, tumor, support, anomaly.expand_as(support), queries

    def _training_output(self, x: Tensor, features: list[Tensor]) -> ZePTOutput:
        hosts = self.hosts + self.anomaly_hosts if self.stage == 2 else ()
        queries = self._refine(x, features, hosts)
        support, healthy, tumor, anomaly = [], [], [], []
        deviates, regions = None, [queries.coarse[-1][0]]
        for scale in reversed(range(len(features))):  # fine to coarse
            if not self.is_calibrated and scale != len(features) - 1:
                break  # the authors supervise the finest maps alone
            u, h = self._organ_maps_at(queries, features, scale)
            if queries.tumors is not None:
                unlike = queries.unlike if scale == len(features) - 1 else None
                deviates = deviates if unlike is None else deviation(u, unlike)
                z, h = self._tumor_maps(queries.tumors, hosts, features, scale, u, h, unlike)
                tumor.append(z[:, : self.num_tumors])
                if scale == self.num_grouping - 1:
                    regions.append(tumor[-1])
                if self.anomaly_hosts:
                    anomaly.append(z[:, self.num_tumors :])
            support.append(u)
            healthy.append(h)
        embedding = self._embed(queries, torch.cat(regions, 1))
        return ZePTOutput(
            support,
            healthy,
            tumor,
            anomaly,
            deviates,
            embedding[:, : self.num_organs],
            embedding[:, self.num_organs : self.num_organs + self.num_tumors],
            self.log_temperature.exp(),
            self._anchor(),
        )

    # ------------------------------------------------------------------------------------------------ parts
    def _refine(self, x: Tensor, features: list[Tensor], hosts: tuple[tuple[int, ...], ...]) -> _Queries:
        """Grouping, relative head, prompts, advanced layers, joint attention; `hosts` of each advanced query, or ()."""
        batch = features[0].shape[0]
        organs_given, tumors_given = self._given_queries(hosts)
        background = self.background_queries.expand(batch, -1, -1)
        q = torch.cat((organs_given.expand(batch, -1, -1), background), 1)
        tokens, coarse = [], []
        for scale in range(self.num_grouping):
            tokens.append(self.token_norms[scale](self.to_tokens[scale](features[scale].flatten(2).transpose(1, 2))))
            q = self.grouping[scale](q, tokens[scale])  # tokens (B, V, D)
            coarse.append(self._organ_maps(q[:, : self.num_organs], features, scale))
        organs = q[:, : self.num_organs]
        if not hosts:
            return _Queries(organs, None, tokens[-1], coarse, None, None)

        t = tumors_given.expand(batch, -1, -1)
        is_training_set = len(hosts) > self.num_tumors
        tumors_see = self.tumors_see_training if is_training_set else self.tumors_see
        unlike, deviates = self._unlike(x, features, organs)
        prompts = self._prompts(coarse, deviates, hosts)
        for i, layer in enumerate(self.advanced):
            scale = i % self.num_grouping
            t = layer(t, tokens[scale], prompts[scale], tumors_see)
        joint = self.joint(torch.cat((organs, t), 1), self.sees_training if is_training_set else self.sees)
        organs, t = joint.split((self.num_organs, len(hosts)), 1)
        return _Queries(organs, t, tokens[-1], coarse, unlike, deviates)

    def _given_queries(self, hosts: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
        """Queries before they have seen the image: (Q, D), and one (D) for each of `hosts`: (len(hosts), D)."""
        if self.is_learned:
            return self._learned_queries(hosts)
        organs = self.organ_queries(self.knowledge_organs)
        if not hosts:
            return organs, organs[:0]
        knowledge = torch.cat((self.knowledge_tumors, self.knowledge_anomalies))[: len(hosts)]
        means = [organs[list(h)].mean(0) if h else organs.new_zeros(organs.shape[1]) for h in hosts]
        return organs, self.tumor_queries(knowledge) + self.host_to_tumor(torch.stack(means))

    def _learned_queries(self, hosts: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
        """An added tumor has learned nothing of its own: it takes the queries for abnormal tissue in its hosts."""
        learned: Tensor = self.get_parameter(LEARNED_QUERIES)
        num_trained = len(learned) - self.num_organs - len(self.anomaly_hosts)
        organs, trained, abnormal = learned.split((self.num_organs, num_trained, len(self.anomaly_hosts)))
        abnormal_in = {organ: row for (organ,), row in zip(self.anomaly_hosts, abnormal, strict=True)}
        added = [torch.stack([abnormal_in[i] for i in h]).mean(0) for h in self.hosts[num_trained:]]
        queries = torch.cat((trained, *(row[None] for row in added), abnormal))
        return organs, queries[: len(hosts)]

    def _organ_maps(self, organs: Tensor, features: list[Tensor], scale: int) -> tuple[Tensor, Tensor]:
        support = self.support_heads[scale](organs, features[scale])
        return support, self.healthy_heads[scale](organs, features[scale]) if self.is_calibrated else support

    def _organ_maps_at(self, queries: _Queries, features: list[Tensor], scale: int) -> tuple[Tensor, Tensor]:
        """Of a scale of training: where queries are grouped by the grouping queries, elsewhere by the refined ones."""
        is_grouped = scale < self.num_grouping
        return queries.coarse[scale] if is_grouped else self._organ_maps(queries.organs, features, scale)

    def _score(self, support: Tensor, healthy: Tensor) -> Tensor:
        """Anomaly score map, without gradient: (B, Q, *) in log-odds, or the authors' (B, 1, *) in [0, 1]."""
        with torch.no_grad():
            if self.score_per_organ:
                return calibrated_score(support, healthy)
            if self.num_organs == 0:
                return support.new_zeros(support.shape[0], 1, *support.shape[2:])
            return minmax_score(healthy)

    def _unlike(self, x: Tensor, features: list[Tensor], organs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Log-odds that a voxel is unlike the rest of an organ, per organ (B, Q, *), and that it also lies in it.

        The organs are those that grouping found: it comes before the tumor queries, which are prompted by it.
        """
        if self.relative is None:
            return None, None
        with torch.no_grad():
            support = self.support_heads[-1](organs, features[-1])
        unlike = self.relative(x, features[-1], support, organs)
        return unlike, deviation(support, unlike.detach()) if self.relative_prompts else None

    @torch.no_grad()
    def _prompts(
        self, coarse: list[tuple[Tensor, Tensor]], deviates: Tensor | None, hosts: tuple[tuple[int, ...], ...]
    ) -> list[Tensor | None]:
        """Of each of these scales (support and healthy maps), where each query may attend: bool (B, len(hosts), V)."""
        if not self.self_prompting:
            return [None] * len(coarse)
        prompts: list[Tensor | None] = []
        for support, healthy in coarse:
            score = self._score(support, healthy) if deviates is None else shrink_to(deviates, support.shape[2:])
            if self.score_per_organ:
                args = support.flatten(2), score.flatten(2), hosts, self.prompt_threshold
                prompts.append(calibrated_prompts(*args))
            else:
                prompts.append(minmax_prompts(score.flatten(2), len(hosts), self.prompt_threshold))
        return prompts

    def _organ_prompts(self, queries: _Queries, shape: Sequence[int]) -> Tensor:
        """The prompt of a tumor of each organ at the finest grouped scale, 0 or 1, on the finest grid: (B, Q, *)."""
        support = queries.coarse[-1][0]
        prompt = self._prompts(queries.coarse[-1:], queries.deviates, tuple((i,) for i in range(self.num_organs)))[0]
        coarse = torch.ones_like(support) if prompt is None else prompt.reshape(support.shape).to(support.dtype)
        return nn.functional.interpolate(coarse, size=tuple(shape), mode="nearest")

    def _tumor_maps(
        self,
        tumors: Tensor,
        hosts: tuple[tuple[int, ...], ...],
        features: list[Tensor],
        scale: int,
        support: Tensor,
        healthy: Tensor,
        unlike: Tensor | None = None,
        floor: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tumor maps, one for each of `hosts`, and the healthy maps that go with them (the authors edit these).

        Of an added tumor the query's own term says where in its host, the deviation whether at all: training never
        showed what level that term has for it, and where it finds something it lowers all the rest of the host. So it
        is centered there, and the deviation counts to the edge of its host.

        floor: log-odds below zero from which evidence against a tumor counts by its logarithm, in its hosts. They say
            with certainty that healthy tissue is none, and of what lies outside nothing: without a floor, the lesions
            that they miss would rank below the air around the patient. In training the certainty is wanted.
        """
        a = self.tumor_heads[scale](tumors, features[scale])
        if not self.is_calibrated and not self.score_in_maps:
            return a, healthy
        if not self.is_calibrated:
            score = self._score(support, healthy)
            is_lowered = torch.zeros(self.num_organs, device=a.device, dtype=a.dtype).index_fill(
                0, torch.tensor(self.lowered, device=a.device, dtype=torch.long), 1
            )
            return a + score, healthy - score * is_lowered.view(1, -1, *[1] * (a.ndim - 2))
        hints: list[tuple[Tensor, Sequence[Tensor | None]]] = []
        if self.score_weight is not None:
            score = self._score(support, healthy)
            per_tumor = over_hosts(score, hosts) if self.score_per_organ else [score[:, 0]] * len(hosts)
            limit = _SCORE_LIMIT
            per_tumor = [None if s is None else s.clamp(-limit, limit) for s in per_tumor]
            hints.append((nn.functional.softplus(self.score_weight), per_tumor))
        if unlike is not None:
            within = inside_hosts(support, unlike, hosts, to_the_edge=self.added)
            hints.append((nn.functional.softplus(self.deviation_weight), within))
        maps = []
        support = support.detach()
        gates = over_hosts(highest_nearby(support) if self.gate_reaches_out else support, hosts)
        for k, in_host in enumerate(gates):
            evidence = a[:, k]
            if in_host is None:  # the whole body is the host
                maps.append(evidence)
                continue
            if unlike is not None and k in self.added:
                evidence = centered_on(evidence, union(support[:, list(hosts[k])]))
            for weight, of_hosts in hints:
                hint = of_hosts[k]
                assert hint is not None  # as in_host is not
                evidence = evidence + weight * hint
            evidence = evidence if floor is None else less_certain(evidence, floor)
            maps.append(conjunction(in_host.to(evidence.dtype), evidence))
        return torch.stack(maps, 1), healthy

    def _class_maps(self, queries: _Queries, features: list[Tensor], scale: int) -> Tensor:
        """Support of each organ and the map of each tumor at a scale of training: (B, Q + U, *), U 0 in stage I."""
        support, healthy = self._organ_maps_at(queries, features, scale)
        if queries.tumors is None:
            return support
        unlike = queries.unlike if scale == len(features) - 1 else None
        tumor, _ = self._tumor_maps(queries.tumors, self.hosts, features, scale, support, healthy, unlike)
        return torch.cat((support, tumor), 1)

    def _embed(self, queries: _Queries, maps: Tensor) -> Tensor:
        """Each class in knowledge space, (B, N, E); maps (B, N, *) logits at the finest grouped scale.

        The authors': its query, which comes from its description and so may just repeat it. Ours: the mean token where
        the class is, by its map. Nothing of a query but where it points enters, and there the gradient stops: a query
        is computed from its description in every part, residuals and feed-forward layers too, and attention that is
        free to look anywhere can spell a class by where it looks. Either would name the class whatever the image shows.
        """
        if self.is_calibrated:
            weight = maps.detach().float().sigmoid().flatten(2)  # (B, N, V)
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)
            of_classes = weight.to(queries.tokens.dtype) @ queries.tokens
        else:
            of_classes = torch.cat([q for q in (queries.organs, queries.tumors) if q is not None], 1)
        embedding: Tensor = self.knowledge_norm(self.to_knowledge(of_classes))
        return embedding

    def _anchor(self) -> Tensor:
        backbone = ("encoder.", "decoder.stages", "decoder.transpconvs")
        return sum(
            (p.sum() * 0 for n, p in self.named_parameters() if not n.startswith(backbone)),
            start=self.log_temperature.new_zeros(()),
        )

    # ------------------------------------------------------------------------------------------------ training
    def hide(self, tumor: int | None) -> None:
        """From now on no other query sees that of this trained tumor, as if it was added; None: all are seen again.

        It is for training alone: what `sees` says at inference does not change.
        """
        flags = list(self._is_added)
        if tumor is not None:
            flags[self.num_organs + tumor] = True
        sees, tumors_see = self._visibility(flags)
        self.sees_training.copy_(sees)
        self.tumors_see_training.copy_(tumors_see)

    def restrict_to(self, is_annotated: Sequence[bool] | None) -> None:
        """From now on report the annotated classes alone, as `keep_to_annotated` has it; None: all of them.

        Args:
            is_annotated: of each organ, then of each tumor.
        """
        self.restricts = is_annotated is not None
        if is_annotated is not None:
            self.annotated.copy_(torch.tensor([is_annotated]))

    def _visibility(self, is_added: list[bool]) -> tuple[Tensor, Tensor]:
        """Of all queries, and of tumors' alone."""
        flags = torch.tensor(is_added, dtype=torch.bool)
        return query_visibility(flags), query_visibility(flags[self.num_organs :])

    def stage_two_parameters(self) -> list[nn.Parameter]:
        """Parameters that stage I leaves as they are: all that belongs to advanced queries alone."""
        modules: list[nn.Module] = [self.advanced, self.joint, self.tumor_heads]
        if not self.is_learned:
            modules += [self.tumor_queries, self.host_to_tumor]
        single = [] if self.score_weight is None else [self.score_weight]
        if self.relative is not None:
            modules.append(self.relative)
            single.append(self.deviation_weight)
        return [p for m in modules for p in m.parameters()] + single


class _Queries(NamedTuple):
    organs: Tensor
    tumors: Tensor | None  # (B, U, D), or (B, U + A, D) in training
    tokens: Tensor  # (B, V, D) of the finest grouped scale
    coarse: list[tuple[Tensor, Tensor]]  # support and healthy maps of the grouping scales, coarse to fine
    unlike: Tensor | None  # (B, Q, *): the relative head's logits
    deviates: Tensor | None  # (B, Q, *): in the organ that grouping found and unlike the rest of it, without gradient
