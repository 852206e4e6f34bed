"""``zept merge``: several raw datasets, each of which labels only some classes, in one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zept_nnunet.errors import ZePTError

if TYPE_CHECKING:
    from zept_nnunet.datasets.merge import Merge, MergeSource
    from zept_nnunet.datasets.same_scan import SameScan


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "merge",
        help="several partially labeled datasets in one",
        description="Merge raw datasets: labels are matched by name and synonym, images are referenced, not copied, "
        "and zept.annotated says what each case labels. Conflicts stop it. Scans that are the same are found by "
        "content: they stay in one fold, and a scan that is also a test scan stops it. An interrupted merge goes on.",
    )
    parser.add_argument("-d", required=True, nargs="+", metavar="ID", help="datasets: IDs or names")
    parser.add_argument("-o", required=True, metavar="ID", help="ID of the merged dataset, or its name DatasetXXX_NAME")
    parser.add_argument(
        "--map", metavar="FILE", help="YAML: labels: {ID: {LABEL: NAME or null}}, patients: {ID: REGEX}"
    )
    parser.add_argument(
        "--organs-from", action="append", default=[], metavar="[ID=]FOLDER",
        help="TotalSegmentator's output for a dataset's training cases: its organ labels (ID: of several datasets)",
    )  # fmt: skip
    parser.add_argument("--organs", nargs="+", default=[], metavar="NAME", help="which of them, for --organs-from")
    parser.add_argument("--test", nargs="+", default=[], metavar="ID", help="datasets whose test images must be others")
    parser.add_argument(
        "--allow-overlap",
        nargs="+",
        default=[],
        metavar="ID",
        help="of these datasets test scans may be among training",
    )
    parser.add_argument("--no-content-check", action="store_true", help="do not look for scans that are the same")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check and show everything; then write, unless it is a dry run."""
    raw = folder_of("nnUNet_raw")
    variable = "nnUNet_preprocessed"
    preprocessed = None if args.dry_run and not os.environ.get(variable) else folder_of(variable)

    from zept_nnunet.datasets.merge import Merge, MergeSource
    from zept_nnunet.datasets.merge_map import MergeMap
    from zept_nnunet.datasets.merge_splits import check_splits, make_splits, remarks
    from zept_nnunet.datasets.merge_write import described, empty_organs, state_of, write
    from zept_nnunet.datasets.same_scan import groups_of

    folders = [dataset_of(d, raw) for d in args.d]
    if len(folders) < 2 and not args.organs_from:
        raise ZePTError("-d wants two datasets or more (one with --organs-from)")
    organs = _organs(args, folders, {f: MergeSource.read(f) for f in folders})
    sources = [MergeSource.read(folder, organs.get(folder)) for folder in folders]
    target = raw / merged_name(args.o, folders, raw)
    merge = Merge(sources, MergeMap.read(Path(args.map)) if args.map else None)
    print(labels_table(merge))
    print_geometry(sources)
    for source in sources:
        if source.organs_from is not None:
            source.organs_from.check(source.cases)
    tests = [dataset_of(d, raw) for d in args.test]
    pairs = [] if args.no_content_check else _same_scans(sources, tests, args.allow_overlap, raw)
    names = [source.merged_case(case) for source in sources for case in source.cases]
    same = groups_of(names, pairs)
    splits = make_splits(merge, same)
    print(f"\n{len(names)} cases, {len(splits)} folds of {', '.join(str(len(s['val'])) for s in splits)} cases")
    for remark in remarks(merge, splits):
        print(f"  note: {remark}")
    content = described(merge, target, same)  # errors come before anything is written, and in the dry run too
    if preprocessed is not None:
        check_splits(preprocessed / target.name, splits)
    if state_of(target, content) == "changed":
        print(
            f"  note: the datasets have changed since {target.name} was merged: it is written anew. What was planned, "
            "preprocessed or trained with it is of the earlier one: start again from `zept plan`"
        )
    if args.dry_run:
        print(f"dry run: nothing was written; it would be {target}")
        return 0
    assert preprocessed is not None
    done = write(merge, target, content, splits, preprocessed / target.name)
    for name, organ in empty_organs(merge, target, content["file_ending"]):
        print(f"  WARNING: the masks of --organs-from show no voxel of {organ} in any case of {name}")
    print(f"{target}" + (f" ({done} label files were there already)" if done else ""))
    print(f"next: zept plan -d {int(target.name[7:10])}, or nnUNetv2_plan_and_preprocess -d {int(target.name[7:10])}")
    return 0


