"""`zept calibrate`: from which score on a model reports a tumor, by its false positives in healthy scans."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zept_nnunet.commands.predict import process_default
from zept_nnunet.errors import ZePTError
from zept_nnunet.threads import cpu_threads


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        help="choose each tumor's threshold for a stated rate of false positives per healthy scan",
        description="Predict healthy scans, choose for every tumor, added ones included, the lowest threshold at which "
        "no more than --rate false positives a scan stand, and write it into plans.json of the model folder. The stock "
        "nnUNetv2_predict applies it from then on. Without -i the model's own held-out training cases serve: each is "
        "predicted by the fold that was not trained on it, and counts where no tumor is labeled in the tumor's hosts.",
    )
    parser.add_argument("model_folder", type=Path, help="TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    parser.add_argument("-i", type=Path, metavar="FOLDER", help="healthy scans, in nnU-Net's naming (CASE_0000.nii.gz)")
    parser.add_argument(
        "--rate", type=float, default=0.1, help="false positives of a class per healthy scan (default: 0.1)"
    )
    parser.add_argument(
        "--remove", action="store_true", help="remove the thresholds: tumors are reported from one half on again"
    )
    parser.add_argument("-f", nargs="+", help="folds (default: all that are trained)")
    parser.add_argument("-step_size", type=float, default=0.5, help="step of the sliding window (default: 0.5)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring at test time")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default: checkpoint_final.pth)")
    parser.add_argument("-npp", type=int, default=process_default("nnUNet_npp"), help="preprocessing (default: 3)")
    parser.add_argument("-nps", type=int, default=process_default("nnUNet_nps"), help="export (default: 3)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: cuda")
    parser.add_argument("--disable_progress_bar", action="store_true")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check, calibrate, print."""
    if args.remove and args.i is not None:
        raise ZePTError("--remove takes no scans: leave -i out")
    if not args.rate > 0:
        raise ZePTError(f"--rate wants more than 0 false positives a scan; got {args.rate:g}")
    if args.i is not None and not args.i.is_dir():
        raise ZePTError(f"-i {args.i} is no folder; give the folder with the healthy scans")
    if min(args.npp, args.nps) < 1:
        raise ZePTError(f"-npp and -nps want 1 or more; got {args.npp} and {args.nps}")
    if not 0 < args.step_size <= 1:
        raise ZePTError(f"-step_size wants more than 0 and at most 1; got {args.step_size}")

    import torch

    from zept_nnunet.inference.calibrate import calibrate_model, write_thresholds
    from zept_nnunet.inference.predict import ZePTPredictor

    if args.remove:
        write_thresholds(args.model_folder, None)
        print(f"{args.model_folder}: no thresholds, tumors are reported from one half on")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ZePTError("no CUDA device is available; choose another with -device cpu")
    torch.set_num_threads(cpu_threads() if args.device == "cpu" else 1)
    predictor = ZePTPredictor(
        tile_step_size=args.step_size,
        use_mirroring=not args.disable_tta,
        device=torch.device(args.device),
        allow_tqdm=not args.disable_progress_bar,
        save_scores=True,
    )
    thresholds = calibrate_model(
        args.model_folder, predictor, args.rate, args.i, args.f, args.chk, (args.npp, args.nps)
    )
    width = max(len(t.name) for t in thresholds)
    print(f"\n{'tumor':<{width}}  reported from logit  chosen on healthy scans")
    for t in thresholds:
        logit = "argmax" if t.logit is None else f"{t.logit:.3f}"
        print(f"{t.name:<{width}}  {logit:>19}  {t.scans:>22}")
    left_out = [t.name for t in thresholds if not t.scans]
    if left_out:
        print(
            f"\nnote: no healthy scan for {', '.join(left_out)} (each has a tumor in its hosts): left as before. Give "
            "healthy scans with -i FOLDER"
        )
    few = [t.name for t in thresholds if 0 < t.scans * args.rate < 1]
    if few:
        print(
            f"\nnote: {args.rate:g} a scan is less than one false positive in all scans of {', '.join(few)}: their "
            "threshold lies above every score there, and says nothing of a rate that small"
        )
    print(f"\n{args.model_folder / 'plans.json'} holds them; nnUNetv2_predict applies them from now on")
    return 0
