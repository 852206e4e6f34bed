"""The weighted sum of named terms over the scales of deep supervision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zept_nnunet.losses.alignment import published_alignment, query_positives, query_to_knowledge, query_to_query
from zept_nnunet.losses.segmentation import AnnotatedDiceBCE
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.training.targets import Targets

TERMS = ("organ_support", "organ_healthy", "tumor", "anomaly", "deviation", "query_to_knowledge", "query_to_query")
"""The terms of the loss, each logged by its name."""


class ZePTLoss(nn.Module):
    """Call it with the network's output and the targets of each scale; returns the total and its unweighted terms."""

    knowledge: Tensor

    def __init__(
        self,
        network: ZePT,
        batch_dice: bool,
        ddp: bool = False,
        weights: dict[str, float] | None = None,
        unlabeled_host_weight: float = 1.0,
    ):
        """
        Args:
            network: its classes and hosts.
            batch_dice: see nnU-Net's plans.
            ddp: gather the Dice over processes.
            weights: of terms, where they are not 1.
            unlabeled_host_weight: λ in [0, 1] of the voxels of an organ with synthetic anomalies that belong to none:
                they may hold tumors that nobody labeled. 0 leaves them out, 1 takes them for healthy.
        """
        super().__init__()
        self.unlabeled_host_weight = unlabeled_host_weight
        self.segmentation = AnnotatedDiceBCE(batch_dice, ddp)
        self.weights = dict.fromkeys(TERMS, 1.0) | (weights or {})
        self.is_calibrated = network.is_calibrated
        self.positives = query_positives(network.hosts, network.num_organs)
        self.num_organs = network.num_organs
        self.with_query = [organ for (organ,) in network.anomaly_hosts]  # for abnormal tissue
        self.hosts = hosts = network.hosts
        self.tumors_of = [
            [k for k, organs in enumerate(hosts) if organ in organs or not organs] for organ in range(self.num_organs)
        ]
        self.hold_anomalies = [organ for organ in self.with_query if not self.tumors_of[organ]]  # synthetic ones
        self.register_buffer(
            "knowledge", torch.cat((network.knowledge_organs, network.knowledge_tumors)), persistent=False
        )

    def forward(
        self, output: ZePTOutput, targets: list[Targets], is_annotated: Tensor, hidden: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """targets: fine to coarse, like the output; is_annotated bool (B, Q + U).

        hidden: a tumor whose own map counts nothing in this batch; to its hosts it is abnormal tissue all the same.
        """
        organs, tumors = is_annotated[:, : self.num_organs], is_annotated[:, self.num_organs :]
        tells_whose = self._tells_whose(organs, tumors)
        labels_tumors = self._labels_tumors(tumors)
        # where a tumor is left out the label is the organ as a whole, and which of it is healthy is not said
        tells_healthy = organs & labels_tumors
        labeled = (self._labels_abnormal(organs, labels_tumors) & tells_whose).cpu()
        if hidden is not None:
            tumors = tumors.clone()
            tumors[:, hidden] = False
        zero = output.anchor * 0
        terms = dict.fromkeys(TERMS, zero)
        # as in nnU-Net a scale counts half of the next finer one; the coarsest count too: prompts are made from them
        scale_weights = [0.5**s for s in range(len(output.support))]
        for s, weight in enumerate(scale_weights):
            share, target = weight / sum(scale_weights), targets[s]
            pairs = {"organ_support": (output.support[s], target.support, organs & tells_whose)}
            if self.is_calibrated:
                pairs["organ_healthy"] = (output.healthy[s], target.healthy, tells_healthy)
            if output.tumor:
                pairs["tumor"] = (output.tumor[s], target.tumor, tumors)
            for term, (logits, wanted, annotated) in pairs.items():
                terms[term] = terms[term] + share * self.segmentation(logits, wanted, annotated, target.is_valid)
            if output.anomaly:
                maps, which = output.anomaly[s], self.with_query
                terms["anomaly"] = terms["anomaly"] + share * self._abnormal(maps, target, labeled, which)
        if output.deviation is not None:
            which = list(range(self.num_organs))
            terms["deviation"] = self._abnormal(output.deviation, targets[0], labeled, which)
        terms["query_to_knowledge"], terms["query_to_query"] = self._alignment(
            output, targets[0], torch.cat((organs, tumors), 1)
        )
        total = output.anchor
        for term, value in terms.items():
            total = total + self.weights[term] * value
        return total, {term: value.detach() for term, value in terms.items()}

    def _abnormal(self, logits: Tensor, target: Targets, labeled: Tensor, organs: list[int]) -> Tensor:
        """Segmentation of abnormal tissue: logits (B, len(organs), *), labeled bool (B, Q)."""
        wanted, weight = target.abnormal[:, organs], None
        if self.unlabeled_host_weight < 1 and self.hold_anomalies:
            is_open = torch.zeros(self.num_organs, dtype=torch.bool, device=wanted.device)
            is_open[self.hold_anomalies] = True
            is_open = is_open[organs].view(1, -1, *[1] * (wanted.ndim - 2)) & target.support[:, organs] & ~wanted
            weight = 1 - (1 - self.unlabeled_host_weight) * is_open.float()
        return self.segmentation(logits, wanted, labeled[:, organs], target.is_valid, weight)

    def _labels_tumors(self, tumors: Tensor) -> Tensor:
        """Organs of which a case labels each tumor that training knows, if any: bool (B, U) → bool (B, Q)."""
        labels = tumors.new_ones(tumors.shape[0], self.num_organs)
        for organ, its in enumerate(self.tumors_of):
            labels[:, organ] = tumors[:, its].all(1)
        return labels

    def _labels_abnormal(self, organs: Tensor, labels_tumors: Tensor) -> Tensor:
        """Organs whose abnormal voxels a case labels: its tumors, or of an organ that holds synthetic ones, itself."""
        labels = labels_tumors.clone()
        labels[:, [organ for organ, its in enumerate(self.tumors_of) if not its]] = False
        labels[:, self.hold_anomalies] = organs[:, self.hold_anomalies]
        return labels

    def _tells_whose(self, organs: Tensor, tumors: Tensor) -> Tensor:
        """Organs of which no labeled tumor may lie in another organ that the case does not label, bool (B, Q).

        Targets give such a tumor to the nearest labeled one of its hosts, or to the first: of a case that labels kidney
        tumors and no kidney, that would be the same kidney for all of them.
        """
        tells = torch.ones_like(organs)
        for k, hosts in enumerate(self.hosts):
            if len(hosts) > 1:
                is_open = tumors[:, k] & ~organs[:, list(hosts)].all(1)
                tells[:, list(hosts)] &= ~is_open[:, None]
        return tells

    def _alignment(self, output: ZePTOutput, target: Targets, is_annotated: Tensor) -> tuple[Tensor, Tensor]:
        """Both terms. Ours are of the classes that a patch shows and its case labels; the published one is of all."""
        embedding, knowledge = output.organ_embedding, self.knowledge
        if output.tumor_embedding.shape[1]:
            embedding = torch.cat((embedding, output.tumor_embedding), 1)
        n = embedding.shape[1]
        positives = self.positives[:n, :n]
        if not self.is_calibrated:
            return published_alignment(embedding, knowledge, positives, output.temperature), embedding.sum() * 0
        holds = torch.cat((target.support, target.tumor), 1)[:, :n]
        if target.is_valid is not None:
            holds = holds & target.is_valid
        is_shown = holds.flatten(2).any(2) & is_annotated[:, :n].to(holds.device)
        return (
            query_to_knowledge(embedding, knowledge, output.temperature, is_shown),
            query_to_query(embedding, positives, output.temperature, is_shown),
        )
