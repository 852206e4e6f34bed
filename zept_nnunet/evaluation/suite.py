"""A published table, run again: which datasets train, which test what, and the published figures beside ours.

A suite is a YAML file (`suites/`), read by `zept benchmark --suite`. Both stages of ZePT are one training here, on the
datasets merged: those of stage I label organs, those of stage II tumors too, and what a case does not label teaches
nothing. A tumor type that no training dataset labels is unseen; it is added to the trained model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd  # type: ignore[import-untyped]
import yaml

from zept_nnunet.datasets.merge import Merge, MergedClass, MergeSource, class_key
from zept_nnunet.datasets.merge_map import MergeMap
from zept_nnunet.datasets.prepare import KEY as RECIPE_KEY
from zept_nnunet.datasets.raw_folder import read_dataset_json
from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.benchmark import (
    LabeledCases,
    Model,
    is_evaluated,
    jobs_of,
    matched,
    read_metrics,
    with_interval,
)
from zept_nnunet.evaluation.ranking import RANKING_METRICS
from zept_nnunet.evaluation.report import ORGAN_GROUP
from zept_nnunet.jobs import Job
from zept_nnunet.knowledge.catalog import catalog
from zept_nnunet.names import infer_hosts, infer_is_tumor
from zept_nnunet.taxonomy import Taxonomy

_NAMES = {"type": "array", "items": {"type": "string"}}
_TEST = {
    "type": "object",
    "required": ["name", "dataset", "class", "scope", "metric"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "dataset": {"type": "string"},
        "split": {"enum": ["auto", "test", "training", "validation"]},
        "class": {"type": "string"},
        "hosts": _NAMES,
        "scope": {"enum": ["volume", "host"]},
        "metric": {"enum": ["dsc", "nsd", *RANKING_METRICS]},
        "published": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "note": {"type": "string"},
    },
}
_SCHEMA = {
    "type": "object",
    "required": ["title", "training", "tests"],
    "additionalProperties": False,
    "properties": {
        "title": {"type": "string"},
        "source": {"type": "string"},
        "notes": _NAMES,
        "training": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"stage_one": _NAMES, "stage_two": _NAMES},
        },
        "labels": {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        },
        "tests": {"type": "array", "minItems": 1, "items": _TEST},
    },
}


@dataclass(frozen=True)
class SuiteTest:
    """One row of the table. `dataset` and `class_name` in the suite's words; `published` as a fraction.

    `split`: as `LabeledCases.read`; "validation": a training dataset's own cases, each predicted by the fold that did
    not see it.
    """

    name: str
    dataset: str
    class_name: str
    scope: str
    metric: str
    split: str = "auto"
    hosts: tuple[str, ...] = ()
    published: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """What a suite file says."""

    title: str
    training: tuple[str, ...]
    tests: tuple[SuiteTest, ...]
    labels: Mapping[str, Mapping[str, str | None]]
    source: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, argument: str) -> Suite:
        """A suite of the package, by its name, or a YAML file.

        Raises:
            ZePTError: there is none, or the file is not of the form.
        """
        own = resources.files("zept_nnunet.evaluation") / "suites"
        built_in = sorted(p.name.removesuffix(".yaml") for p in own.iterdir() if p.name.endswith(".yaml"))
        path: Any = own / f"{argument}.yaml" if argument in built_in else Path(argument)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            jsonschema.validate(content, _SCHEMA)
        except (OSError, UnicodeDecodeError) as error:
            raise ZePTError(
                f"--suite {argument}: no such suite ({', '.join(built_in)}), and no file: {error}"
            ) from error
        except yaml.YAMLError as error:
            raise ZePTError(f"--suite {argument}: no YAML: {error}") from error
        except jsonschema.ValidationError as error:
            where = "/".join(map(str, error.absolute_path)) or "the file"
            raise ZePTError(f"--suite {argument}: {where}: {error.message}") from error
        stages = content["training"]
        training = tuple(dict.fromkeys([*stages.get("stage_one", []), *stages.get("stage_two", [])]))
        if not training:
            raise ZePTError(f"--suite {argument}: training names no dataset")
        given: list[dict[str, Any]] = content["tests"]
        tests = tuple(
            SuiteTest(
                t["name"],
                t["dataset"],
                t["class"],
                t["scope"],
                t["metric"],
                t.get("split", "auto"),
                tuple(t.get("hosts", ())),
                t.get("published"),
                t.get("note", ""),
            )
            for t in given
        )
        for test in tests:
            if test.split == "validation" and test.dataset not in training:
                raise ZePTError(
                    f"--suite {argument}: {test.name}: {test.dataset} does not train, so no fold validates it"
                )
        names = [t.name for t in tests]
        if len(set(names)) < len(names):
            raise ZePTError(f"--suite {argument}: two tests have one name")
        return cls(
            content["title"], training, tests, content.get("labels", {}), content.get("source", ""),
            tuple(content.get("notes", ())),
        )  # fmt: skip

    @property
    def datasets(self) -> list[str]:
        """Every dataset, those that train first."""
        return list(dict.fromkeys([*self.training, *(t.dataset for t in self.tests)]))

    def without(self, names: Sequence[str]) -> Suite:
        """The suite without some datasets, their tests and their part of the training.

        Raises:
            ZePTError: one is not in it, or nothing is left.
        """
        unknown = [n for n in names if n not in self.datasets]
        if unknown:
            raise ZePTError(f"--without {unknown[0]}: the suite has {self.datasets}")
        training = tuple(t for t in self.training if t not in names)
        tests = tuple(t for t in self.tests if t.dataset not in names)
        if not training or not tests:
            raise ZePTError(f"without {', '.join(names)} no {'training dataset' if not training else 'test'} is left")
        return replace(self, training=training, tests=tests)


def find_datasets(suite: Suite, raw: Path, ids: Mapping[str, Path]) -> dict[str, Path]:
    """The raw dataset of each of the suite's names: as the user says, else the one that `zept prepare` made of it.

    Raises:
        ZePTError: some are missing (all of them at once, with the commands that make them), or two would do.
    """
    prepared: dict[str, list[Path]] = {}
    for path in sorted(raw.glob("Dataset[0-9][0-9][0-9]_*/dataset.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))[RECIPE_KEY]["recipe"]
        except (OSError, ValueError, KeyError, TypeError):  # somebody's own dataset, whatever it holds
            continue
        prepared.setdefault(str(record), []).append(path.parent)
    unknown = sorted(set(ids) - set(suite.datasets))
    if unknown:
        raise ZePTError(f"--ids {unknown[0]}=…: the suite has {suite.datasets}")
    found, missing = {}, []
    for name in suite.datasets:
        candidates = [ids[name]] if name in ids else prepared.get(name, [])
        if len(candidates) > 1:
            raise ZePTError(f"{name} was prepared {len(candidates)} times: {candidates}; say which: --ids {name}=ID")
        if candidates:
            found[name] = candidates[0]
        else:
            missing.append(name)
    if missing:
        commands = "\n".join(f"  zept prepare {name} DOWNLOAD_FOLDER -d ID" for name in missing)
        raise ZePTError(
            f"{len(missing)} datasets of the suite are not in {raw}:\n{commands}\nPrepare them, say which they are "
            f"(--ids {missing[0]}=ID), or leave them out (--without {' '.join(missing)})"
        )
    return found


@dataclass(frozen=True)
class Training:
    """How the suite's model is trained."""

    trainers: tuple[str, ...]
    configuration: str
    folds: tuple[str, ...]
    planner: str
    device: str


