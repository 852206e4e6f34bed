"""What partial labels cost: ZePT on three partially labeled datasets, merged, against full labels.

    python benchmarks/partial_labels.py --size small --seeds 3 --epochs 4 --iterations 250

The phantom's training cases are shared out among three datasets: one labels the organs, tumors being part of them; one
the liver and its tumors; one the kidneys and theirs. `zept merge` makes one of them. Compared are, on the same images,
split and budget: `full` (every class labeled everywhere), `partial` (merged), and `background` (merged, and what a case
does not label is taken for background, as training without `zept.annotated` has it). Figures go to
results/partial_labels.csv; those on final-unseen types are left out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm
from zero_shot import PLANS, Workspace, arguments, measure, minutes_of, parse, print_table

from zept_nnunet.datasets.derived import Source, relabel
from zept_nnunet.datasets.raw_folder import new_dataset, write_dataset_json

RESULTS = Path(__file__).parent / "results" / "partial_labels.csv"
CONDITIONS = {"full": 900, "partial": 914, "background": 915}
PARTS: dict[int, tuple[str, dict[str, int]]] = {
    911: ("Organs", {"liver": 1, "spleen": 2, "kidney left": 3, "kidney right": 4, "pancreas": 5, "stomach": 6}),
    912: ("Liver", {"liver": 1, "liver tumor": 2}),
    913: ("Kidneys", {"kidney left": 1, "kidney right": 2, "kidney tumor": 3}),
}


class Condition(Workspace):
    """zero_shot.py's workspace with another training dataset and the same test images."""

    def __init__(self, folder: Path, args: argparse.Namespace, dataset_id: int):
        super().__init__(folder, args)
        object.__setattr__(self, "dataset_id", dataset_id)


def part_of(index: int) -> int:
    """The dataset that the case of this number goes to; in threes, whatever lesions come in turns."""
    return 911 + int(np.random.default_rng([911, index // 3]).permutation(3)[index % 3])


def write_parts(phantom: Path, raw: Path) -> dict[str, str]:
    """The three datasets, images by reference; returns the phantom's case → its name in the merged dataset."""
    source = Source.read(phantom)
    cases = source.cases()
    parts = {case: part_of(i) for i, case in enumerate(sorted(cases))}
    for number, (title, labels) in PARTS.items():
        target = raw / f"Dataset{number}_{title}"
        if target.is_dir():
            continue
        its = [case for case, part in parts.items() if part == number]
        with new_dataset(target) as scratch:
            (scratch / "labelsTr").mkdir()
            mapping = {}
            for case in tqdm(its, desc=target.name, unit="case"):
                reader = source.reader(cases[case]["images"][0])
                seg, properties = reader.read_seg(cases[case]["label"])
                label = only(np.rint(seg[0]).astype(np.int64), source, labels, tuple(properties["spacing"]))
                reader.write_seg(label, str(scratch / "labelsTr" / f"{case}.nii.gz"), properties)
                images = [os.path.relpath(image, target) for image in cases[case]["images"]]
                mapping[case] = {"images": images, "label": f"labelsTr/{case}.nii.gz"}
            keep = ("channel_names", "file_ending", "overwrite_image_reader_writer")
            zept = {"unseen": source.dataset_json["zept"]["unseen"]} if title == "Organs" else {}
            content = {k: source.dataset_json[k] for k in keep} | {"labels": {"background": 0, **labels}}
            write_dataset_json(scratch, content | {"numTraining": len(its), "dataset": mapping, "zept": zept})
    return {case: f"d{part}_{case}" for case, part in parts.items()}


def only(seg: np.ndarray, source: Source, labels: dict[str, int], spacing: tuple[float, ...]) -> np.ndarray:
    """A label map of the phantom → what somebody labels who labels these classes alone."""
    if not any("tumor" in name for name in labels):  # organs as wholes
        return relabel(seg, source, "organs", spacing)
    values = {c.name: c.label for c in source.taxonomy.classes}
    label = np.zeros(seg.shape, np.uint8)
    for name, value in labels.items():
        label[seg == values[name]] = value
    return label


def prepare(base: Workspace, phantom: Path) -> dict[str, tuple[Workspace, Path]]:
    """The three conditions, planned and with one split."""
    raw, preprocessed = base.folder / "nnUNet_raw", base.folder / "nnUNet_preprocessed"
    names = write_parts(phantom, raw)
    merged, ignored = raw / "Dataset914_Merged", raw / "Dataset915_TakenForBackground"
    if not merged.is_dir():
        base.run(0, "data", "zept", "merge", "-d", "911", "912", "913", "-o", merged.name, "--no-content-check")
    if not ignored.is_dir():
        with new_dataset(ignored) as scratch:
            (scratch / "labelsTr").symlink_to(merged / "labelsTr")
            content = json.loads((merged / "dataset.json").read_text())
            del content["zept"]["annotated"]
            write_dataset_json(scratch, content)
    split = json.loads((preprocessed / phantom.name / "splits_final.json").read_text())
    renamed = [{part: [names[case] for case in its] for part, its in fold.items()} for fold in split]
    found: dict[str, tuple[Workspace, Path]] = {"full": (base, phantom)}
    for condition, dataset in (("partial", merged), ("background", ignored)):
        (preprocessed / dataset.name).mkdir(exist_ok=True)
        (preprocessed / dataset.name / "splits_final.json").write_text(json.dumps(renamed, indent=1))
        workspace = Condition(base.folder, base.args, CONDITIONS[condition])
        workspace.plan(dataset)
        found[condition] = (workspace, dataset)
    return found


def main() -> None:
    parser = arguments(__doc__, tuple(CONDITIONS), "conditions")
    parser.set_defaults(test_cases=64)
    args = parse(parser)
    base = Workspace((args.workspace / args.size).resolve(), args)
    phantom = base.prepare()
    conditions = prepare(base, phantom)

    def one(condition: str, seed: int) -> float:
        workspace, dataset = conditions[condition]
        name = "zept" if condition == "full" else condition  # ablation.py trains it too, once for both
        workspace.zept(name, PLANS, seed, dataset, (workspace.test,))
        if condition == "full":
            link = workspace.predictions(condition, seed, workspace.test)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(workspace.predictions(name, seed, workspace.test))
        return minutes_of(workspace, condition, seed)

    table = measure(base, phantom, args.conditions, one, RESULTS)
    with pd.option_context("display.width", 200):
        print_table(table)


if __name__ == "__main__":
    main()
