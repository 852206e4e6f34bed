"""ZePT and what a practitioner would do instead, on the phantom: one table, mean and spread over seeds.

    python benchmarks/zero_shot.py --size small --seeds 3

Every method gets the same data, plans, split and budget, and is judged by the same evaluation. Seeds are those of the
training; the phantom is one (its version stands in its dataset.json). A run appends its figures to
results/zero_shot.csv (--results) and is skipped when they are there; a killed run goes on where it stopped. Figures on
the final-unseen types are left out unless --final asks for them, and then stand in results/zero_shot_final.csv:
variants are chosen on the development-unseen type.

With --minutes every method trains for the same wall-clock time; with --epochs too, each trains twice, and the table
holds both budgets side by side: equal iterations, equal wall-clock. Then --jobs must stay 1, or methods would take the
time from each other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from zept_nnunet.commands.baseline import RECIPES
from zept_nnunet.commands.trainers_path import trainers_path
from zept_nnunet.files import write_whole
from zept_nnunet.threads import KEEP_MEMORY, cpu_threads
from zept_nnunet.training.budget import training_minutes

RESULTS = Path(__file__).parent / "results" / "zero_shot.csv"
PHANTOM, SUPERVISED = 900, 901
PLANNER, PLANS = "ZePTSmallPlanner", "ZePTSmallPlans"
ZEPT_TRAINER = "ZePTTrainerBudget"
METHODS = (*RECIPES, "zept")
KEY = ["phantom", "size", "configuration", "epochs", "iterations", "minutes", "test_cases", "method", "seed"]
# case, scope, metric → column of the printed table; pooled: over the voxels of all test cases together
SHOWN = {
    ("pooled", "host", "auroc"): "AUROC in host",
    ("pooled", "host", "fpr95"): "FPR95 in host",
    ("pooled", "volume", "auroc"): "AUROC",
    ("pooled", "volume", "fpr95"): "FPR95",
    ("mean", "volume", "dsc"): "DSC",
}


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's folders of one size, and the runs' outputs."""

    folder: Path
    args: argparse.Namespace
    dataset_id = PHANTOM
    planner = PLANNER

    @property
    def plans_name(self) -> str:
        """What the planner calls its plans."""
        return self.planner.replace("Planner", "Plans")

    def environment(self, seed: int) -> dict[str, str]:
        """Datasets are shared by the seeds; each has results of its own."""
        threads = {}
        if self.args.device == "cpu":
            # nnU-Net gives every core to each training, whatever OMP_NUM_THREADS says: side by side they wait for
            # each other. And memory that is given back after every step is paid for by page faults.
            threads = {"ZEPT_THREADS": str(max(1, cpu_threads() // self.args.jobs))} | KEEP_MEMORY
        budget = {"EPOCHS": self.args.epochs, "ITERATIONS": self.args.iterations, "MINUTES": self.args.minutes}
        return os.environ | threads | {
            "nnUNet_raw": str(self.folder / "nnUNet_raw"),
            "nnUNet_preprocessed": str(self.folder / "nnUNet_preprocessed"),
            "nnUNet_results": str(self.folder / f"nnUNet_results_{self.budget}_seed{seed}"),
            "nnUNet_extTrainer": str(trainers_path()),
            "nnUNet_def_n_proc": "1",
            "ZEPT_SEED": str(seed),
            **{f"ZEPT_{name}": str(value) for name, value in budget.items() if value is not None},
        }  # fmt: skip

    @property
    def budget(self) -> str:
        """A name for the folders of one budget."""
        a = self.args
        return f"{a.configuration}_" + (f"{a.minutes:g}min" if a.minutes else f"{a.epochs}x{a.iterations}")

    def run(self, seed: int, name: str, *command: str | Path, **variables: str) -> None:
        """Run a command of this Python's environment; its output goes to a log that an error quotes."""
        program = Path(sys.executable).parent / str(command[0])
        log = self.folder / "logs" / f"{self.budget}_{name}_seed{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as out:
            out.write(f"$ {shlex.join(map(str, command))}\n")
            out.flush()
            code = subprocess.run(
                [str(program), *map(str, command[1:])],
                env=self.environment(seed) | variables,
                stdout=out,
                stderr=subprocess.STDOUT,
            ).returncode
        if code:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SystemExit(f"{tail}\n{command[0]} exited {code}; whole log: {log}")

    # ---------------------------------------------------------------------------------------------- data
    def prepare(self) -> Path:
        """Phantom, plans, and a folder with the validation images; returns the raw dataset."""
        raw = self.folder / "nnUNet_raw"
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if len(list(raw.glob(f"Dataset{PHANTOM}_*"))) + len(list(raw.glob(f"Dataset{SUPERVISED}_*"))) < 2:
            self.run(0, "data", "zept", "phantom", "-d", str(PHANTOM), "--supervised-id", str(SUPERVISED), "--size",
                     self.args.size)  # fmt: skip
        dataset = next(raw.glob(f"Dataset{PHANTOM}_*"))
        self.plan(dataset)
        facts = phantom_of(dataset)["cases"]
        self.write_split(dataset, lambda case: not facts[case]["lesions"])
        if self.args.test_cases:
            self.link_test_cases(dataset)
        return dataset

    def plan(self, dataset: Path) -> None:
        """Plan and preprocess, unless that is done."""
        suffix = "" if self.plans_name == PLANS else f"_{self.plans_name}"
        done = self.folder / "nnUNet_preprocessed" / dataset.name / f".planned_{self.args.configuration}{suffix}"
        if not done.exists():
            how = ("-c", self.args.configuration, "-np", "1", "-npfp", "1", "--verify_dataset_integrity")
            self.run(0, "data", "zept", "plan", "-d", str(self.dataset_id), "-pl", self.planner, *how)
            done.touch()

    def write_split(self, dataset: Path, is_healthy: Callable[[str], bool]) -> None:
        """Every fifth case validates, made once: known before the first training, and fold 0 holds a healthy scan."""
        cases = sorted(p.name.removesuffix(".nii.gz") for p in (dataset / "labelsTr").glob("*.nii.gz"))
        path = self.folder / "nnUNet_preprocessed" / dataset.name / "splits_final.json"
        if not path.exists():
            folds = [cases[f::5] for f in range(5)]
            folds.sort(key=lambda fold: not any(is_healthy(case) for case in fold))  # first one with a healthy scan
            split = [{"train": [c for c in cases if c not in val], "val": val} for val in folds]
            path.write_text(json.dumps(split, indent=1))
        images = self.folder / "validation_images"
        images.mkdir(exist_ok=True)
        for case in json.loads(path.read_text())[0]["val"]:
            link = images / f"{case}_0000.nii.gz"
            if not link.exists():
                link.symlink_to((dataset / "imagesTr" / link.name).resolve())

    # ---------------------------------------------------------------------------------------------- one run
    def predictions(self, method: str, seed: int, split: str) -> Path:
        """Where a run's predictions of the "test" or "validation" images stand."""
        return self.folder / "runs" / self.budget / method / f"seed{seed}" / split

    def images(self, dataset: Path) -> dict[str, Path]:
        """What is predicted: test images, and validation images for thresholds."""
        test = (self.folder / self.test if self.args.test_cases else dataset) / "imagesTs"
        return {self.test: test, "validation": self.folder / "validation_images"}

    @property
    def test(self) -> str:
        """The name of the predictions of the test images, or of some of them."""
        return f"test{self.args.test_cases or ''}"

    def link_test_cases(self, dataset: Path) -> None:
        """Make a folder with links to images and references of some test cases, drawn once and for all."""
        record = phantom_of(dataset)
        cases = sorted(p.name.removesuffix(".nii.gz") for p in (dataset / "labelsTs").glob("*.nii.gz"))
        holds = {case: {lesion["class"] for lesion in record["cases"][case]["lesions"]} for case in cases}
        for case in draw_cases(holds, record["final_unseen"], self.args.test_cases):
            link_case(dataset, case, self.folder / self.test)

    def train_and_predict(self, method: str, seed: int, dataset: Path) -> None:
        """Each step is skipped where its result is there."""
        if method == "zept":
            self.zept("zept", PLANS, seed, dataset)
            return
        flags = ["-device", self.args.device, "-c", self.args.configuration, "-p", PLANS, "-np", "1", "--disable_tta"]
        flags += ["--supervised-dataset", str(SUPERVISED)] if method == "supervised" else []
        for split, folder in self.images(dataset).items():
            out = self.predictions(method, seed, split)
            self.run(
                seed, method, "zept", "baseline", method, "-d", str(self.dataset_id), "-i", folder, "-o", out, *flags
            )

    def zept(self, name: str, plans: str, seed: int, dataset: Path, splits: Sequence[str] | None = None) -> None:
        """Train with these plans, add the unseen tumors, predict; each step is skipped where its result is there."""
        images = self.images(dataset)
        results = Path(self.environment(seed)["nnUNet_results"]) / dataset.name
        configuration = self.args.configuration
        trained = results / f"{ZEPT_TRAINER}__{plans}__{configuration}"
        fold, grown = trained / "fold_0", results / f"{ZEPT_TRAINER}__{plans}_plus__{configuration}"
        if not (fold / "checkpoint_final.pth").is_file():
            going_on = ["--c"] if (fold / "checkpoint_latest.pth").is_file() else []
            which = (str(self.dataset_id), configuration, "0", "-tr", ZEPT_TRAINER, "-p", plans)
            device = ("-device", self.args.device)
            self.run(seed, name, "nnUNetv2_train", *which, *device, *going_on, ZEPT_VALIDATE="0")  # nothing reads it
        if not grown.is_dir():
            self.run(seed, name, "zept", "add-tumor", trained, "--declared")
        for split in images if splits is None else splits:
            # the page shows maps of the first seed
            maps = ["--save_anomaly_maps"] if seed == 0 and split == "test" else []
            self.predict(name, seed, grown, images[split], self.predictions(name, seed, split), *maps)

    def predict(self, name: str, seed: int, model: Path, images: Path, out: Path, *more: str) -> None:
        """Scores of a ZePT with its unseen tumors; a case that is there is skipped."""
        self.run(seed, name, "zept", "predict", "-m", model, "-f", "0", "-i", images, "-o", out, "--save_scores", *more,
                 "--continue_prediction", "--disable_tta", "-device", self.args.device, "-npp", "1", "-nps",
                 "1")  # fmt: skip

    def evaluate(self, method: str, seed: int) -> pd.DataFrame:
        """The aggregate rows of `zept evaluate` for one run."""
        out = self.predictions(method, seed, self.test).with_name(self.test.replace("test", "report"))
        validation = self.predictions(method, seed, "validation")
        strata = self.strata()
        flags: list[str | Path] = ["--strata", strata] if strata else []
        if self.args.test_cases:  # what wants a matched threshold is figured with all test cases
            flags += ["-r", self.folder / self.test / "labelsTs"]
        else:
            flags += ["-d", str(self.dataset_id)]
            flags += ["--calibration", validation] if validation.is_dir() and self.can_calibrate() else []
        return self.report(method, seed, self.test, out, *flags)

    def report(self, method: str, seed: int, split: str, out: Path, *flags: str | Path) -> pd.DataFrame:
        """What `zept evaluate` writes of a run's predictions; flags say what it compares them with."""
        if not (out / "metrics.csv").is_file():
            self.run(seed, method, "zept", "evaluate", *flags, "-i", self.predictions(method, seed, split), "-o", out,
                     "--bootstrap", "200", "--disable_progress_bar")  # fmt: skip
        return pd.read_csv(out / "metrics.csv")

    def can_calibrate(self) -> bool:
        """Whether a validation scan is healthy, so that there is a rate of false positives to match; not in `tiny`."""
        facts = phantom_of(next((self.folder / "nnUNet_raw").glob(f"Dataset{PHANTOM}_*")))["cases"]
        cases = (p.name.removesuffix("_0000.nii.gz") for p in (self.folder / "validation_images").iterdir())
        return any(not facts[case]["lesions"] for case in cases)

    def strata(self) -> Path | None:
        """Contrast-to-noise ratio of each test case's largest lesion of a class, in three bins; None: no strata."""
        path = self.folder / f"strata{self.args.test_cases or ''}.csv"
        if path.is_file():
            return path
        dataset = next((self.folder / "nnUNet_raw").glob(f"Dataset{PHANTOM}_*"))
        record = json.loads((dataset / "dataset.json").read_text())["zept_phantom"]
        rows = []
        for case, facts in record["cases"].items():
            for name in {lesion["class"] for lesion in facts["lesions"]}:
                largest = max((x for x in facts["lesions"] if x["class"] == name), key=lambda x: x["volume_ml"])
                ratio = largest["cnr"]
                stratum = "CNR < 7" if ratio < 7 else "CNR 7-12" if ratio < 12 else "CNR > 12"
                rows.append({"case": case, "class": name, "stratum": stratum})
        references = (self.folder / self.test if self.args.test_cases else dataset) / "labelsTs"
        test = {p.name.removesuffix(".nii.gz") for p in references.glob("*.nii.gz")}
        partial = path.with_suffix(f".{threading.get_ident()}")  # runs may stand here side by side
        pd.DataFrame([r for r in rows if r["case"] in test]).to_csv(partial, index=False)
        partial.rename(path)
        return path


def link_case(dataset: Path, case: str, folder: Path) -> None:
    """Link a test case's image and reference into `folder`/imagesTs and /labelsTs."""
    for link in (folder / "imagesTs" / f"{case}_0000.nii.gz", folder / "labelsTs" / f"{case}.nii.gz"):
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((dataset / link.parent.name / link.name).resolve())


def draw_cases(holds: Mapping[str, Set[str]], final: Collection[str], count: int) -> list[str]:
    """Some test cases, as many healthy ones as of each tumor type, and of final-unseen types, which no figure is taken
    of, none; fewer of a type that has fewer.

    Args:
        holds: case → types of its tumors.
        final: the final-unseen types.
        count: how many in all.
    """
    groups: dict[frozenset[str], list[str]] = {}
    for case in sorted(holds):
        if not set(final) & holds[case]:
            groups.setdefault(frozenset(holds[case]), []).append(case)
    share = max(1, count // len(groups))
    chooser = random.Random(0)
    return [
        c for kind in sorted(groups, key=sorted) for c in chooser.sample(groups[kind], min(share, len(groups[kind])))
    ]


def minutes_of(workspace: Workspace, method: str, seed: int, plans: str = PLANS) -> float:
    """Wall-clock of the training, from nnU-Net's own log; NaN where there is no model. A method of ZePT has plans."""
    import torch

    recipe = RECIPES.get(method)
    results = Path(workspace.environment(seed)["nnUNet_results"])
    kinds = {"any_tumor": "AnyTumor", "organs": "Organs", "declared": "Declared", "supervised": "Supervised"}
    own = f"Dataset{workspace.dataset_id:03d}_*"
    dataset, trainer = (own, ZEPT_TRAINER) if recipe is None else (f"*{kinds[recipe.data]}", recipe.trainer)
    plans = plans if recipe is None else "*"
    for fold in sorted(results.glob(f"{dataset}/{trainer}__{plans}__{workspace.args.configuration}/fold_0")):
        checkpoint = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        return training_minutes(checkpoint["logging"])
    return float("nan")


def arguments(description: str | None, names: tuple[str, ...] = (), kind: str = "") -> argparse.ArgumentParser:
    """Those that every comparison has; `kind` is what `names` are, "methods" or "variants", where there is a choice."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=("tiny", "demo", "small", "full"))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    if names:
        parser.add_argument(f"--{kind}", nargs="+", default=list(names), choices=names)
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--epochs", type=int, help="default: 20, unless --minutes is given")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--minutes", type=float, help="train for this wall-clock time instead of --epochs")
    parser.add_argument(
        "--test-cases", type=int, metavar="N", help="predict about N test cases alone, as many of each kind"
    )
    parser.add_argument("--device", default=None, choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--workspace", type=Path, default=Path("zept_zero_shot"))
    return parser


def parse(parser: argparse.ArgumentParser, both_budgets: bool = False) -> argparse.Namespace:
    """The arguments, checked, with the defaults that depend on others.

    Args:
        both_budgets: iterations and wall-clock may both be given.
    """
    args = parser.parse_args()
    if args.minutes and args.jobs > 1:
        parser.error("--minutes does not go with --jobs: side by side, runs take the time from each other")
    if args.minutes and args.epochs and not both_budgets:
        parser.error("--minutes does not go with --epochs")
    if not args.minutes and args.epochs is None:
        args.epochs = 20
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    parser = arguments(__doc__, METHODS, "methods")
    parser.add_argument("--final", action="store_true", help="the final-unseen types too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="CSV", help="figures of finished runs")
    args = parse(parser, both_budgets=True)
    tables = {}
    for budget in budgets(args):
        workspace = Workspace((args.workspace / args.size).resolve(), budget)
        name = workspace.budget.removeprefix(f"{args.configuration}_")
        tables[f"equal {'wall-clock' if budget.minutes else 'iterations'}: {name}"] = one_budget(workspace)
    print_table(pd.concat(tables, names=["budget"]).reset_index("budget"))


def budgets(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Equal iterations, equal wall-clock, or both, each as the arguments that ask for it alone."""
    found = []
    if args.epochs:
        found.append(argparse.Namespace(**{**vars(args), "minutes": None}))
    if args.minutes:
        found.append(argparse.Namespace(**{**vars(args), "epochs": None}))
    return found


def one_budget(workspace: Workspace) -> pd.DataFrame:
    """The rows of all runs, those on final-unseen types only where they were asked for."""
    dataset, args = workspace.prepare(), workspace.args

    def one(method: str, seed: int) -> float:
        workspace.train_and_predict(method, seed, dataset)
        return minutes_of(workspace, method, seed)

    table = measure(workspace, dataset, args.methods, one, args.results)
    if args.final:
        results = args.results.with_name(f"{args.results.stem}_final.csv")
        table = pd.concat([table, measure(workspace, dataset, args.methods, one, results, final=True)])
    return table


def phantom_of(dataset: Path) -> dict[str, Any]:
    """What the phantom's dataset.json says of it."""
    record: dict[str, Any] = json.loads((dataset / "dataset.json").read_text())["zept_phantom"]
    return record


def measure(
    workspace: Workspace,
    dataset: Path,
    methods: Sequence[str],
    one: Callable[[str, int], float],
    results: Path,
    final: bool = False,
) -> pd.DataFrame:
    """Run each method with each seed, unless its rows are in `results`; returns their rows.

    Args:
        one: trains and predicts, and returns the minutes of the training.
        final: rows of the final-unseen types, and of the groups that hold them, in place of all others.
    """
    args = workspace.args
    settings = {"phantom": phantom_of(dataset)["version"], "size": args.size, "configuration": args.configuration}
    settings |= {"epochs": args.epochs, "iterations": args.iterations, "minutes": args.minutes}
    settings |= {"test_cases": args.test_cases}
    done = pd.read_csv(results) if results.is_file() else pd.DataFrame(columns=KEY)
    done = done[matches(done, settings)]
    runs = [(m, s) for s in range(args.seeds) for m in methods]
    todo = [(m, s) for m, s in runs if not ((done["method"] == m) & (done["seed"] == s)).any()]
    progress = tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", unit="run")

    def rows_of(run: tuple[str, int]) -> pd.DataFrame:
        method, seed = run
        minutes = one(method, seed)
        rows = workspace.evaluate(method, seed)
        rows = rows[rows["case"].isin(("mean", "pooled")) & (concerns_final(rows["class"], dataset) == final)]
        rows = rows[["case", "class", "seen", "scope", "metric", "value", "unit", "ci_low", "ci_high"]]
        return rows.assign(**settings, method=method, seed=seed, training_minutes=round(minutes, 2), device=args.device)

    with ThreadPoolExecutor(args.jobs) as pool:
        for rows in pool.map(rows_of, todo):
            columns = [*KEY, *(c for c in rows.columns if c not in KEY)]
            append_rows(rows[columns], results)
            progress.update()
    progress.close()
    table = pd.read_csv(results)
    return table[matches(table, settings) & table["method"].isin(methods) & (table["seed"] < args.seeds)]


def append_rows(rows: pd.DataFrame, results: Path) -> None:
    """All of them or none: a run whose rows stand there is not run again."""
    before = results.read_text(encoding="utf-8") if results.is_file() else ""
    write_whole(results, before + rows.to_csv(header=not before, index=False, float_format="%.5g"))


def concerns_final(classes: pd.Series, dataset: Path) -> pd.Series:
    """Which names are those of final-unseen types, a stratum of one, or a group of unseen tumors, which holds them."""
    return classes.str.startswith((*phantom_of(dataset)["final_unseen"], "(unseen"))


def matches(table: pd.DataFrame, settings: dict[str, object]) -> pd.Series:
    """Which rows of a results table belong to a run's settings; None is an empty cell."""
    same = pd.Series(True, index=table.index)
    for name, value in settings.items():
        same &= table[name].isna() if value is None else table[name] == value
    return same


def print_table(table: pd.DataFrame) -> None:
    """One row a method and class: mean ± standard deviation over the seeds; the budgets' columns side by side."""
    keys = pd.Series([*zip(table["case"], table["scope"], table["metric"], strict=True)], index=table.index)
    table = table.assign(column=keys.map(SHOWN)).dropna(subset="column")
    columns = [c for c in ("budget", "column") if c in table]
    over_seeds = table.groupby(["class", "method", *columns])["value"]
    shown = over_seeds.mean().map("{:.3f}".format) + " ± " + over_seeds.std().map("{:.3f}".format)
    print(shown.unstack(columns).fillna("-").to_string())


if __name__ == "__main__":
    main()
