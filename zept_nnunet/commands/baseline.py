"""``zept baseline``: what a practitioner would do instead, on the same data, plans and budget, each one command.

Every step is a stock nnU-Net command, printed before it runs; what is finished is skipped, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zept_nnunet.commands.demo import Step, positive_int, run_step
from zept_nnunet.commands.trainers_path import trainers_path
from zept_nnunet.errors import ZePTError
from zept_nnunet.files import write_whole
from zept_nnunet.threads import cpu_threads

if TYPE_CHECKING:
    from zept_nnunet.datasets.derived import Source
    from zept_nnunet.inference.baselines import Method, Model
    from zept_nnunet.training.budget import Budget

RECORD = "zept_baseline.json"  # in the output folder: what its predictions are


@dataclass(frozen=True)
class Recipe:
    """`data`: a kind of derived dataset (datasets/derived.py), or "supervised"."""

    data: str
    trainer: str
    purpose: str


_ORGANS = ("organs", "nnUNetTrainerBaseline")
RECIPES = {
    "any_tumor": Recipe("any_tumor", "nnUNetTrainerBaseline", "all tumors in one class, given to the nearest host"),
    "any_tumor_plus": Recipe("any_tumor", "nnUNetTrainerAnyTumorPlus", "the same with synthetic anomalies"),
    "any_tumor_rel": Recipe("any_tumor", "nnUNetTrainerAnyTumorRel", "the same with host-relative features too"),
    "max_logit": Recipe(*_ORGANS, "organ model; score: minus the largest logit"),
    "entropy": Recipe(*_ORGANS, "organ model; score: entropy of the softmax"),
    "host_deviation": Recipe(*_ORGANS, "organ model; score: deviation from the host's median HU, nothing learned"),
    "supervised": Recipe("supervised", "nnUNetTrainerBaseline", "labels for the unseen tumors too: the ceiling"),
    "zept_paper": Recipe("declared", "ZePTTrainerPaperBudget", "ZePT as its authors compute it"),
}


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "baseline",
        help="train and predict with a method to compare ZePT with",
        description="Baselines on the data, plans and split of a planned dataset:\n"
        + "\n".join(f"  {name:<15} {recipe.purpose}" for name, recipe in RECIPES.items())
        + "\nEach writes segmentations with the dataset's labels, unseen tumors included, and CASE_scores.npz.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("-d", required=True, metavar="ID", help="dataset ID or name: planned and preprocessed")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="output folder")
    parser.add_argument("-i", default=None, metavar="FOLDER", help="images (default: the dataset's imagesTs)")
    parser.add_argument("-c", default="3d_fullres", help="configuration (default: 3d_fullres)")
    parser.add_argument("-f", default="0", help="fold (default: 0)")
    parser.add_argument("-p", default="nnUNetPlans", help="plans (default: nnUNetPlans)")
    parser.add_argument("--supervised-dataset", metavar="ID", help="of supervised: the dataset with all tumors labeled")
    parser.add_argument("--epochs", type=positive_int, help="train this many epochs")
    parser.add_argument("--iterations", type=positive_int, help="train this many iterations an epoch")
    parser.add_argument("--minutes", type=float, help="train for this wall-clock time instead of a number of epochs")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), help="default: adamw")
    parser.add_argument("--sigma-mm", type=float, default=3.0, help="of host_deviation's Gaussian (default: 3)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring at test time")
    parser.add_argument("-np", type=positive_int, default=2, help="worker processes (default: 2)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: cuda")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check, then train what is not trained, then predict what is not predicted."""
    recipe = RECIPES.get(args.name)
    if recipe is None:
        raise ZePTError(f"{args.name!r} is no baseline; wanted one of {', '.join(RECIPES)}")
    if (args.name == "supervised") != (args.supervised_dataset is not None):
        raise ZePTError(
            "supervised wants --supervised-dataset ID, a dataset with the unseen tumors among its training labels (the "
            "phantom writes one with zept phantom --supervised-id); no other baseline takes it"
        )
    if args.f != "all" and not args.f.isdigit():
        raise ZePTError(f"-f wants a fold number or 'all'; got {args.f!r}")
    if args.sigma_mm < 0:
        raise ZePTError(f"--sigma-mm wants 0 or more; got {args.sigma_mm}")
    if args.name == "zept_paper" and args.optimizer == "sgd":
        raise ZePTError("--optimizer is for nnU-Net's own trainer; ZePTTrainerPaper keeps its AdamW. Leave it out")
    runner = Runner.from_arguments(args, recipe)
    runner.run()
    print(f"\npredictions: {runner.output}\nnext: zept evaluate -d {runner.source.name} -i {runner.output} -o REPORT")
    return 0