def folder_of(variable: str) -> Path:
    """One of nnU-Net's folders.

    Raises:
        ZePTError: the environment variable is not set.
    """
    if not os.environ.get(variable):
        raise ZePTError(f"the environment variable {variable} is not set: export {variable}=FOLDER")
    return Path(os.environ[variable])


def dataset_of(name: str, raw: Path) -> Path:
    """The raw dataset of an ID or name.

    Raises:
        ZePTError: there is none, or several.
    """
    digits = name[7:10] if name.startswith("Dataset") else f"{int(name):03d}" if name.isdigit() else ""
    found = sorted(p for p in raw.glob(f"Dataset{digits}_*") if p.is_dir()) if digits else []
    found = [p for p in found if "_" not in name or p.name == name]
    if len(found) != 1:
        there = ", ".join(sorted(p.name for p in raw.glob("Dataset*"))) or "no dataset"
        raise ZePTError(f"{name!r} names {len(found)} datasets in {raw}, wanted one; there are: {there}")
    return found[0]


def merged_name(name: str, folders: list[Path], raw: Path) -> str:
    """The merged dataset's name, from an ID or a name.

    Raises:
        ZePTError: it is neither, or the ID belongs to another dataset.
    """
    if name.isdigit() and 0 < int(name) < 1000:
        name = f"Dataset{int(name):03d}_Merged{''.join(f.name[7:10] for f in folders)}"
    if not (name.startswith("Dataset") and name[7:10].isdigit() and name[10:11] == "_" and name[11:]):
        raise ZePTError(f"-o wants an ID from 1 to 999 or a name such as Dataset110_Abdomen, got {name!r}")
    others = [p.name for p in raw.glob(f"{name[:10]}_*") if p.name != name]
    if others:
        raise ZePTError(f"-o {name}: the ID {name[7:10]} belongs to {others[0]}; choose a free one")
    return name


def _organs(args: argparse.Namespace, folders: list[Path], sources: dict[Path, MergeSource]) -> dict[Path, Any]:
    """Per dataset, the masks that --organs-from gives it."""
    from zept_nnunet.datasets.model_organs import ModelOrgans
    from zept_nnunet.knowledge.catalog import catalog
    from zept_nnunet.taxonomy import Tumor

    found = {}
    for entry in args.organs_from:
        dataset, _, folder = entry.rpartition("=")
        if not dataset and len(folders) > 1:
            raise ZePTError(
                f"--organs-from {entry}: several datasets are merged; say whose organs these are: ID=FOLDER"
            )
        of = dataset_of(dataset, folders[0].parent) if dataset else folders[0]
        if of not in folders:
            raise ZePTError(f"--organs-from {entry}: {of.name} is not among -d")
        source = sources[of]
        wanted = list(args.organs)
        if not wanted:  # the organs that its tumors' descriptions name
            tumors = [c for c in source.taxonomy.classes if isinstance(c, Tumor)]
            entries = [catalog().find(source.taxonomy.reading(t.name), t.hosts, "tumor") for t in tumors]
            wanted = [h for e in entries if e is not None for h in e.hosts]
        found[of] = ModelOrgans.find(Path(folder), wanted, list(source.cases))
    if args.organs and not args.organs_from:
        raise ZePTError("--organs says which masks of --organs-from to take: give --organs-from too")
    return found


def labels_table(merge: Merge) -> str:
    """What each merged class is called in each dataset."""
    import pandas as pd  # type: ignore[import-untyped]

    rows = []
    for entry in merge.classes:
        row = {"label": merge.labels[entry.name], "class": entry.name, "hosts": ", ".join(entry.hosts)}
        for source in merge.sources:
            members = entry.members.get(source.id, [])
            row[source.folder.name] = ", ".join(f"{n} ({'mask' if v is None else v})" for n, v in members) or "-"
        rows.append(row)
    left_out = {
        s.folder.name: sorted(
            {n for n, *_ in s.classes()} - {n for c in merge.classes for n, _ in c.members.get(s.id, [])}
        )
        for s in merge.sources
    }
    notes = [f"left out of {name}: {', '.join(names)}" for name, names in left_out.items() if names]
    return "\n".join([pd.DataFrame(rows).to_string(index=False), *notes])


