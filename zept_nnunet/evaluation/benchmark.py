"""Models on datasets by their IDs: references in the model's own label values, jobs, and one table.

A test dataset numbers and names its classes in its own way, and labels only some of what a model reports. So its label
maps are written anew with the model's values, classes matched by what their names mean (as `zept merge` does), and a
dataset.json beside them says which classes they label.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.commands.trainers_path import trainers_path
from zept_nnunet.datasets.merge import class_key
from zept_nnunet.datasets.raw_folder import read_dataset_json, relabeled, training_cases
from zept_nnunet.errors import ZePTError
from zept_nnunet.evaluation.html_report import page_environment, version
from zept_nnunet.files import stamp, write_whole
from zept_nnunet.jobs import Job
from zept_nnunet.taxonomy import Taxonomy, Tumor, annotated_for, annotated_patterns, declared_unseen

METRICS = (("volume", "dsc"), ("volume", "nsd"), ("volume", "auroc"), ("volume", "fpr95"), ("host", "auroc"))
"""Scope and metric of the table's columns."""


@dataclass(frozen=True)
class Model:
    """A model folder and the name that it has in the table."""

    name: str
    folder: Path
    dataset_json: Mapping[str, Any]
    taxonomy: Taxonomy

    @classmethod
    def read(cls, argument: str) -> Model:
        """From FOLDER or NAME=FOLDER; without a name that of the folder.

        Raises:
            ZePTError: it is no model folder.
        """
        name, _, path = argument.rpartition("=")
        folder = Path(path)
        for file in ("dataset.json", "plans.json"):
            if not (folder / file).is_file():
                raise ZePTError(f"-m {argument}: {folder / file} is missing; wanted a folder that nnUNetv2_train wrote")
        content = read_dataset_json(folder)
        taxonomy = Taxonomy.from_dataset_json(content, str(folder / "dataset.json"))
        if taxonomy.has_regions:
            raise ZePTError(f"-m {argument}: its labels are regions; zept benchmark wants plain labels")
        return cls(name or folder.name, folder, content, taxonomy)


@dataclass(frozen=True)
class LabeledCases:
    """The cases of a raw dataset that are predicted: its test cases, or its training cases where those are the test."""

    folder: Path
    dataset_json: dict[str, Any]
    cases: dict[str, tuple[list[Path], Path]]  # case → images by channel, label
    called: str | None = None
    is_predicted: bool = False  # by the folds of the training that held them out

    @property
    def name(self) -> str:
        """In the table, and of the folders."""
        return self.called or self.folder.name

    @classmethod
    def read(cls, folder: Path, split: str = "auto") -> LabeledCases:
        """Find the cases.

        Args:
            folder: of the raw dataset.
            split: "test": imagesTs and labelsTs; "training": what nnU-Net would train on; "auto": the former where
                labelsTs is there.

        Raises:
            ZePTError: there are none, or an image is missing.
        """
        content = read_dataset_json(folder)
        if "file_ending" not in content:
            raise ZePTError(f"{folder / 'dataset.json'} names no file_ending")
        ending = content["file_ending"]
        labels = sorted((folder / "labelsTs").glob(f"*{ending}"))
        if split == "training" or (split == "auto" and not labels):
            found = training_cases(folder, content)
            cases = {c: ([Path(i) for i in f["images"]], Path(f["label"])) for c, f in found.items()}
        else:
            names = [p.name.removesuffix(ending) for p in labels]
            images = {c: sorted((folder / "imagesTs").glob(f"{c}_[0-9][0-9][0-9][0-9]{ending}")) for c in names}
            cases = {c: (images[c], folder / "labelsTs" / f"{c}{ending}") for c in names}
        lacking = [c for c, (images_of, label) in cases.items() if not images_of or not label.is_file()]
        if not cases or lacking:
            what = f"the image or label of {lacking[0]!r} is missing" if lacking else "it holds no labeled case"
            raise ZePTError(f"{folder}: {what} (split: {split})")
        return cls(folder, content, cases)


