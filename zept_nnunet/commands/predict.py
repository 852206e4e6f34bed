"""`zept predict`: nnUNetv2_predict, with scores and anomaly maps beside the segmentations."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.threads import cpu_threads


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "predict",
        help="predict as nnUNetv2_predict does, with tumor scores and anomaly maps",
        description="Segment images as nnUNetv2_predict does; flags mean what they mean there, and the segmentations "
        "are the same. --save_scores and --save_anomaly_maps write more beside them.",
    )
    parser.add_argument("-i", required=True, metavar="FOLDER", help="images, in nnU-Net's naming (CASE_0000.nii.gz)")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="output folder")
    parser.add_argument("-m", default=None, metavar="MODEL_FOLDER", help="model folder; replaces -d, -tr, -p and -c")
    parser.add_argument("-d", default=None, help="dataset ID or name")
    parser.add_argument("-p", default="nnUNetPlans", help="plans (default: nnUNetPlans; zept plan writes ZePTPlans)")
    parser.add_argument("-tr", default="ZePTTrainer", help="trainer (default: ZePTTrainer)")
    parser.add_argument("-c", default=None, help="configuration, such as 3d_fullres")
    parser.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"], help="folds (default: 0 1 2 3 4)")
    parser.add_argument("-step_size", type=float, default=0.5, help="step of the sliding window (default: 0.5)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring at test time")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--save_probabilities", action="store_true", help="also write nnU-Net's .npz, for ensembling")
    parser.add_argument("--save_scores", action="store_true", help="also write CASE_scores.npz: logits of the tumors")
    parser.add_argument(
        "--save_anomaly_maps",
        action="store_true",
        help="also write CASE_anomaly_HOST.nii.gz and CASE_prompt_HOST.nii.gz, the visual prompt, for every host",
    )
    parser.add_argument(
        "--scores_if_any",
        action="store_true",
        help="with the two flags above: predict a model that has no scores without them, instead of refusing it",
    )
    parser.add_argument("--continue_prediction", action="store_true", help="leave complete cases as they are")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default: checkpoint_final.pth)")
    parser.add_argument(
        "-npp", type=int, default=process_default("nnUNet_npp"), help="processes for preprocessing (default: 3)"
    )
    parser.add_argument(
        "-nps", type=int, default=process_default("nnUNet_nps"), help="processes for the export (default: 3)"
    )
    parser.add_argument("-prev_stage_predictions", default=None, help="predictions of the first stage, for a cascade")
    parser.add_argument(
        "-num_parts", type=int, default=1, help="into how many calls the cases are divided (default: 1)"
    )
    parser.add_argument("-part_id", type=int, default=0, help="which of these calls this is, from 0")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: cuda")
    parser.add_argument("--disable_progress_bar", action="store_true")
    parser.add_argument("--not_on_device", action="store_true", help="keep the results off the GPU: for large images")
    parser.set_defaults(func=run)


def process_default(variable: str) -> int:
    """nnU-Net's variable for a number of processes, else 3, as nnUNetv2_predict has it."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 3


def run(args: argparse.Namespace) -> int:
    """Check, then predict."""
    folds = _folds(args.f)
    if not 0 <= args.part_id < args.num_parts:
        raise ZePTError(f"-part_id counts from 0 to -num_parts - 1 = {args.num_parts - 1}; got {args.part_id}")
    if not 0 < args.step_size <= 1:
        raise ZePTError(f"-step_size wants more than 0 and at most 1; got {args.step_size}")
    if not Path(args.i).is_dir():
        raise ZePTError(f"-i {args.i} is no folder; give the folder with the images")
    model_folder = _model_folder(args)

    import torch

    from zept_nnunet.inference.predict import NEEDS_WORKERS, ZePTPredictor, check_folds

    check_folds(model_folder, folds, args.chk)
    is_sequential = args.npp == 0 and args.nps == 0
    if is_sequential and (args.save_scores or args.save_anomaly_maps):
        raise ZePTError(NEEDS_WORKERS)
    if not is_sequential and min(args.npp, args.nps) < 1:
        raise ZePTError(f"-npp and -nps want 1 or more, or 0 both (no worker processes); got {args.npp} and {args.nps}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ZePTError("no CUDA device is available; choose another with -device cpu")
    if args.device == "cpu":
        torch.set_num_threads(cpu_threads())
    elif args.device == "cuda":
        torch.set_num_threads(1)

    predictor = ZePTPredictor(
        tile_step_size=args.step_size,
        use_gaussian=True,
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=not args.not_on_device,
        device=torch.device(args.device),
        verbose=args.verbose,
        verbose_preprocessing=args.verbose,
        allow_tqdm=not args.disable_progress_bar,
        save_scores=args.save_scores,
        save_anomaly_maps=args.save_anomaly_maps,
    )
    predictor.initialize_from_trained_model_folder(str(model_folder), folds, checkpoint_name=args.chk)
    if args.scores_if_any and not predictor.has_scores:
        print(f"{model_folder} was trained by {predictor.trainer_name}, which gives no scores: segmentations alone")
        predictor.save_scores = predictor.save_anomaly_maps = False
    predictor.check_scores_available()
    if predictor.configuration_manager.previous_stage_name is not None and args.prev_stage_predictions is None:
        raise ZePTError(
            f"{model_folder} is the second stage of a cascade: give the folder with the predictions of "
            f"{predictor.configuration_manager.previous_stage_name} with -prev_stage_predictions"
        )
    common = {
        "save_probabilities": args.save_probabilities,
        "overwrite": not args.continue_prediction,
        "folder_with_segs_from_prev_stage": args.prev_stage_predictions,
    }
    os.makedirs(args.o, exist_ok=True)
    if is_sequential:
        predictor.predict_from_files_sequential(args.i, args.o, **common)
    else:
        predictor.predict_from_files(
            args.i,
            args.o,
            num_processes_preprocessing=args.npp,
            num_processes_segmentation_export=args.nps,
            num_parts=args.num_parts,
            part_id=args.part_id,
            **common,
        )
    return 0


def _folds(given: list[str]) -> list[int | str]:
    wrong = [f for f in given if f != "all" and not f.isdigit()]
    if wrong:
        raise ZePTError(f"-f wants fold numbers or 'all'; got {wrong[0]!r}")
    return [f if f == "all" else int(f) for f in given]


def _model_folder(args: argparse.Namespace) -> Path:
    if args.m is not None:
        if args.d is not None or args.c is not None:
            raise ZePTError("-m names a model folder already: leave -d and -c out")
        return Path(args.m)
    if args.d is None or args.c is None:
        raise ZePTError("say which model: -d DATASET -c CONFIGURATION [-tr TRAINER] [-p PLANS], or -m MODEL_FOLDER")

    from nnunetv2.paths import nnUNet_results
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    if not nnUNet_results.is_set():
        raise ZePTError("the environment variable nnUNet_results is not set: export nnUNet_results=FOLDER, or use -m")
    try:
        return Path(get_output_folder(args.d, args.tr, args.p, args.c))
    except RuntimeError as error:
        raise ZePTError(f"-d {args.d}: {error}") from error