@dataclass
class Runner:
    """One baseline: its settings, checked, and the steps."""

    name: str
    recipe: Recipe
    source: Source
    args: argparse.Namespace
    budget: Budget
    output: Path
    cases: dict[str, list[str]]  # test case → image files
    raw: Path
    preprocessed: Path
    results: Path
    environment: dict[str, str]
    started: float
    steps: int = 0

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, recipe: Recipe) -> Runner:
        """Check everything that can be checked before work begins.

        Raises:
            ZePTError: says what is missing.
        """
        folders = {}
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            if not os.environ.get(variable):
                raise ZePTError(f"the environment variable {variable} is not set: export {variable}=FOLDER")
            folders[variable] = Path(os.environ[variable])
        variable = "nnUNet_extTrainer"  # ours first, in this process as in those that it starts
        trainers = [str(trainers_path()), *os.environ.get(variable, "").split(os.pathsep)]
        os.environ[variable] = os.pathsep.join(dict.fromkeys(t for t in trainers if t))

        import torch
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        from zept_nnunet.datasets.derived import Source
        from zept_nnunet.training.budget import Budget

        if args.device == "cuda" and not torch.cuda.is_available():
            raise ZePTError("no CUDA device is available; choose another with -device cpu")
        given = {"EPOCHS": args.epochs, "ITERATIONS": args.iterations, "MINUTES": args.minutes}
        given |= {"OPTIMIZER": args.optimizer}
        budget = Budget.from_environment(os.environ | {f"ZEPT_{k}": str(v) for k, v in given.items() if v is not None})

        source = Source.read(_dataset(args.d, "-d", folders["nnUNet_raw"]))
        planned = folders["nnUNet_preprocessed"] / source.name
        for name in (f"{args.p}.json", "dataset_fingerprint.json"):
            if not (planned / name).is_file():
                raise ZePTError(
                    f"{planned / name} is missing; plan first: nnUNetv2_plan_and_preprocess -d {args.d}, or zept plan"
                )
        plans = _read(planned / f"{args.p}.json")
        if args.c not in plans["configurations"]:
            raise ZePTError(f"{args.p} of {source.name} has no configuration {args.c!r}: {[*plans['configurations']]}")
        if PlansManager(plans).get_configuration(args.c).previous_stage_name is not None:
            raise ZePTError(f"{args.c} is the second stage of a cascade; a baseline wants one that stands alone")
        images = Path(args.i) if args.i else source.folder / "imagesTs"
        cases = _cases(images, source.file_ending)
        environment = os.environ | budget.to_environment() | {"PYTHONUNBUFFERED": "1"}
        return cls(
            args.name,
            recipe,
            source,
            args,
            budget,
            Path(args.o),
            cases,
            folders["nnUNet_raw"],
            folders["nnUNet_preprocessed"],
            folders["nnUNet_results"],
            environment,
            time.monotonic(),
        )

    def run(self) -> None:
        """Dataset, plans, preprocessing, training, prediction; each unless it is there."""
        from zept_nnunet.datasets.derived import alone

        record = self._record()
        self._check_output(record)
        folder = self._dataset()
        plans = self.args.p if self.recipe.data != "supervised" else f"{self.args.p}_from{self.source.name[7:10]}"
        labels = _read(folder / "dataset.json")["labels"]
        self._check_labels(labels, folder)
        model = self.results / folder.name / f"{self.recipe.trainer}__{plans}__{self.args.c}"
        with alone(self.preprocessed / folder.name / f".{plans}"):
            self._preprocess(folder, plans)
        with alone(self.results / folder.name / f".{model.name}__fold_{self.args.f}"):
            self._train(folder, plans, model / f"fold_{self.args.f}")
        self.output.mkdir(parents=True, exist_ok=True)
        if not (self.output / RECORD).is_file():
            _write(self.output / RECORD, record)
        if self.name == "zept_paper":
            self._predict_with_zept(model)
        else:
            self._predict(model, labels)
        self._describe(model)

    # ------------------------------------------------------------------------------------------------ the output
    def _record(self) -> dict[str, Any]:
        record = {
            "baseline": self.name,
            "dataset": self.source.name,
            "configuration": self.args.c,
            "plans": self.args.p,
            "fold": self.args.f,
            "budget": self.budget.to_dict(),
            "mirroring": not self.args.disable_tta,
        }
        if self.name == "host_deviation":
            record["sigma_mm"] = self.args.sigma_mm
        if self.args.supervised_dataset:
            record["supervised_dataset"] = str(self.args.supervised_dataset)
        return record

    def _check_output(self, record: Mapping[str, Any]) -> None:
        path = self.output / RECORD
        if path.is_file():
            found = _read(path)
            different = [k for k in record if found.get(k) != record[k]]
            if different:
                there, now = ({k: d.get(k) for k in different} for d in (found, record))
                raise ZePTError(
                    f"{self.output} holds predictions of another run: {there} there, {now} now. Choose another folder "
                    "with -o, or remove that one"
                )
        elif self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise ZePTError(f"{self.output} is not empty, and no baseline made it. Choose another folder with -o")

    def _describe(self, model: Path) -> None:
        """dataset.json and plans.json beside the predictions, as nnU-Net leaves them."""
        from zept_nnunet.inference.baselines import output_dataset_json, output_plans

        _write(self.output / "dataset.json", output_dataset_json(self.source))
        _write(self.output / "plans.json", output_plans(self.source, _read(model / "plans.json")))

    # ------------------------------------------------------------------------------------------------ the data
    def _dataset(self) -> Path:
        from zept_nnunet.datasets.derived import Source, derive_dataset

        if self.recipe.data == "supervised":
            return Source.read(_dataset(self.args.supervised_dataset, "--supervised-dataset", self.raw)).folder
        return derive_dataset(self.source, self.recipe.data, self.raw)

    def _check_labels(self, labels: Mapping[str, Any], folder: Path) -> None:
        from zept_nnunet.inference.baselines import Method

        if self.name != "zept_paper":
            try:
                Method.of(self.name, self.source, labels)
            except ZePTError as error:
                raise ZePTError(f"{folder / 'dataset.json'}: {error}") from error

    def _preprocess(self, folder: Path, plans_name: str) -> None:
        """The source's plans, split and fingerprint for another dataset; then nnU-Net's preprocessing."""
        source, target = self.preprocessed / self.source.name, self.preprocessed / folder.name
        shutil.copyfile(folder / "dataset.json", target / "dataset.json")
        if not (target / "dataset_fingerprint.json").is_file():
            shutil.copyfile(source / "dataset_fingerprint.json", target / "dataset_fingerprint.json")
        self._share_split(source / "splits_final.json", target / "splits_final.json")
        planned = _comparable(_read(source / f"{self.args.p}.json"), self.args.p)
        path = target / f"{plans_name}.json"
        if not path.is_file():
            move = ("nnUNetv2_move_plans_between_datasets", "-s", self.source.name, "-t", folder.name)
            self._step("the same plans", (*move, "-sp", self.args.p, "-tp", plans_name))
            _write(path, self._with_own_block(_read(path), folder))
        if _comparable(_read(path), plans_name) != planned:
            raise ZePTError(
                f"{path} is not {self.args.p} of {self.source.name} any more: one of them was planned anew. Remove "
                f"{target} and the models of {folder.name}; both are made again"
            )
        if not self._is_preprocessed(target, folder, _read(path)):
            how = ("-plans_name", plans_name, "-c", self.args.c, "-np", str(self.args.np))
            self._step("preprocess", ("nnUNetv2_preprocess", "-d", str(int(folder.name[7:10])), *how))

    def _with_own_block(self, plans: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The source's block describes its classes. A ZePT gets one of its own, with the same size and optimizer."""
        from zept_nnunet.plans_block import build_block, shared_settings

        block = plans.pop("zept", None)
        if block is not None and self.recipe.data == "declared":
            path = folder / "dataset.json"
            plans["zept"] = build_block(_read(path), source=str(path), settings=shared_settings(block))
        return plans

    def _share_split(self, source: Path, target: Path) -> None:
        """Without a split file nnU-Net makes one from the case names, the same for both."""
        if not source.is_file():
            return
        split = _read(source)
        cases = {case for fold in split for part in fold.values() for case in part}
        if self.recipe.data == "supervised":
            there = set(_source_cases(_dataset(self.args.supervised_dataset, "--supervised-dataset", self.raw)))
            if there != cases:
                return  # other cases: a split of its own
        if not target.is_file():
            shutil.copyfile(source, target)
        elif _read(target) != split:
            raise ZePTError(f"{target} is not the split of {source}: make them equal, or remove the former")

    def _is_preprocessed(self, target: Path, folder: Path, plans: dict[str, Any]) -> bool:
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        data = target / PlansManager(plans).get_configuration(self.args.c).data_identifier
        cases, ending = _source_cases(folder), self.source.file_ending
        return all((data / f"{c}.pkl").is_file() for c in cases) and all(
            (target / "gt_segmentations" / (c + ending)).is_file() for c in cases
        )

    # ------------------------------------------------------------------------------------------------ the model
    def _train(self, folder: Path, plans: str, fold: Path) -> None:
        from zept_nnunet.training.budget import BUDGET_FILE

        is_trained = (fold / "checkpoint_final.pth").is_file()
        started = is_trained or (fold / "checkpoint_latest.pth").is_file()
        if started:
            found = _read(fold / BUDGET_FILE) if (fold / BUDGET_FILE).is_file() else "an unknown one"
            if found != self.budget.to_dict():
                raise ZePTError(
                    f"{fold} holds a model of another budget: {found} there, {self.budget.to_dict()} now. Remove or "
                    "rename that folder, or set nnUNet_results to another one"
                )
        if is_trained and (fold / "validation" / "summary.json").is_file():
            return
        which = (folder.name, self.args.c, self.args.f, "-tr", self.recipe.trainer, "-p", plans)
        flags = ("--val",) if is_trained else ("--c",) if started else ()
        self._step(
            "validate" if is_trained else "train", ("nnUNetv2_train", *which, "-device", self.args.device, *flags)
        )

    # ------------------------------------------------------------------------------------------------ predictions
    def _predict(self, folder: Path, labels: Mapping[str, Any]) -> None:
        import torch

        from zept_nnunet.inference.baselines import OUT_OF_DISTRIBUTION, Method, Model, predict

        if self.args.device == "cpu":
            torch.set_num_threads(cpu_threads())
        fold = "all" if self.args.f == "all" else int(self.args.f)
        model = Model(folder, fold, self.args.device, not self.args.disable_tta, self.args.np)
        method = Method.of(self.name, self.source, labels, self.args.sigma_mm)
        if self.name in OUT_OF_DISTRIBUTION:
            method = replace(method, threshold=self._threshold(method, model))
        print(f"\n=== predict {len(self.cases)} cases", flush=True)
        predict(model, method, self.cases, self.output)

    def _threshold(self, method: Method, model: Model) -> float:
        """Chosen on the fold's validation cases and the seen tumors; kept in the output folder's record."""
        from zept_nnunet.inference.baselines import calibrate, predict

        record = _read(self.output / RECORD)
        if "threshold" not in record:
            files = self.source.cases()
            ending = self.source.file_ending
            written = (model.folder / f"fold_{model.fold}" / "validation").glob(f"*{ending}")
            cases = sorted(p.name.removesuffix(ending) for p in written)
            print(f"\n=== choose the threshold on the validation cases {', '.join(cases)}", flush=True)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.output.parent, prefix=".zept_threshold_") as scratch:
                predict(model, method, {c: files[c]["images"] for c in cases}, Path(scratch))
                chosen = calibrate(method, self.source, Path(scratch), cases)
            record |= {"threshold": chosen.threshold, "threshold_cases": cases, "threshold_dice": chosen.dice}
            _write(self.output / RECORD, record)
        print(
            f"threshold {record['threshold']:.4g}: the best mean Dice ({record['threshold_dice']:.3f}) of the seen "
            f"tumors on the validation cases {', '.join(record['threshold_cases'])}"
        )
        return float(record["threshold"])

    def _predict_with_zept(self, model: Path) -> None:
        from zept_nnunet.inference.baselines import is_predicted

        if all(is_predicted(self.output, case, self.source.file_ending) for case in self.cases):
            return
        images = str(Path(self.args.i) if self.args.i else self.source.folder / "imagesTs")
        which = ("zept", "predict", "-m", str(model), "-f", self.args.f, "-i", images, "-o", str(self.output))
        how = ("--save_scores", "--continue_prediction", "-device", self.args.device)
        processes = ("-npp", str(self.args.np), "-nps", str(self.args.np))
        tta = ("--disable_tta",) if self.args.disable_tta else ()
        self._step("predict", (*which, *how, *processes, *tta))

    def _step(self, purpose: str, command: tuple[str, ...]) -> None:
        self.steps += 1
        variables = tuple(self.budget.to_environment().items()) if command[0] == "nnUNetv2_train" else ()
        run_step(Step(purpose, command, variables), f"[{self.steps}]", self.environment, self.started)