def matched(model: Model, test: LabeledCases) -> tuple[dict[int, int], dict[str, str]]:
    """Label value of the test set → of the model, and name there → name in the model, where both have the class.

    A tumor that the model lacks belongs to its host, another class to background.

    Raises:
        ZePTError: two labels of the test set match one class of the model, or none matches any.
    """
    source = str(test.folder / "dataset.json")
    theirs = Taxonomy.from_dataset_json(test.dataset_json, source)
    ours = {class_key(c.name, c.hosts if isinstance(c, Tumor) else None): c for c in model.taxonomy.classes}
    known = [(c.name, c.label, c.hosts if isinstance(c, Tumor) else None) for c in theirs.classes]
    known += [(u.name, u.label, u.hosts) for u in declared_unseen(test.dataset_json, source) if u.label is not None]
    table: dict[int, int] = {0: 0}
    names: dict[str, str] = {}
    for name, label, hosts in known:
        target = ours.get(class_key(name, hosts))
        if target is None:
            continue
        if target.name in names.values():
            raise ZePTError(f"{source}: {name!r} and another label both match {target.name!r} of {model.name}")
        table[label], names[name] = target.label, target.name
    if not names:
        reported = [c.name for c in model.taxonomy.classes]
        raise ZePTError(f"{source} labels {[k[0] for k in known]}, {model.name} reports {reported}: no class in common")
    organ_values = {c.name: table.get(c.label, 0) for c in theirs.organs}
    for _, label, hosts in known:
        table.setdefault(label, organ_values[hosts[0]] if hosts is not None and len(hosts) == 1 else 0)
    return table, names


