"""nnU-Net's predictor, with scores and anomaly maps beside the segmentations.

One sliding window serves all: while it runs, the network returns the scores as further channels, and they are taken off
again before nnU-Net exports the segmentation. So the segmentation is the one that nnUNetv2_predict writes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from zept_nnunet.errors import ZePTError
from zept_nnunet.names import normalize_name
from zept_nnunet.network.logits import LOGIT_LIMIT
from zept_nnunet.plans_block import check_own_texts, read_block

SCORES_SUFFIX = "_scores.npz"
NEEDS_WORKERS = "--save_scores and --save_anomaly_maps need worker processes: give -npp and -nps 1 or more"


def anomaly_suffix(host: str) -> str:
    """What follows the case's name in the file name of a host's anomaly map."""
    return f"_anomaly_{normalize_name(host).replace(' ', '_')}.nii.gz"


def prompt_suffix(host: str) -> str:
    """What follows the case's name in the file name of a host's visual prompt."""
    return f"_prompt_{normalize_name(host).replace(' ', '_')}.nii.gz"


class ZePTPredictor(nnUNetPredictor):
    """`nnUNetPredictor` that can also write scores and anomaly maps.

    `save_scores`: CASE_scores.npz with `logits`, float16 (U, *), the tumors' logits within ±1000, in the axis order in
    which nnU-Net's own .npz holds probabilities, and `classes`, their U names.
    `save_anomaly_maps`: per host CASE_anomaly_HOST.nii.gz, float32, on the grid of the image; log-odds within ±1000
    (for ZePTTrainerPaper the score of the paper, 0 to 1 within each patch); and CASE_prompt_HOST.nii.gz, 0 or 1: where
    an added tumor of that host may attend, at the finest scale of prompts, in more than half of the windows. No prompts
    where the plans switch them off.
    Outside nnU-Net's nonzero crop both hold the lowest value.
    """

    def __init__(self, *args: Any, save_scores: bool = False, save_anomaly_maps: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.save_scores, self.save_anomaly_maps = save_scores, save_anomaly_maps
        self.network: Any
        self.label_manager: Any
        self._item: Mapping[str, Any] | None = None  # the case at work
        self._exports: Exports | None = None

    @property
    def _extra(self) -> bool:
        return self.save_scores or self.save_anomaly_maps

    @property
    def has_scores(self) -> bool:
        """Whether the loaded model was trained by a ZePT trainer."""
        network = self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network
        return hasattr(network, "forward_scores")

    def check_scores_available(self) -> None:
        """Raise where scores or maps are asked for and the loaded model has none.

        Raises:
            ZePTError: the model was not trained by a ZePT trainer.
        """
        if self._extra:
            self._scored()

    def initialize_from_trained_model_folder(self, model_training_output_dir: str, *args: Any, **kwargs: Any) -> None:
        """nnU-Net's, and a check that the model's descriptions are those that its vectors were made from.

        Raises:
            ZePTError: one was edited in the model's dataset.json.
        """
        super().initialize_from_trained_model_folder(model_training_output_dir, *args, **kwargs)
        plans = self.plans_manager.plans
        if "zept" in plans:
            block = read_block(plans, os.path.join(model_training_output_dir, "plans.json"))
            check_own_texts(block, self.dataset_json, str(model_training_output_dir))

    # ------------------------------------------------------------------------------------------------ which files
    def _extra_files(self, truncated: str) -> list[str]:
        files = [truncated + SCORES_SUFFIX] if self.save_scores else []
        if self.save_anomaly_maps:
            scored = self._scored()
            files += [truncated + anomaly_suffix(name) for name in scored.host_names]
            files += [truncated + prompt_suffix(name) for name in scored.prompt_names]
        return files

    def _scored(self) -> _NetworkWithScores:
        network = self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network
        if not self.has_scores:
            raise ZePTError(
                f"--save_scores and --save_anomaly_maps want a model of a ZePT trainer; this one was trained by "
                f"{self.trainer_name}. Leave the two flags out, or choose the model with -tr ZePTTrainer or -m"
            )
        return _NetworkWithScores(network, self.save_scores, self.save_anomaly_maps)

    def _manage_input_and_output_lists(
        self,
        list_of_lists_or_source_folder: Any,
        output_folder_or_list_of_truncated_output_files: Any,
        folder_with_segs_from_prev_stage: str | None = None,
        overwrite: bool = True,
        part_id: int = 0,
        num_parts: int = 1,
        save_probabilities: bool = False,
    ) -> tuple[list[Any], list[str] | None, list[Any]]:
        """nnU-Net's lists; with --continue_prediction a case whose scores are missing counts as not predicted."""
        partly = self._extra and not overwrite
        inputs, outputs, previous = super()._manage_input_and_output_lists(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            folder_with_segs_from_prev_stage,
            overwrite or partly,
            part_id,
            num_parts,
            save_probabilities,
        )
        if not partly or outputs is None:
            return inputs, outputs, previous
        endings = [self.dataset_json["file_ending"], *([".npz"] if save_probabilities else [])]
        todo = [
            i
            for i, name in enumerate(outputs)
            if not all(os.path.isfile(f) for f in [*(name + e for e in endings), *self._extra_files(name)])
        ]
        return [inputs[i] for i in todo], [outputs[i] for i in todo], [previous[i] for i in todo]

    # ------------------------------------------------------------------------------------------------ prediction
    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[Mapping[str, Any]],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> Any:
        """nnU-Net's, remembering which case is at work."""
        if not self._extra:
            return super().predict_from_data_iterator(
                data_iterator, save_probabilities, num_processes_segmentation_export
            )
        with Exports(num_processes_segmentation_export) as self._exports:
            try:
                return super().predict_from_data_iterator(
                    self._remember(data_iterator), save_probabilities, num_processes_segmentation_export
                )
            finally:
                self._item = None

    def _remember(self, items: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for item in items:
            self._item = item
            yield item

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """(C, *) → logits (heads, *); the further channels go to the export workers.

        Raises:
            ZePTError: scores or maps are asked for where nnU-Net predicts without files or without worker processes.
        """
        if not self._extra:
            return super().predict_logits_from_preprocessed_data(data)
        if self._item is None or self._item["ofile"] is None or self._exports is None:
            raise ZePTError(NEEDS_WORKERS)
        plain, label_manager = self.network, self.label_manager
        scored = self._scored()
        heads = label_manager.num_segmentation_heads
        try:
            self.network, self.label_manager = scored, _NumChannels(heads + scored.num_scores)
            channels = super().predict_logits_from_preprocessed_data(data)
        finally:
            self.network, self.label_manager = plain, label_manager
        scores = channels[heads:].numpy()
        self._exports.submit(
            ScoreExport(
                self._item["ofile"],
                scored.tumor_names,
                scored.host_names,
                scored.prompt_names,
                self.plans_manager,
                self.configuration_manager,
                dict(self._item["data_properties"]),
            ),
            scores,
        )
        return channels[:heads].clone()


class _NumChannels:
    """All that the sliding window asks of a label manager."""

    def __init__(self, num_segmentation_heads: int):
        self.num_segmentation_heads = num_segmentation_heads


class _NetworkWithScores(nn.Module):
    """(B, C, *) → the network's logits, its tumor logits, its hosts' anomaly scores and visual prompts, as channels."""

    def __init__(self, network: Any, with_tumors: bool, with_anomaly: bool):
        super().__init__()
        self.network = network
        taxonomy = network.taxonomy
        hosts = sorted({i for indices in taxonomy.host_indices() for i in indices}) if with_anomaly else []
        self.host_indices = hosts
        self.host_names = tuple(taxonomy.organs[i].name for i in hosts)
        self.prompt_names = self.host_names if network.self_prompting else ()
        self.tumor_names = tuple(t.name for t in taxonomy.tumors) if with_tumors else None
        self.num_scores = len(self.tumor_names or ()) + len(hosts) + len(self.prompt_names)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The wrapped network's."""
        return self.network.load_state_dict(state_dict, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.network.forward_scores(x, with_prompts=bool(self.prompt_names))
        parts = [scores["logits"]]
        if self.tumor_names is not None:
            parts.append(scores["tumor_logits"])
        if self.host_indices:
            parts.append(scores["anomaly"][:, self.host_indices])
        if self.prompt_names:
            parts.append(scores["prompts"][:, self.host_indices])
        return torch.cat([p.to(parts[0].dtype) for p in parts], 1)


@dataclass(frozen=True)
class ScoreExport:
    """Brings one case's scores to the image's own grid and writes them. Runs in a worker process."""

    truncated: str
    """Path of the output without its ending."""
    tumor_names: tuple[str, ...] | None
    """None: no score file."""
    host_names: tuple[str, ...]
    prompt_names: tuple[str, ...]
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    properties: dict[str, Any]

    def __call__(self, scores: np.ndarray) -> None:
        """scores: (U + hosts + prompts, *), preprocessed grid."""
        num_tumors = len(self.tumor_names or ())
        if self.tumor_names is not None:
            logits = self._to_native(scores[:num_tumors])
            path = Path(self.truncated + SCORES_SUFFIX)
            partial = path.with_name(f"{path.name}.partial.npz")
            np.savez_compressed(
                partial,
                logits=logits.clip(-LOGIT_LIMIT, LOGIT_LIMIT).astype(np.float16),
                classes=np.array(self.tumor_names, dtype=np.str_),
            )
            os.replace(partial, path)
        suffixes = [*map(anomaly_suffix, self.host_names), *map(prompt_suffix, self.prompt_names)]
        for number, (suffix, score) in enumerate(zip(suffixes, scores[num_tumors:], strict=True)):
            path = Path(self.truncated + suffix)
            partial = path.with_name(f"partial.{path.name}")
            native = self._to_native(score[None])[0]
            is_prompt = number >= len(self.host_names)
            write_image((native > 0.5).astype(np.uint8) if is_prompt else native, partial, self.properties)
            os.replace(partial, path)

    def _to_native(self, scores: np.ndarray) -> np.ndarray:
        """Resample, undo crop and transpose, as nnU-Net does: (K, *) → float32 (K, *)."""
        properties, plans = self.properties, self.plans_manager
        size = tuple(properties["shape_before_cropping"])
        if not len(scores):
            backward = [size[i] for i in plans.transpose_backward]
            return np.zeros((0, *backward), dtype=np.float32)
        target_shape = properties["shape_after_cropping_and_before_resampling"]
        spacing = [properties["spacing"][i] for i in plans.transpose_forward]
        current = self.configuration_manager.spacing
        if len(current) != len(target_shape):
            current = [spacing[0], *current]
        resampled = self.configuration_manager.resampling_fn_probabilities(scores, target_shape, current, spacing)
        resampled = np.asarray(resampled, dtype=np.float32)
        native = np.empty((len(scores), *size), dtype=np.float32)
        native[:] = resampled.min(axis=tuple(range(1, resampled.ndim)), keepdims=True)
        inside = (slice(None), *(slice(low, high) for low, high in properties["bbox_used_for_cropping"]))
        native[inside] = resampled
        return native.transpose([0] + [i + 1 for i in plans.transpose_backward])


def write_image(array: np.ndarray, path: Path, properties: Mapping[str, Any]) -> None:
    """Write a NIfTI with the geometry that nnU-Net's reader found in the case's image.

    Args:
        array: (*,), three axes in nnU-Net's order; uint8 stays that, all else becomes float32.
        path: ends in .nii.gz.
        properties: the reader's; of SimpleITKIO, NibabelIO or NibabelIOWithReorient, else only the spacing is known.
    """
    array = np.ascontiguousarray(array, dtype=np.uint8 if array.dtype == np.uint8 else np.float32)
    if "nibabel_stuff" in properties:
        import nibabel
        from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

        geometry = properties["nibabel_stuff"]
        affine = geometry.get("reoriented_affine", geometry["original_affine"])
        image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine=affine)
        if "reoriented_affine" in geometry:
            back = ornt_transform(axcodes2ornt("RAS"), io_orientation(geometry["original_affine"]))
            image = image.as_reoriented(back)
        nibabel.save(image, str(path))
        return
    import SimpleITK as sitk

    known = properties.get("sitk_stuff")
    if known is not None and len(known["spacing"]) == 2:
        array = array[0]
    image = sitk.GetImageFromArray(array)
    if known is None:
        image.SetSpacing([float(s) for s in properties["spacing"][::-1]])
    else:
        image.SetSpacing(known["spacing"])
        image.SetOrigin(known["origin"])
        image.SetDirection(known["direction"])
    sitk.WriteImage(image, str(path), True)


class Exports:
    """Worker processes for `ScoreExport`. It holds back a prediction that is far ahead, and raises their errors."""

    def __init__(self, num_processes: int):
        self.num_processes = max(1, num_processes)
        self._pool = ProcessPoolExecutor(self.num_processes, mp_context=multiprocessing.get_context("spawn"))
        self._pending: set[Future[None]] = set()

    def submit(self, export: ScoreExport, scores: np.ndarray) -> None:
        """Hand over one case; waits while two more than there are workers are unfinished."""
        while len(self._pending) >= self.num_processes + 2:
            done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
        self._pending.add(self._pool.submit(export, scores))

    def __enter__(self) -> Exports:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for future in self._pending:
                    future.result()
        finally:
            self._pool.shutdown(cancel_futures=True)


def check_folds(model_folder: Path, folds: Sequence[int | str], checkpoint_name: str) -> None:
    """Raise where the model folder lacks something that the prediction reads.

    Raises:
        ZePTError: names the missing file, and which folds are there.
    """
    for name in ("plans.json", "dataset.json"):
        if not (model_folder / name).is_file():
            raise ZePTError(
                f"{model_folder} is not a model folder: it holds no {name}. Check -d, -tr, -p and -c, or give the "
                "folder TRAINER__PLANS__CONFIGURATION with -m"
            )
    missing = [f for f in folds if not (model_folder / f"fold_{f}" / checkpoint_name).is_file()]
    if missing:
        there = sorted(p.parent.name for p in model_folder.glob(f"fold_*/{checkpoint_name}"))
        raise ZePTError(
            f"{model_folder}: fold {missing[0]} has no {checkpoint_name}; with it: {there or 'no fold'}. "
            "Choose the folds with -f, another checkpoint with -chk, or finish the training"
        )
