"""A task of the Medical Segmentation Decathlon, by nnU-Net's own converter, with the names and hosts of its recipe."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.datasets.prepare import Case, dataset_json, listed, read_image, read_labels, recipes
from zept_nnunet.datasets.raw_folder import new_dataset, read_dataset_json, write_dataset_json
from zept_nnunet.errors import ZePTError
from zept_nnunet.jobs import executable


def prepare_msd(name: str, source: Path, target: Path, processes: int, partial: bool = False) -> int:
    """Write the raw dataset; returns the number of training cases.

    Args:
        name: of a recipe of this kind.
        source: the task's unpacked folder.
        target: folder of the new dataset, which does not exist.
        processes: of the converter.
        partial: a part of the download will do; training cases that lack a file, and absent test images, are left out.

    Raises:
        ZePTError: the folder is not the task's, its dataset.json or a file differs from the recipe, or the converter
            fails; nothing is left then.
    """
    recipe = recipes()[name]
    if source.name != recipe["task"]:
        raise ZePTError(f"{source} is not called {recipe['task']}, as the unpacked download is")
    path = source / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = {int(value): str(label) for value, label in content["labels"].items() if int(value)}
        training = [(str(entry["image"]), str(entry["label"])) for entry in content["training"]]
        tests = [str(file) for file in content.get("test", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZePTError(f"{path} is missing or not that of the decathlon ({error!r})") from error
    if {v: label.lower() for v, label in written.items()} != {v: t.lower() for v, t in recipe["written"].items()}:
        raise ZePTError(f"{path} names the labels {written}, the recipe wants {recipe['written']}")
    missing = [file for file in (f for files in (*training, tests) for f in files) if not (source / file).is_file()]
    if missing and not partial:
        raise ZePTError(
            f"{source / missing[0]} is missing, which {path.name} lists. Download the rest, or go on with what is "
            "there: --partial"
        )
    if not partial and not (source / "imagesTs").is_dir():
        raise ZePTError(f"{source / 'imagesTs'} is missing")
    whole = [pair for pair in training if not set(pair) & set(missing)]
    if not whole:
        raise ZePTError(f"{path} lists no training case of which image and label are there")
    with ExitStack() as stack:
        if missing or not (source / "imagesTs").is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".zept_partial_", dir=target.parent)))
            left_out = [Path(image).name for image, label in training if (image, label) not in whole]
            print(f"{len(left_out)} cases lack a file and are left out: {listed(left_out)}")
            there = [test for test in tests if test not in missing]
            print(f"{len(tests) - len(there)} of {len(tests)} test images are not there")
            source = _part_of(source, folder / source.name, content, whole, there)
        for image, label in tqdm(whole, desc=f"labels of {source.name}", unit="case"):
            read_labels(recipe, label, Case(label={"": [source / label]}), read_image([source / image]))
        labels = {"background": 0, **recipe["labels"]}
        with new_dataset(target) as scratch:
            _convert(source, scratch, int(target.name[7:10]), processes)
            nnunet = read_dataset_json(scratch)
            write_dataset_json(scratch, nnunet | dataset_json(name, recipe, labels, path.parent))
    return int(nnunet["numTraining"])


def _part_of(
    source: Path, folder: Path, content: Mapping[str, Any], training: Sequence[tuple[str, str]], tests: Sequence[str]
) -> Path:
    """A folder like the task's, with links to these files alone: the converter takes whatever lies in its folders."""
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    for file in (*(file for pair in training for file in pair), *tests):
        (folder / file).symlink_to((source / file).resolve())
    entries = [{"image": image, "label": label} for image, label in training]
    counts = {"numTraining": len(training), "numTest": len(tests)}
    write_dataset_json(folder, {**content, **counts, "training": entries, "test": list(tests)})
    return folder


def _convert(source: Path, folder: Path, number: int, processes: int) -> None:
    """nnU-Net's converter into an nnUNet_raw of its own, from which the dataset moves to `folder`."""
    command = "nnUNetv2_convert_MSD_dataset"
    with tempfile.TemporaryDirectory(prefix=".zept_partial_", dir=folder.parent) as raw:
        arguments = ["-i", str(source), "-overwrite_id", str(number), "-np", str(processes)]
        environment = {**os.environ, "nnUNet_raw": raw}
        done = subprocess.run([executable(command), *arguments], env=environment, capture_output=True, text=True)
        if done.returncode:
            # the exception of a worker, without the lines that say where in the code it was
            said = [line for line in done.stderr.splitlines() if line and not line.startswith((" ", "Traceback"))]
            raise ZePTError(f"{command} could not convert {source}: {' '.join(said[-3:]) or done.returncode}")
        (made,) = Path(raw).iterdir()
        for path in made.iterdir():
            path.rename(folder / path.name)