@dataclass(frozen=True)
class SuiteRun:
    """A suite on one's own datasets. `target`: the merged dataset's folder, or that of the only training dataset."""

    suite: Suite
    datasets: Mapping[str, Path]
    target: Path
    training: Training
    results: Path  # nnUNet_results
    allowed: tuple[str, ...] = ()  # datasets of the suite whose test scans may be among training

    @cached_property
    def merge(self) -> Merge:
        """What training will know; nothing is written.

        Raises:
            ZePTError: the labels conflict.
        """
        return Merge([MergeSource.read(self.datasets[n]) for n in self.suite.training], MergeMap(self.labels()))

    @property
    def is_merged(self) -> bool:
        """Whether there is anything to merge."""
        return len(self.suite.training) > 1

    def labels(self) -> dict[str, dict[str, str | None]]:
        """The suite's names of labels, by dataset ID, as `zept merge --map` takes them."""
        own = self.suite.labels
        return {self.datasets[n].name[7:10]: dict(own[n]) for n in self.suite.training if n in own}

    def known(self, test: SuiteTest) -> MergedClass | None:
        """The class that a test asks for, where training labels it."""
        classes = {class_key(c.name, c.hosts if c.is_tumor else None): c for c in self.merge.classes}
        wanted = [class_key(test.class_name, test.hosts), class_key(test.class_name, None)]
        return next((classes[k] for k in wanted if k in classes), None)

    def unseen(self) -> dict[str, tuple[str, ...]]:
        """Tumors that tests ask for and training does not label → their hosts, as training names them.

        Raises:
            ZePTError: training knows no host of one, or a test asks for an organ that training does not label.
        """
        found: dict[str, tuple[str, ...]] = {}
        organs = {class_key(c.name, None): c.name for c in self.merge.classes if not c.is_tumor}
        for test in self.suite.tests:
            if test.class_name == ORGAN_GROUP or self.known(test) is not None:
                continue
            entry = catalog().find(test.class_name, test.hosts, "tumor")
            if entry is None and not infer_is_tumor(test.class_name):
                raise ZePTError(
                    f"{test.name}: no training dataset labels {test.class_name!r} (they label "
                    f"{', '.join(organs.values())}), and only tumors are added after training. Leave {test.dataset} "
                    f"out: --without {test.dataset}"
                )
            named = test.hosts or (entry.hosts if entry is not None else ())
            hosts = tuple(dict.fromkeys(organs[k] for k in (class_key(h, None) for h in named) if k in organs))
            hosts = hosts or infer_hosts(test.class_name, list(organs.values()))
            if not hosts:
                raise ZePTError(
                    f"{test.name}: no training dataset labels {' or '.join(named) or 'its host'}, where "
                    f"{test.class_name!r} grows (they label {', '.join(organs.values())}). Leave {test.dataset} out: "
                    f"--without {test.dataset}"
                )
            found[test.class_name] = hosts
        return found

    def check_tests(self) -> None:
        """That every test will have a figure: its cases are there, and its class is one that both sides name.

        Raises:
            ZePTError: it will not.
        """
        planned = self._planned()
        ending = self.merge.sources[0].dataset_json.get("file_ending")
        for test in self.suite.tests:
            if test.split == "validation":
                continue
            cases = LabeledCases.read(self.datasets[test.dataset], test.split)
            own = cases.dataset_json["file_ending"]
            if own != ending:
                raise ZePTError(f"{test.name}: {cases.folder} has files {own}, training reads {ending}; convert them")
            names = set(matched(planned, cases)[1].values())
            entry = self.known(test)
            wanted = {entry.name if entry is not None else test.class_name}
            if test.class_name == ORGAN_GROUP:
                wanted = {o.name for o in planned.taxonomy.organs}
            if not wanted & names:
                raise ZePTError(
                    f"{test.name} asks for {test.class_name!r}, and {cases.folder / 'dataset.json'} labels, of what "
                    f"the model will report, only {sorted(names)}. Correct its labels, or leave {test.dataset} out: "
                    f"--without {test.dataset}"
                )

    def _planned(self) -> Model:
        """The model that training and `zept add-tumor` will make, as far as its classes go."""
        tumors = {c.name: c.hosts for c in self.merge.classes if c.is_tumor} | self.unseen()
        organs = [c.name for c in self.merge.classes if not c.is_tumor]
        content = {
            "labels": {name: i for i, name in enumerate(["background", *organs, *tumors])},
            "zept": {"organs": organs, "tumors": {name: {"hosts": list(hosts)} for name, hosts in tumors.items()}},
        }
        return Model("the trained model", self.target, content, Taxonomy.from_dataset_json(content))

    def in_training(self, test: SuiteTest) -> str:
        """What training saw of a test's class or organs, in the table's words."""
        if test.class_name != ORGAN_GROUP:
            return "yes" if self.known(test) is not None else "no (unseen)"
        if test.split == "validation":
            return "yes"
        path = self.datasets[test.dataset] / "dataset.json"
        theirs = Taxonomy.from_dataset_json(read_dataset_json(path.parent), str(path)).organs
        ours = {class_key(c.name, None) for c in self.merge.classes if not c.is_tumor}
        seen = sum(class_key(o.name, None) in ours for o in theirs)
        return "yes" if seen == len(theirs) else f"{seen} of {len(theirs)} organs"

    # ------------------------------------------------------------------------------------------------ folders
    @property
    def plans(self) -> str:
        """The name of the plans that the planner writes."""
        return self.training.planner.replace("Planner", "Plans")

    def model_folder(self, trainer: str, grown: bool) -> Path:
        """Where nnU-Net puts the trained model, and `zept add-tumor` the one with the unseen tumors."""
        plus = "_plus" if grown and self.unseen() else ""
        return self.results / self.target.name / f"{trainer}__{self.plans}{plus}__{self.training.configuration}"

    def models(self) -> dict[str, Path]:
        """Trainer → folder of its model with all tumors."""
        return {trainer: self.model_folder(trainer, grown=True) for trainer in self.training.trainers}

    def model(self, trainer: str, cases: LabeledCases) -> Model:
        """The trained model that predicts some cases: with the unseen tumors, but not in its own validation."""
        return replace(Model.read(str(self.model_folder(trainer, not cases.is_predicted))), name=trainer)

    # ------------------------------------------------------------------------------------------------ jobs
    def training_jobs(self, out: Path) -> list[Job]:
        """Merge, plan, train every fold by every trainer, add the unseen tumors."""
        done, t = out / "done", self.training
        number = str(int(self.target.name[7:10]))
        jobs = []
        if self.is_merged:
            tests = [n for n in self.suite.datasets if n not in self.suite.training]
            command = ["zept", "merge", "-d", *(self.datasets[n].name for n in self.suite.training)]
            command += ["-o", self.target.name]
            command += ["--map", str(self.map_file(out))] if self.labels() else []
            command += ["--test", *(self.datasets[n].name for n in tests)] if tests else []
            command += ["--allow-overlap", *(self.datasets[n].name for n in self.allowed)] if self.allowed else []
            jobs.append(Job("merge", f"merge {len(self.suite.training)} datasets", tuple(command), done / "merge",
                            output=self.target / "dataset.json", inputs=(self.map_file(out),)))  # fmt: skip
        plan = ("zept", "plan", "-d", number, "-pl", t.planner, "-c", t.configuration)
        jobs.append(Job("plan", "plan and preprocess", plan, done / "plan", ("merge",) if self.is_merged else ()))
        for trainer in t.trainers:
            folds = []
            for fold in t.folds:
                name = f"train_{trainer}_{fold}"
                # --c: a training that was killed goes on; one that was not begun begins
                command = ["nnUNetv2_train", number, t.configuration, fold, "-tr", trainer, "-p", self.plans]
                command += ["-device", t.device, "--c"]
                validated = self.model_folder(trainer, False) / f"fold_{fold}" / "validation" / "summary.json"
                jobs.append(Job(name, f"{trainer}, fold {fold}", tuple(command), done / name, ("plan",), validated))
                folds.append(name)
            if self.unseen():
                name = f"add_tumors_{trainer}"
                command = ["zept", "add-tumor", str(self.model_folder(trainer, False))]
                for tumor, hosts in self.unseen().items():
                    command += ["--name", tumor, *(word for h in hosts for word in ("--host", h))]
                plans = self.model_folder(trainer, True) / "plans.json"
                jobs.append(
                    Job(name, "tumors that training never saw", tuple(command), done / name, tuple(folds), plans)
                )
        return jobs

    def trained(self, jobs: Sequence[Job]) -> list[str]:
        """Trainers of which every job is done."""
        own = {t: {f"add_tumors_{t}", *(f"train_{t}_{f}" for f in self.training.folds)} for t in self.training.trainers}
        return [t for t, names in own.items() if all(j.is_done() for j in jobs if j.name in names)]

    def map_file(self, out: Path) -> Path:
        """Where the labels' names for `zept merge` stand."""
        return out / "labels.yaml"

    def write_map(self, out: Path) -> None:
        """Write it."""
        out.mkdir(parents=True, exist_ok=True)
        self.map_file(out).write_text(yaml.safe_dump({"labels": self.labels()}), encoding="utf-8")

    def announced(self, out: Path, predict_flags: Sequence[str], evaluate_flags: Sequence[str]) -> list[Job]:
        """The jobs that follow the training, before there is a model."""
        tests = {}
        for test in self.suite.tests:
            name, held_out = self.name_of(test), test.split == "validation"
            tests[name] = LabeledCases(self.datasets[test.dataset], {}, {}, called=name, is_predicted=held_out)
        return jobs_of(self.models(), list(tests.values()), out, predict_flags, evaluate_flags)

    # ------------------------------------------------------------------------------------------------ cases
    def name_of(self, test: SuiteTest) -> str:
        """Of a test's `LabeledCases`."""
        return self.datasets[test.dataset].name + ("" if test.split == "auto" else f"_{test.split}")

    def cases_of(self, test: SuiteTest) -> LabeledCases:
        """What is predicted, or was in validation, for one test. For the latter merge and folds must be there.

        Raises:
            ZePTError: there are none.
        """
        folder = self.datasets[test.dataset]
        if test.split != "validation":
            return replace(LabeledCases.read(folder, test.split), called=self.name_of(test))
        merged = LabeledCases.read(self.target, "training")
        ending = merged.dataset_json["file_ending"]
        validated = {p.name for trainer in self.training.trainers for p in self.validation_files(trainer, ending)}
        prefix = next(s for s in self.merge.sources if s.folder == folder).merged_case("") if self.is_merged else ""
        kept = {c: f for c, f in merged.cases.items() if c.startswith(prefix) and c + ending in validated}
        if not kept:
            raise ZePTError(f"{test.name}: no trained fold has validated a case of {folder.name}")
        return replace(merged, cases=kept, called=self.name_of(test), is_predicted=True)

    def validation_files(self, trainer: str, ending: str) -> list[Path]:
        """Of the final validation of every trained fold."""
        model = self.model_folder(trainer, False)
        return [p for f in self.training.folds for p in sorted((model / f"fold_{f}" / "validation").glob(f"*{ending}"))]

    def link_validation(self, trainer: str, cases: LabeledCases, predictions: Path) -> None:
        """The folds' own predictions of `cases` in one folder, with the dataset.json that evaluation reads."""
        shutil.rmtree(predictions, ignore_errors=True)  # links of another training
        predictions.mkdir(parents=True)
        ending = cases.dataset_json["file_ending"]
        for path in self.validation_files(trainer, ending):
            link = predictions / path.name
            if path.name.removesuffix(ending) in cases.cases:
                link.symlink_to(path.resolve())
        folder = self.model_folder(trainer, False)
        for name in ("dataset.json", "plans.json"):
            (predictions / name).write_bytes((folder / name).read_bytes())

    # ------------------------------------------------------------------------------------------------ the table
    def table(self, names: Mapping[str, str], out: Path, partly: bool = False) -> pd.DataFrame:
        """One row a test: what training saw, published, ours with 95 % intervals, a column a trainer.

        Args:
            names: test → the name of its `LabeledCases`.
            out: the benchmark's folder.
            partly: "–" for what is not evaluated.

        Raises:
            ZePTError: figures are missing.
        """
        rows = []
        for test in self.suite.tests:
            entry = self.known(test)
            own = ORGAN_GROUP if test.class_name == ORGAN_GROUP else entry.name if entry else test.class_name
            row: dict[str, Any] = {
                "test": test.name,
                "class": test.class_name,
                "figure": test.metric.upper() + (" in host" if test.scope == "host" else ""),
                "in training": self.in_training(test),
                "published": "–" if test.published is None else f"{test.published:.4f}",
            }
            counts = []
            for trainer in self.training.trainers:
                if partly and not is_evaluated(out, trainer, names[test.name]):
                    row[trainer] = "–"
                    continue
                found = figure(read_metrics(out, trainer, names[test.name]), own, test)
                row[trainer] = "–" if found is None else with_interval(found, digits=4)
                counts.append(0 if found is None or pd.isna(found["cases"]) else int(found["cases"]))
            row["cases"] = "/".join(map(str, dict.fromkeys(counts))) or "–"  # one number, unless trainers differ
            overlap = "its scans may be among training (--allow-overlap)" if test.dataset in self.allowed else ""
            row["note"] = "; ".join(filter(None, (test.note, overlap)))
            rows.append(row)
        return pd.DataFrame(rows)


def figure(metrics: pd.DataFrame, name: str, test: SuiteTest) -> Mapping[str, Any] | None:
    """The row of metrics.csv with the mean over the cases in which the figure is defined; None where there is none."""
    wanted = (metrics["class"] == name) & (metrics["scope"] == test.scope) & (metrics["metric"] == test.metric)
    rows = metrics[wanted & (metrics["case"] == "mean")]
    return None if rows.empty else dict(rows.iloc[0])
