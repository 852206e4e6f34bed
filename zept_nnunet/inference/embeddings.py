"""Query embeddings of whole scans: the mean over sliding windows, weighted by how much of the organ each holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from zept_nnunet.errors import ZePTError
from zept_nnunet.inference.predict import check_folds

_LEAST_VOXELS = 20.0  # of an organ or of a tumor's hosts, in all windows together: less is none


@dataclass(frozen=True)
class CaseEmbeddings:
    """One scan and fold: class names and float32 (N, E), a row of NaN where the scan does not show the organ."""

    case: str
    fold: str
    names: tuple[str, ...]
    embeddings: np.ndarray


def embed_cases(
    model_folder: Path,
    images: Path,
    folds: Sequence[str] = ("0",),
    checkpoint_name: str = "checkpoint_final.pth",
    device: torch.device | None = None,
) -> Iterator[CaseEmbeddings]:
    """Embed every image of a folder.

    Raises:
        ZePTError: the folder is no model of a ZePT trainer, a fold is missing, or there is no image.
    """
    check_folds(model_folder, folds, checkpoint_name)
    predictor = nnUNetPredictor(
        device=device or torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False
    )
    predictor.initialize_from_trained_model_folder(str(model_folder), list(folds), checkpoint_name)
    network: Any = predictor.network
    if not hasattr(network, "forward_embeddings"):
        raise ZePTError(f"{model_folder} was not trained by a ZePT trainer: it has no queries to compare with texts")
    ending = predictor.dataset_json["file_ending"]
    files = create_lists_from_splitted_dataset_folder(str(images), ending)
    if not files:
        raise ZePTError(f"no images in {images}: wanted CASE_0000{ending}")
    if not network.predict_tumors:
        raise ZePTError(f"{model_folder} is a stage I model: it has no tumor queries yet")
    names = tuple(c.name for c in network.taxonomy.classes)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    network = network.to(predictor.device).eval()
    for channels in files:
        data, _, _ = preprocessor.run_case(
            channels, None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
        case = Path(channels[0]).name[: -len(f"_0000{ending}")]
        for fold, weights in zip(folds, predictor.list_of_parameters, strict=True):
            network.load_state_dict(weights)
            yield CaseEmbeddings(case, fold, names, _embed(predictor, network, torch.as_tensor(data)))


@torch.inference_mode()
def _embed(predictor: nnUNetPredictor, network: Any, data: torch.Tensor) -> np.ndarray:
    """(C, *) → (N, E)."""
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