def _dataset(given: str, flag: str, raw: Path) -> Path:
    """The raw folder of a dataset ID or name."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        folder = raw / str(maybe_convert_to_dataset_name(str(given)))
    except (RuntimeError, ValueError) as error:
        raise ZePTError(f"{flag} {given}: {error}") from error
    if not (folder / "dataset.json").is_file():
        raise ZePTError(f"{flag} {given}: {folder / 'dataset.json'} is missing; the raw dataset is needed")
    return folder


def _source_cases(folder: Path) -> list[str]:
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    return sorted(map(str, get_filenames_of_train_images_and_targets(str(folder))))


def _cases(images: Path, file_ending: str) -> dict[str, list[str]]:
    """Case → its image files, channels in order."""
    from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

    if not images.is_dir():
        raise ZePTError(f"{images} is no folder; give the folder with the images with -i")
    found = create_lists_from_splitted_dataset_folder(str(images), file_ending, num_processes=1)
    cases = {Path(files[0]).name[: -len(file_ending) - 5]: files for files in found if files}
    if not cases:
        raise ZePTError(f"{images} holds no image named CASE_0000{file_ending}; give another folder with -i")
    return cases


def _comparable(plans: Mapping[str, Any], plans_name: str) -> dict[str, Any]:
    """What must be equal: all but the names of dataset and plans, the reader and ZePT's block."""
    kept = {k: v for k, v in plans.items() if k not in ("dataset_name", "plans_name", "image_reader_writer", "zept")}
    text = json.dumps(kept["configurations"], sort_keys=True)
    return {**kept, "configurations": json.loads(text.replace(f'"{plans_name}_', '"'))}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ZePTError(f"{path} cannot be read: {error}") from error


def _write(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")