def write_references(model: Model, test: LabeledCases, out: Path) -> None:
    """`out`/labels in the model's values, `out`/images as links, `out`/dataset.json.

    What an interrupted call wrote stays; what was written for other values, or from other files, is removed first.

    Raises:
        ZePTError: as `matched`; a label file holds an unknown value.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    table, names = matched(model, test)
    ignore = Taxonomy.from_dataset_json(test.dataset_json).ignore_label
    ending, read_ending = model.dataset_json["file_ending"], test.dataset_json["file_ending"]
    if ending != read_ending:
        raise ZePTError(f"{test.folder} has files {read_ending}, {model.name} reads {ending}; convert them")
    ours = {k: v for k, v in model.dataset_json["labels"].items() if k != "ignore"}
    ours |= {"ignore": len(ours)} if ignore is not None else {}
    table |= {ignore: ours["ignore"]} if ignore is not None else {}
    patterns = annotated_patterns(test.dataset_json, str(test.folder / "dataset.json"))
    files = [[case, *((str(p.resolve()), *stamp(p)) for p in (*i, f))] for case, (i, f) in test.cases.items()]
    _remove_others(out, [sorted(table.items()), ending, *files])
    annotated = {}
    for case, (images, label) in tqdm(test.cases.items(), desc=f"references of {test.name}", unit="case"):
        named = annotated_for(case, patterns)
        annotated[case] = [own for name, own in names.items() if named is None or name in named]
        for channel, image in enumerate(images):
            link = out / "images" / f"{case}_{channel:04d}{ending}"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.unlink(missing_ok=True)  # broken
                link.symlink_to(image.resolve())
        target = out / "labels" / f"{case}{ending}"
        if target.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        reader = determine_reader_writer_from_dataset_json(test.dataset_json, str(images[0]), verbose=False)()
        seg, properties = reader.read_seg(str(label))
        try:
            values = relabeled(seg[0], table, test.folder / "dataset.json")
        except ZePTError as error:
            raise ZePTError(f"{label}: {error}") from error
        partial = target.with_name(f".partial_{target.name}")
        reader.write_seg(values, str(partial), properties)
        partial.rename(target)
    everything = set(names.values())
    patterns_out = {"*": sorted(everything)} if all(set(a) == everything for a in annotated.values()) else annotated
    own = {k: v for k, v in (model.dataset_json.get("zept") or {}).items() if k != "unseen"}  # no classes of the model
    zept = {**own, "annotated": patterns_out}
    content = {**model.dataset_json, "labels": ours, "zept": zept}
    (out / "dataset.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _remove_others(out: Path, made_from: list[Any]) -> None:
    """Remove labels and images that were made from something else, and note what they are made from now."""
    record, digest = out / "made_from.sha256", hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    if not record.is_file() or record.read_text(encoding="utf-8") != digest:
        record.unlink(missing_ok=True)
        for folder in (out / "labels", out / "images"):
            shutil.rmtree(folder, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(digest, encoding="utf-8")


def jobs_of(
    models: Mapping[str, Path],
    tests: Sequence[LabeledCases],
    out: Path,
    predict_flags: Sequence[str],
    evaluate_flags: Sequence[str],
) -> list[Job]:
    """Predict, where that is not done, and evaluate every model on every dataset.

    Args:
        models: name → folder.
        tests: of which only the names count.
        out: the benchmark's folder.
        predict_flags, evaluate_flags: of `zept predict` and `zept evaluate`.
    """
    jobs = []
    for model, folder in models.items():
        for test in tests:
            data, predictions, report = (out / part / model / test.name for part in PARTS)
            name = f"{model}_{test.name}"
            command = ("zept", "predict", "-m", str(folder), "-i", str(data / "images"), "-o", str(predictions))
            flags = ("--save_scores", "--scores_if_any", "--continue_prediction", *predict_flags)
            predict = f"predict_{name}"
            trained = (
                folder / "plans.json",
                folder / "dataset.json",
                *sorted(folder.glob("fold_*/checkpoint_final.pth")),
            )
            if not test.is_predicted:
                jobs.append(
                    Job(predict, f"{model} on {test.name}", (*command, *flags), out / "done" / predict,
                        inputs=(*trained, data / "images"), folder=predictions)
                )  # fmt: skip
            judge = (
                "zept", "evaluate", "-r", str(data / "labels"), "--dataset-json", str(data / "dataset.json"),
                "-i", str(predictions), "-o", str(report), "--overwrite", *evaluate_flags,
            )  # fmt: skip
            evaluate = f"evaluate_{name}"
            purpose = f"figures of {model} on {test.name}"
            done, needs = out / "done" / evaluate, () if test.is_predicted else (predict,)
            inputs = (data / "labels", data / "dataset.json", *([predictions] if test.is_predicted else []))
            jobs.append(Job(evaluate, purpose, judge, done, needs, report / "metrics.csv", inputs))
    return jobs


PARTS = ("data", "predictions", "reports")


def table_of(models: Sequence[Model], tests: Sequence[LabeledCases], out: Path, partly: bool = False) -> pd.DataFrame:
    """One row a dataset, class and metric; per model its mean over cases and the 95 % interval.

    Args:
        models: its columns.
        tests: its rows.
        out: the benchmark's folder.
        partly: leave out what is not evaluated.

    Raises:
        ZePTError: figures are missing.
    """
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for model in models:
        for test in tests:
            if partly and not is_evaluated(out, model.name, test.name):
                continue
            metrics = read_metrics(out, model.name, test.name)
            for _, row in metrics[metrics["case"] == "mean"].iterrows():
                if (row["scope"], row["metric"]) not in METRICS or row["class"].startswith("("):
                    continue
                key = (test.name, row["class"], row["scope"], row["metric"])
                seen = "" if row["seen"] or pd.isna(row["value"]) else " [unseen]"
                rows.setdefault(key, {})[model.name] = with_interval(row) + seen
    names = ["dataset", "class", "scope", "metric"]
    cells = [dict(zip(names, key, strict=True)) | row for key, row in rows.items()]
    return pd.DataFrame(cells, columns=[*names, *(m.name for m in models)]).fillna("–")


def is_evaluated(out: Path, model: str, test: str) -> bool:
    """Whether there are figures of a model on a dataset, and none of an earlier model."""
    return (out / "done" / f"evaluate_{model}_{test}").is_file()


def read_metrics(out: Path, model: str, test: str) -> pd.DataFrame:
    """The figures of a model on a dataset.

    Raises:
        ZePTError: there are none.
    """
    path = out / "reports" / model / test / "metrics.csv"
    try:
        return pd.read_csv(path)
    except (OSError, pd.errors.EmptyDataError) as error:
        raise ZePTError(
            f"{path} cannot be read ({error}); remove {out / 'done' / f'evaluate_{model}_{test}'} and run the same "
            "command again"
        ) from error


def with_interval(row: Mapping[str, Any], digits: int = 3) -> str:
    """A row of metrics.csv as a cell: its value and 95 % interval, or "–" where it is not defined."""
    if pd.isna(row["value"]):
        return "–"
    interval = "" if pd.isna(row["ci_low"]) else f" ({row['ci_low']:.{digits}f}–{row['ci_high']:.{digits}f})"
    return f"{row['value']:.{digits}f}{interval}"


def write_table(table: pd.DataFrame, out: Path, title: str = "Benchmark", notes: Sequence[str] = ()) -> list[Path]:
    """benchmark.csv, benchmark.md and benchmark.html. `notes`: paragraphs above the table, in the latter two."""
    paths = [out / f"benchmark.{ending}" for ending in ("csv", "md", "html")]
    table.to_csv(paths[0], index=False)
    text = "\n\n".join([f"# {title}", *notes, table.to_markdown(index=False)])
    paths[1].write_text(text + "\n", encoding="utf-8")
    page = page_environment().get_template("html_benchmark.html.j2")
    rows = [[str(v) for v in row] for row in table.itertuples(index=False)]
    write_whole(
        paths[2], page.render(title=title, notes=notes, columns=list(table.columns), rows=rows, version=version())
    )
    return paths


def environment() -> dict[str, str]:
    """What nnU-Net and its trainers read, for jobs that run elsewhere; where the trainers are, unless somebody says."""
    found = {"nnUNet_extTrainer": str(trainers_path())}
    return found | {k: v for k, v in os.environ.items() if k.startswith(("nnUNet_", "ZEPT_"))}
