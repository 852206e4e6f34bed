"""`zept plan`: nnU-Net's fingerprint, planning and preprocessing, with ZePTPlanner."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zept_nnunet.commands.taxonomy import read_dataset_json
from zept_nnunet.errors import ZePTError

_CONFIGURATIONS = ["2d", "3d_fullres", "3d_lowres"]
_PLANNERS = ("ZePTPlanner", "ZePTSmallPlanner")
_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's defaults


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="fingerprint, plan and preprocess a dataset for ZePT",
        description="What nnUNetv2_plan_and_preprocess does, with a planner that counts the query decoder's memory and "
        "writes the classes and their knowledge into the plans (ZePTPlans). Flags mean what they mean there.",
    )
    parser.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="dataset IDs")
    parser.add_argument("-c", nargs="+", default=_CONFIGURATIONS, help="configurations to preprocess (default: all)")
    parser.add_argument("-np", nargs="+", type=int, default=None, help="processes for preprocessing, one or per -c")
    parser.add_argument("-npfp", type=int, default=8, help="processes for the fingerprint (default: 8)")
    parser.add_argument("-gpu_memory_target", type=float, default=None, help="GPU memory in GB (default: 8)")
    parser.add_argument("-overwrite_target_spacing", nargs=3, type=float, default=None, help="target spacing (three)")
    parser.add_argument(
        "-pl", default=_PLANNERS[0], choices=_PLANNERS, help="planner; the small one is for experiments on a CPU"
    )
    parser.add_argument("-overwrite_plans_name", default=None, help="name of the plans (default: the planner's own)")
    parser.add_argument("--verify_dataset_integrity", action="store_true", help="check the dataset first")
    parser.add_argument("--clean", action="store_true", help="make the fingerprint again; needed when the data changed")
    parser.add_argument("--no_pp", action="store_true", help="no preprocessing")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--no_pbar", action="store_true", help="no progress bar")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Validate every dataset, then work."""
    if args.np is not None and len(args.np) not in (1, len(args.c)):
        raise ZePTError(f"-np wants one number, or one per configuration ({len(args.c)}); got {len(args.np)}")
    from zept_nnunet.plans_block import build_block
    from zept_nnunet.taxonomy import Taxonomy

    names = {d: _check_dataset(d) for d in args.d}
    for name, (path, dataset_json) in names.values():
        print(f"{name}\n{Taxonomy.from_dataset_json(dataset_json, str(path)).table()}\n")
        build_block(dataset_json, source=str(path))

    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
        preprocess_dataset,
    )

    from zept_nnunet.plans.zept_planner import ZePTPlanner
    from zept_nnunet.plans.zept_small_planner import ZePTSmallPlanner

    planner = ZePTSmallPlanner if args.pl == "ZePTSmallPlanner" else ZePTPlanner
    processes = args.np if args.np is not None else [_PROCESSES.get(c, 4) for c in args.c]
    plans_name = "ZePTPlans"
    available: list[str] = []
    for d in args.d:
        extract_fingerprint_dataset(
            d,
            num_processes=args.npfp,
            check_dataset_integrity=args.verify_dataset_integrity,
            clean=args.clean,
            verbose=args.verbose,
            show_progress_bar=not args.no_pbar,
        )
        plans, plans_name = plan_experiment_dataset(
            d,
            planner,
            gpu_memory_target_in_gb=args.gpu_memory_target,
            overwrite_target_spacing=args.overwrite_target_spacing,
            overwrite_plans_name=args.overwrite_plans_name,
        )
        available = list(plans["configurations"])
    if not args.no_pp:
        for d in args.d:
            preprocess_dataset(d, plans_name, args.c, processes, args.verbose, not args.no_pbar)
    configuration = "3d_fullres" if "3d_fullres" in available else available[0]
    if args.no_pp:
        print(f"next: nnUNetv2_preprocess -d {args.d[-1]} -plans_name {plans_name} -c {configuration}")
    else:
        print(f"next: nnUNetv2_train {args.d[-1]} {configuration} 0 -tr ZePTTrainer -p {plans_name}")
    return 0


def _check_dataset(dataset_id: int) -> tuple[str, tuple[Path, dict[str, Any]]]:
    """The dataset's name, and its dataset.json with its path."""
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    for variable, path in (("nnUNet_raw", nnUNet_raw), ("nnUNet_preprocessed", nnUNet_preprocessed)):
        if not path.is_set():
            raise ZePTError(f"the environment variable {variable} is not set: export {variable}=FOLDER")
    try:
        name = str(convert_id_to_dataset_name(dataset_id))
    except RuntimeError as error:
        raise ZePTError(f"-d {dataset_id}: {error}") from error
    path = Path(str(nnUNet_raw)) / name / "dataset.json"
    if not path.is_file():
        raise ZePTError(f"-d {dataset_id}: {path} is missing; a dataset in nnU-Net's raw format holds one")
    return name, (path, read_dataset_json(path))
