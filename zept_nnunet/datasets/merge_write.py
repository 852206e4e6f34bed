"""Writing a merged dataset: it appears whole or not at all, goes on where it was interrupted, and is written anew where
a source has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from zept_nnunet.datasets.merge import KEY, Merge, MergeSource
from zept_nnunet.datasets.merge_splits import Splits, write_splits
from zept_nnunet.datasets.raw_folder import nearest_hosts, read_label_map, relabeled, write_dataset_json
from zept_nnunet.errors import ZePTError
from zept_nnunet.files import stamp


def described(merge: Merge, target: Path, same: Mapping[str, str]) -> dict[str, Any]:
    """The dataset.json of `merge` at `target`, with the digest of all that it and its labels are made of.

    Args:
        merge: what is merged.
        target: the merged dataset's folder; it need not be there.
        same: case → a case that stands for all that are the same scan.

    Raises:
        ZePTError: as `Merge.dataset_json`, or a label or mask is missing.
    """
    content = merge.dataset_json(target, same)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    for source in merge.sources:
        digest.update(json.dumps(source.dataset_json, sort_keys=True, default=str).encode())
        digest.update(repr((sorted(merge.table_of(source).items()), sorted(merge.hosts_of(source).items()))).encode())
    for source, case, files in merge.cases():
        masks = source.organs_from.files(case) if source.organs_from else []
        for path in map(Path, (files["label"], *masks)):
            try:
                digest.update(f"{path} {stamp(path)}\n".encode())
            except OSError as error:
                raise ZePTError(f"{path} cannot be read ({error.strerror}); case {case!r} wants it") from error
    content[KEY]["digest"] = digest.hexdigest()
    return content


def state_of(target: Path, content: Mapping[str, Any]) -> str:
    """ "new" where nothing is at `target`, "done" where it is what `content` (of `described`) says, "changed" where it
    is a merge of the same datasets into the same labels, but a source is not what it was.

    Raises:
        ZePTError: another dataset is there.
    """
    if not target.exists():
        return "new"
    try:
        found = json.loads((target / "dataset.json").read_text(encoding="utf-8"))
        record, labels = found[KEY], found["labels"]
        if record["digest"] == content[KEY]["digest"]:
            return "done"
        if list(record["sources"]) == list(content[KEY]["sources"]) and labels == content["labels"]:
            return "changed"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no merged dataset
    raise ZePTError(
        f"{target} exists and is not what this merge would make; choose another ID (-o) or remove it, and "
        "the folders of the same name in nnUNet_preprocessed and nnUNet_results"
    )


def write(merge: Merge, target: Path, content: Mapping[str, Any], splits: Splits, preprocessed: Path) -> int:
    """Write the merged dataset and its folds; returns how many label files were there from an interrupted run.

    Label files come first, each whole or not at all, in a folder beside `target`; then dataset.json and the folds; at
    last the folder takes its place, and that of an earlier merge of the same datasets.

    Args:
        merge: what is merged.
        target: the merged dataset's folder.
        content: its dataset.json, of `described`.
        splits: its folds.
        preprocessed: its folder in nnUNet_preprocessed; it need not be there.

    Raises:
        ZePTError: `target` holds another dataset, or a label file cannot be read or holds an unknown value.
    """
    state = state_of(target, content)
    if state == "done":
        write_splits(preprocessed, splits)
        return len(list(merge.cases()))
    scratch = target.parent / f".zept_merge_{target.name}"
    record, digest = scratch / "merge.json", str(content[KEY]["digest"])
    if scratch.exists() and (not record.is_file() or record.read_text(encoding="utf-8") != digest):
        shutil.rmtree(scratch)  # of another merge
    (scratch / "labelsTr").mkdir(parents=True, exist_ok=True)
    record.write_text(digest, encoding="utf-8")
    ending = str(content["file_ending"])
    for leftover in (scratch / "labelsTr").glob(f".partial_*{ending}"):
        leftover.unlink()
    done = 0
    for source, case, files in tqdm(list(merge.cases()), desc=f"labels of {target.name}", unit="case"):
        label = scratch / "labelsTr" / f"{source.merged_case(case)}{ending}"
        if label.is_file():
            done += 1
            continue
        partial = label.with_name(f".partial_{label.name}")
        write_label(merge, source, case, files, partial)
        partial.rename(label)
    write_dataset_json(scratch, content)
    write_splits(preprocessed, splits)  # before the dataset: nnU-Net would make folds of its own
    if state == "changed":
        shutil.rmtree(target)
    scratch.rename(target)
    (target / record.name).unlink()
    return done


def write_label(merge: Merge, source: MergeSource, case: str, files: Mapping[str, Any], path: Path) -> None:
    """A case's label file with the merged label values.

    Args:
        merge: what is merged.
        source: whose case it is.
        case: its name there.
        files: its `images` and `label`.
        path: of the file to write.

    Raises:
        ZePTError: the label or a mask cannot be read, or holds an unknown value.
    """
    reader = source.reader
    before, properties = read_label_map(Path(files["label"]), reader)
    try:
        values = nearest_hosts(before, merge.hosts_of(source), properties["spacing"])
        merged = relabeled(values, merge.table_of(source), source.folder / "dataset.json")
    except ZePTError as error:
        raise ZePTError(f"{files['label']}: {error}") from error
    if source.organs_from is not None:
        merged = source.organs_from.under(merged, case, merge.masks_of(source), reader)
    reader.write_seg(merged, str(path), properties)


def empty_organs(merge: Merge, target: Path, ending: str) -> Iterator[tuple[str, str]]:
    """Dataset and organ where no label file at `target` holds a voxel of the organ that a model's masks gave."""
    for source in merge.sources:
        wanted = {value: name for name, value in merge.masks_of(source).items()}
        for case in source.cases:
            if not wanted:
                break
            path = target / "labelsTr" / f"{source.merged_case(case)}{ending}"
            for value in np.unique(read_label_map(path, source.reader)[0]).tolist():
                wanted.pop(value, None)
        for name in wanted.values():
            yield source.folder.name, name