def print_geometry(sources: list[MergeSource]) -> None:
    """Orientation and spacing of every dataset, and what differs."""
    from zept_nnunet.datasets.geometry import geometry_of

    codes: set[str] = set()
    print()
    for source in sources:
        geometry = geometry_of(source)
        codes |= set(geometry.orientations)
        numbers = " × ".join(
            f"{m:.2f} ({low:.2f}–{high:.2f})" for m, (low, high) in zip(geometry.spacing, geometry.spread, strict=True)
        )
        orientations = ", ".join(f"{code} {n}" for code, n in sorted(geometry.orientations.items())) or "unknown"
        channels = ", ".join(source.channels.values())
        print(f"{source.folder.name}: {geometry.cases} cases, {channels}, orientation {orientations}, mm {numbers}")
        if geometry.unread:
            print(f"  {geometry.unread} cases: headers could not be read here; orientation and spacing unchecked")
        if geometry.mismatched:
            shown = ", ".join(geometry.mismatched[:5])
            print(f"  WARNING: label and image lie on different grids in {len(geometry.mismatched)} cases: {shown}")
    if len(codes) > 1:
        print(
            f"  WARNING: the images are stored in {len(codes)} orientations ({', '.join(sorted(codes))}). nnU-Net's "
            "SimpleITKIO reads arrays as they are stored, so left and right may be swapped between them: reorient the "
            'images, or set "overwrite_image_reader_writer": "NibabelIOWithReorient" in dataset.json'
        )


def _test_scans(folder: Path, with_training: bool) -> dict[str, Path]:
    """Name of each test scan → its first image; `with_training`: and of the training scans, which test there too."""
    from zept_nnunet.datasets.raw_folder import file_ending_of, read_dataset_json, training_cases

    dataset_json = read_dataset_json(folder)
    ending = f"_0000{file_ending_of(dataset_json, folder)}"
    found = {image.name.removesuffix(ending): image for image in sorted((folder / "imagesTs").glob(f"*{ending}"))}
    if with_training and ("dataset" in dataset_json or (folder / "imagesTr").is_dir()):
        cases = training_cases(folder, dataset_json)
        found |= {f"imagesTr/{case}": Path(files["images"][0]) for case, files in cases.items()}
    return found


def _same_scans(sources: list[MergeSource], tests: list[Path], allowed: list[str], raw: Path) -> list[SameScan]:
    """Pairs of training scans that are one; an error where a training scan is a test scan."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from zept_nnunet.datasets.same_scan import find_same_scans, read_landmarks, summary, without_landmarks

    paths = {s.merged_case(case): Path(files["images"][0]) for s in sources for case, files in s.cases.items()}
    training = set(paths)
    merged = [s.folder for s in sources]
    test_of: dict[str, str] = {}
    for folder in dict.fromkeys([*merged, *tests]):
        found = _test_scans(folder, folder not in merged)
        if folder in tests and not found:
            raise ZePTError(
                f"--test {folder.name}: it holds no scan to compare; wanted images in {folder / 'imagesTs'}"
                + ("" if folder in merged else " or imagesTr")
            )
        for case, image in found.items():
            name = f"test {folder.name}/{case}"
            paths[name], test_of[name] = image, folder.name
    scans = {name: read_landmarks(path) for name, path in tqdm(paths.items(), desc="content", unit="scan")}
    pairs = find_same_scans(paths, scans)
    if small := without_landmarks(scans):
        print(
            f"\n{len(small)} scans are too small for landmarks, or not of three dimensions: of these only copies, "
            f"voxel by voxel, are found: {', '.join(small[:5])}{' …' if len(small) > 5 else ''}"
        )
    among = [p for p in pairs if {p.first, p.second} <= training]
    if among:
        print(
            f"\n{len(among)} pairs of training scans are the same scan; each pair stays in one fold:\n{summary(among)}"
        )
    exempt = {dataset_of(d, raw).name for d in allowed}
    across = [p for p in pairs if (p.first in training) != (p.second in training)]
    refused = [p for p in across if test_of[p.second if p.first in training else p.first] not in exempt]
    if refused:
        datasets = sorted({test_of[p.second if p.first in training else p.first] for p in refused})
        raise ZePTError(
            f"{len(refused)} training scans are test scans too:\n{summary(refused)}\nLeave them out of training, or "
            f"allow it where no figure will be taken from these test scans: --allow-overlap {' '.join(datasets)}"
        )
    if across:
        print(f"\n{len(across)} training scans are test scans too (allowed):\n{summary(across)}")
    return among
