"""Embeddings of whole scans: the mean over sliding windows, weighted by how many voxels each class takes up in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.predict import check_folds

_LEAST_VOXELS = 20  # of a class in its own map, in all windows together: fewer, and the model does not find it
BLANK_VALUES = (-2.0, -1.0, 0.0, 1.0, 2.0)  # intensities of constant patches, in normalized units


@dataclass(frozen=True)
class CaseEmbeddings:
    """One scan and fold: class names and float32 (N, E), a row of NaN where the model does not find the class."""

    case: str
    fold: str
    names: tuple[str, ...]
    embeddings: np.ndarray


class Embedder:
    """A trained model, to embed scans with."""

    def __init__(
        self,
        model_folder: Path,
        folds: Sequence[str] = ("0",),
        checkpoint_name: str = "checkpoint_final.pth",
        device: torch.device | None = None,
    ):
        """
        Raises:
            ZePTError: the folder is no model of a ZePT trainer, or a fold is missing.
        """
        check_folds(model_folder, folds, checkpoint_name)
        self.folds = folds
        self._predictor = predictor = nnUNetPredictor(
            device=device or torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False
        )
        predictor.initialize_from_trained_model_folder(str(model_folder), list(folds), checkpoint_name)
        network: Any = predictor.network
        if not hasattr(network, "forward_embeddings"):
            raise ZePTError(
                f"{model_folder} was not trained by a ZePT trainer: it has no queries to compare with texts"
            )
        if not network.predict_tumors:
            raise ZePTError(f"{model_folder} is a stage I model: it has no tumor queries yet")
        predictor.network = network.to(predictor.device).eval()
        self.names = tuple(c.name for c in network.taxonomy.classes)

    def cases(self, images: Path) -> Iterator[CaseEmbeddings]:
        """Embed every image of a folder.

        Raises:
            ZePTError: there is no image.
        """
        predictor = self._predictor
        ending = predictor.dataset_json["file_ending"]
        files = create_lists_from_splitted_dataset_folder(str(images), ending)
        if not files:
            raise ZePTError(f"no images in {images}: wanted CASE_0000{ending}")
        preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
        for channels in files:
            data, _, _ = preprocessor.run_case(
                channels, None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
            )
            case = Path(channels[0]).name[: -len(f"_0000{ending}")]
            yield from self._embed_by_folds(case, torch.as_tensor(data))

    def blank(self) -> Iterator[CaseEmbeddings]:
        """Embed one patch of each constant intensity: what the model says where there is nothing to see."""
        predictor = self._predictor
        channels = determine_num_input_channels(
            predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
        shape = [1, *predictor.configuration_manager.patch_size][-3:]  # of a 2D model one slice
        for value in BLANK_VALUES:
            yield from self._embed_by_folds(f"blank {value:g}", torch.full((channels, *shape), value))

    def _embed_by_folds(self, case: str, data: torch.Tensor) -> Iterator[CaseEmbeddings]:
        for fold, weights in zip(self.folds, self._predictor.list_of_parameters, strict=True):
            self._predictor.network.load_state_dict(weights)
            yield CaseEmbeddings(case, fold, self.names, self._embed(data))

    @torch.inference_mode()
    def _embed(self, data: torch.Tensor) -> np.ndarray:
        """(C, *) → (N, E)."""
        predictor = self._predictor
        network: Any = predictor.network
        patch = predictor.configuration_manager.patch_size
        padded, _ = pad_nd_image(data, patch, "constant", {"value": 0}, True, None)
        total: Any = 0.0
        voxels: Any = 0.0
        for window in predictor._internal_get_sliding_window_slicers(padded.shape[1:]):
            embeddings, weights = network.forward_embeddings(padded[window][None].float().to(predictor.device))
            weights = weights[0].double().cpu()
            total = total + weights[:, None] * embeddings[0].double().cpu()
            voxels = voxels + weights
        mean = (total / voxels.clamp_min(1e-12)[:, None]).numpy()
        mean[voxels.numpy() < _LEAST_VOXELS] = np.nan
        return np.asarray(mean, dtype=np.float32)
