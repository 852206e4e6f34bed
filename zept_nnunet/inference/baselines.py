"""Predictions of the baselines, all in one form: the labels of the source dataset with its unseen tumors, and scores.

nnU-Net's predictor gives the logits of a trained model; a worker process brings them to the image's own grid channel by
channel and makes of them what the baseline reports. Logits never become probabilities: a score does not saturate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.datasets.derived import ANY_TUMOR, Source
from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.baselines import (
    LOWEST,
    Calibration,
    Evidence,
    SoftmaxSummary,
    TumorClass,
    assign_to_hosts,
    choose_threshold,
    fill_hosts,
    host_deviation,
    summarize,
)
from zept_nnunet.inference.predict import SCORES_SUFFIX, Exports, ScoreExport
from zept_nnunet.names import normalize_name

OUT_OF_DISTRIBUTION = ("max_logit", "entropy", "host_deviation")
"""Baselines on an organ-only model. Their own threshold is chosen on validation cases."""


@dataclass(frozen=True)
class Method:
    """How a model's logits become a segmentation and scores."""

    name: str
    classes: tuple[TumorClass, ...]
    output_label: tuple[int, ...]  # of each channel of the model; a tumor of unknown type is background here
    tumor_channels: tuple[int, ...]  # of the model: the any-tumor class, or each class in order, or none
    sigma_mm: float = 0.0
    threshold: float | None = None  # None: no tumor is segmented

    @classmethod
    def of(cls, name: str, source: Source, labels: Mapping[str, Any], sigma_mm: float = 0.0) -> Method:
        """For a model with the given plain `labels` (name → value, as in its dataset.json).

        Raises:
            ZePTError: the labels lack a class.
        """
        wanted, hosts = source.output_labels(), source.tumor_hosts()
        tumors = tuple(TumorClass(n, wanted[n], tuple(wanted[h] for h in hosts[n])) for n in hosts)
        output = {normalize_name(n): label for n, label in wanted.items()}
        channel = {normalize_name(n): int(v) for n, v in labels.items() if n != "ignore"}
        output_label = [0] * len(channel)
        for key, index in channel.items():
            output_label[index] = output.get(key, 0)
        needed = [n for n in wanted if name == "supervised" or n not in hosts]
        missing = [n for n in needed if normalize_name(n) not in channel]
        if missing:
            raise ZePTError(
                f"the model's labels {list(labels)} lack {missing}, which predictions for {source.name} need"
            )
        if name == "supervised":
            channels = tuple(channel[normalize_name(c.name)] for c in tumors)
        else:
            channels = () if name in OUT_OF_DISTRIBUTION else (channel[ANY_TUMOR],)
        return cls(name, tumors, tuple(output_label), channels, sigma_mm)

    def apply(
        self, summary: SoftmaxSummary, image: np.ndarray | None, spacing: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Segmentation (*,) and scores (K, *) on the grid of the summary; `image` (*,) only for host_deviation."""
        labels = np.array(self.output_label, dtype=np.uint16)[summary.labels]
        if self.name == "supervised":
            return labels, np.stack([summary.log_odds[c] for c in self.tumor_channels])
        if self.name not in OUT_OF_DISTRIBUTION:
            (channel,) = self.tumor_channels
            is_tumor = summary.labels == channel
            return assign_to_hosts(labels, summary.log_odds[channel], is_tumor, self.classes, spacing)
        if self.name == "host_deviation":
            assert image is not None
            score = host_deviation(image, labels, self.classes, spacing, self.sigma_mm)
        else:
            score = summary.entropy if self.name == "entropy" else -summary.max_logit
        is_tumor = np.zeros(labels.shape, dtype=bool) if self.threshold is None else score >= self.threshold
        limit = fill_hosts(labels, self.classes)
        return assign_to_hosts(labels, score, is_tumor, self.classes, spacing, limit)


@dataclass(frozen=True)
class BaselineExport(ScoreExport):
    """Makes and writes what a baseline reports of one case. Runs in a worker process."""

    method: Method
    images: tuple[str, ...]
    file_ending: str

    def __call__(self, logits: np.ndarray) -> None:
        """logits: (C, *), preprocessed grid."""
        summary = summarize((self._to_native(z[None])[0] for z in logits), self.method.tumor_channels)
        self._clear_outside(summary)
        reader = self.plans_manager.image_reader_writer_class()
        image = reader.read_images(self.images)[0][0] if self.method.name == "host_deviation" else None
        segmentation, scores = self.method.apply(summary, image, self.properties["spacing"])

        folder, name = os.path.split(self.truncated)
        scratch = Path(folder, ".partial")
        scratch.mkdir(exist_ok=True)
        reader.write_seg(
            segmentation.astype(np.uint8 if segmentation.max() < 256 else np.uint16),
            str(scratch / (name + self.file_ending)),
            self.properties,
        )
        np.savez_compressed(
            scratch / (name + SCORES_SUFFIX),
            logits=scores.clip(LOWEST, -LOWEST).astype(np.float16),
            classes=np.array([c.name for c in self.method.classes], dtype=np.str_),
        )
        for suffix in (SCORES_SUFFIX, self.file_ending):
            os.replace(scratch / (name + suffix), self.truncated + suffix)

    def _clear_outside(self, summary: SoftmaxSummary) -> None:
        """Outside nnU-Net's nonzero crop there is nothing: certain background."""
        outside = np.ones(self.properties["shape_before_cropping"], dtype=bool)
        outside[tuple(slice(low, high) for low, high in self.properties["bbox_used_for_cropping"])] = False
        outside = outside.transpose(self.plans_manager.transpose_backward)
        summary.labels[outside], summary.max_logit[outside], summary.entropy[outside] = 0, -LOWEST, 0
        for score in summary.log_odds.values():
            score[outside] = LOWEST


@dataclass(frozen=True)
class Model:
    """A trained model, and how to predict with it."""

    folder: Path
    fold: int | str
    device: str
    use_mirroring: bool
    processes: int


def predict(model: Model, method: Method, cases: Mapping[str, Sequence[str]], output: Path) -> None:
    """Write CASE and CASE_scores.npz for every case (name → image files) that has not both yet.

    Raises:
        ZePTError: an unsuitable model folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(
        use_mirroring=model.use_mirroring,
        device=torch.device(model.device),
        perform_everything_on_device=model.device == "cuda",
        allow_tqdm=False,
    )
    ending = json.loads((model.folder / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    todo = {n: list(i) for n, i in cases.items() if not is_predicted(output, n, ending)}
    if not todo:
        return
    predictor.initialize_from_trained_model_folder(str(model.folder), (model.fold,))
    by_path = {str(output / name): tuple(images) for name, images in todo.items()}
    items = predictor._internal_get_data_iterator_from_lists_of_filenames(
        list(todo.values()), [None] * len(todo), list(by_path), model.processes
    )
    with Exports(model.processes) as exports:
        for item in tqdm(items, total=len(todo), desc=method.name, unit="case"):
            logits = predictor.predict_logits_from_preprocessed_data(item["data"]).cpu().numpy()
            exports.submit(
                BaselineExport(
                    item["ofile"],
                    None,
                    (),
                    (),
                    predictor.plans_manager,
                    predictor.configuration_manager,
                    dict(item["data_properties"]),
                    method,
                    by_path[item["ofile"]],
                    ending,
                ),
                logits,
            )
    (output / ".partial").rmdir()


def is_predicted(output: Path, case: str, file_ending: str) -> bool:
    """Whether a case's segmentation and scores both stand in the folder."""
    return all((output / (case + suffix)).is_file() for suffix in (file_ending, SCORES_SUFFIX))


def calibrate(method: Method, source: Source, predictions: Path, cases: Sequence[str]) -> Calibration:
    """Choose a threshold for a baseline's scores on cases of the source whose tumors are labeled.

    Only the tumors of the training labels count: an unseen one is not known when a threshold is chosen.
    """
    files = source.cases()
    evidence = []
    for case in tqdm(cases, desc="threshold", unit="case"):
        reader = source.reader(files[case]["images"][0])
        reference = np.rint(reader.read_seg(files[case]["label"])[0][0]).astype(np.int64)
        with np.load(predictions / (case + SCORES_SUFFIX)) as saved:
            scores, names = saved["logits"], saved["classes"].tolist()
        for tumor in source.taxonomy.tumors:
            mask = reference == tumor.label
            if mask.any():
                evidence.append(Evidence.of(scores[names.index(tumor.name)].astype(np.float32), mask))
    return choose_threshold(evidence)


def output_dataset_json(source: Source) -> dict[str, Any]:
    """The source's dataset.json as `zept add-tumor --declared` would leave it: unseen tumors among the labels."""
    labels: dict[str, int] = source.output_labels()
    if source.taxonomy.ignore_label is not None:
        labels["ignore"] = max(labels.values()) + 1
    zept = {k: v for k, v in (source.dataset_json.get("zept") or {}).items() if k not in ("unseen", "annotated")}
    zept["tumors"] = {name: {"hosts": list(hosts)} for name, hosts in source.tumor_hosts().items()}
    kept = {k: v for k, v in source.dataset_json.items() if k not in ("labels", "zept", "dataset")}
    return {**kept, "labels": labels, "zept": zept}


def output_plans(source: Source, plans: Mapping[str, Any]) -> dict[str, Any]:
    """A model's plans, and in them, as beside ZePT's predictions, which tumors training did not see."""
    taxonomy, hosts = source.taxonomy, source.tumor_hosts()
    known = {c.name for c in taxonomy.classes}
    for name, label in source.output_labels().items():
        if name in hosts and name not in known:
            taxonomy = taxonomy.with_tumor(name, label, hosts[name])
    return {**plans, "zept": {"taxonomy": taxonomy.to_dict()}}
