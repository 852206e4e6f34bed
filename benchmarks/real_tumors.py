"""Lesions in real anatomy: inserted ones, and real liver tumors; no model was ever shown a liver tumor.

    python benchmarks/real_tumors.py --data DATA_FOLDER --seeds 1 --epochs 15 --iterations 250

Training data hold tumors of kidneys and spleen, none of the liver: phantom cases, and deformed copies of a real CT with
the organ labels that TotalSegmentator gave it, into which synthetic lesions are inserted (DATA_FOLDER/abdomen_ct:
example_ct.nii.gz and example_seg_fast_force_split.nii.gz of its test files). The liver holds synthetic anomalies, as
any organ without labeled tumors, for every method that trains on them. There are two tests, apart in every table:

- "inserted": more deformed copies of that CT, half of them healthy, the others with synthetic lesions, also in the
  liver. Real anatomy and noise, but the patient whom training saw, with its organ labels from a model.
- "real": one other CT with real tumors (DATA_FOLDER/liver_ct: ircadb_01_ct.nii.gz, and ircadb_01_liver_tumor.nii.gz
  with liver 1, tumor 2). One patient: an illustration, no accuracy.

Methods, plans, budget and evaluation are those of zero_shot.py. Figures go to results/real_tumors.csv. The pictures, in
three planes, stay in the workspace: the data's licenses do not allow to publish them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib.figure import Figure
from scipy import ndimage
from tqdm import tqdm
from zero_shot import Workspace, append_rows, arguments, link_case, matches, minutes_of, parse

from zept_nnunet.datasets.insert_lesions import SUFFIX, paint_into, plan_insertions
from zept_nnunet.datasets.phantom import LABELS as PHANTOM_LABELS
from zept_nnunet.datasets.phantom import SIZES, VERSION, draw_phantom_case
from zept_nnunet.datasets.phantom_parameters import ORGANS
from zept_nnunet.datasets.raw_folder import new_dataset, write_dataset_json

RESULTS = Path(__file__).parent / "results" / "real_tumors.csv"
METHODS = ("host_deviation", "any_tumor", "any_tumor_plus", "any_tumor_rel", "zept")
NAME = "Dataset920_SyntheticLesionsLiverUnseen"
SEEN, UNSEEN = ("kidney tumor", "spleen tumor"), "liver tumor"
LABELS = {"background": 0, **ORGANS, "kidney tumor": 7, "spleen tumor": 8}
UNSEEN_LABEL = 9
TEST_CASE = "ircadb_01"
REAL_LABELS = {"spleen": 1, "kidney right": 2, "kidney left": 3, "liver": 5, "stomach": 6, "pancreas": 7}
PHANTOM_CASES, REAL_COPIES, TEST_COPIES = 90, 60, 48
REAL, INSERTED = "real", "inserted"
SPACING_MM = (6.0, 6.0, 7.5)  # X Y Z of the deformed copies: about that of the phantom's size small
CONTENT = {
    "channel_names": {"0": "CT"},
    "labels": LABELS,
    "numTraining": PHANTOM_CASES + REAL_COPIES,
    "file_ending": ".nii.gz",
    "overwrite_image_reader_writer": "SimpleITKIO",
    "description": "Synthetic lesions in a CT phantom and in deformed copies of one real CT. One test case "
    "with real tumors. Not for any clinical purpose, not to be published.",
    "zept": {
        "unseen": {UNSEEN: {"hosts": ["liver"], "label": UNSEEN_LABEL}},
        "annotated": {f"{TEST_CASE}*": ["liver", UNSEEN]},
    },
}
KEY = ["phantom", "configuration", "epochs", "iterations", "minutes", "method", "seed"]
SHOWN = {
    ("host", "auroc"): "AUROC in host",
    ("host", "fpr95"): "FPR95 in host",
    ("volume", "froc_score"): "FROC score",
    ("volume", "dsc"): "DSC",
    ("volume", "lesion_recall"): "lesion recall",
    ("volume", "false_positives_per_healthy_scan"): "FP per healthy scan",
    ("volume", "dsc_at_fp_1"): "DSC at 1 FP",
    ("volume", "lesion_recall_at_fp_1"): "lesion recall at 1 FP",
}


class RealTumors(Workspace):
    """zero_shot.py's workspace with another dataset."""

    dataset_id = 920

    def prepare(self) -> Path:
        """Dataset, plans, split; returns the raw dataset."""
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        dataset = self.folder / "nnUNet_raw" / NAME
        if not dataset.is_dir():
            write_dataset(dataset, self.args.data)
        self.plan(dataset)
        self.write_split(dataset, lambda case: self._is_healthy(dataset, case))
        for image in (dataset / "imagesTs").iterdir():
            case = image.name.removesuffix("_0000.nii.gz")
            folder = self.folder / (REAL if case == TEST_CASE else INSERTED)
            link_case(dataset, case, folder)
        return dataset

    def images(self, dataset: Path) -> dict[str, Path]:
        """Both tests apart, and validation images for thresholds."""
        tests = {name: self.folder / name / "imagesTs" for name in (REAL, INSERTED)}
        return tests | {"validation": self.folder / "validation_images"}

    def evaluate_test(self, name: str, method: str, seed: int, dataset: Path) -> pd.DataFrame:
        """The aggregate rows of `zept evaluate`; a matched rate of false positives where the test has healthy scans."""
        flags: list[str | Path] = ["-r", self.folder / name / "labelsTs"]
        flags += ["--dataset-json", dataset / "dataset.json"]
        if name == INSERTED:
            flags += ["--calibration", self.predictions(method, seed, "validation")]
            flags += ["--calibration-references", dataset / "labelsTr"]
        rows = self.report(method, seed, name, self.predictions(method, seed, f"report_{name}"), *flags)
        return rows[rows["case"].isin(("mean", "pooled"))].assign(test=name)

    @staticmethod
    def _is_healthy(dataset: Path, case: str) -> bool:
        labels = sitk.GetArrayViewFromImage(sitk.ReadImage(str(dataset / "labelsTr" / f"{case}.nii.gz")))
        return int(labels.max()) <= max(ORGANS.values())


def write_dataset(target: Path, data: Path) -> None:
    """Phantom cases and deformed copies of the real CT for training, the real tumors for the test."""
    files = {
        name: data / folder / f"{name}.nii.gz"
        for folder, names in (
            ("abdomen_ct", ("example_ct", "example_seg_fast_force_split")),
            ("liver_ct", ("ircadb_01_ct", "ircadb_01_liver_tumor")),
        )
        for name in names
    }
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise SystemExit(f"missing: {missing}; give the folder that holds abdomen_ct and liver_ct with --data")
    with new_dataset(target) as scratch:
        for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (scratch / name).mkdir()
        training = [classes_of(i) for i in range(REAL_COPIES)]
        test = [test_classes_of(i) for i in range(TEST_COPIES)]
        for part, split, total in (
            (phantom_cases(PHANTOM_CASES), "Tr", PHANTOM_CASES),
            (real_copies(files, "training", training), "Tr", REAL_COPIES),
            (real_copies(files, "test", test), "Ts", TEST_COPIES),
        ):
            for case, image, labels, spacing in tqdm(part, total=total, desc=f"images{split}", unit="case"):
                for array, path in (
                    (image, scratch / f"images{split}" / f"{case}_0000.nii.gz"),
                    (labels, scratch / f"labels{split}" / f"{case}.nii.gz"),
                ):
                    volume = sitk.GetImageFromArray(array)
                    volume.SetSpacing(spacing)
                    sitk.WriteImage(volume, str(path), useCompression=True)
        image = sitk.ReadImage(str(files["ircadb_01_ct"]), sitk.sitkInt16)
        reference = sitk.ReadImage(str(files["ircadb_01_liver_tumor"]))
        found = sitk.GetArrayFromImage(reference)
        mapped = np.zeros_like(found, dtype=np.uint8)
        mapped[found == 1], mapped[found == 2] = LABELS["liver"], UNSEEN_LABEL
        label = sitk.GetImageFromArray(mapped)
        label.CopyInformation(reference)
        sitk.WriteImage(image, str(scratch / "imagesTs" / f"{TEST_CASE}_0000.nii.gz"))
        sitk.WriteImage(label, str(scratch / "labelsTs" / f"{TEST_CASE}.nii.gz"), useCompression=True)
        write_dataset_json(scratch, CONTENT)


Case = tuple[str, np.ndarray, np.ndarray, tuple[float, float, float]]


def classes_of(index: int) -> tuple[str, ...]:
    """Of four cases two hold both types and two one of them; every eighth none."""
    return () if index % 8 == 7 else tuple(name for i, name in enumerate(SEEN) if index % 4 != i + 1)


def test_classes_of(index: int) -> tuple[str, ...]:
    """Every second case is healthy; of the others, half hold the unseen type, and half one of the seen."""
    return () if index % 2 else ((UNSEEN,), SEEN[:1], (UNSEEN,), SEEN[1:])[index // 2 % 4]


def phantom_cases(count: int) -> Iterator[Case]:
    """case, image (Z, Y, X) int16, labels uint8, spacing X Y Z; seeded apart from the benchmark's phantom."""
    new_value = {PHANTOM_LABELS[name]: value for name, value in LABELS.items()}
    for index in range(count):
        drawn = draw_phantom_case(SIZES["small"], classes_of(index), [920, index])
        labels = np.zeros_like(drawn.labels)
        for old, new in new_value.items():
            labels[drawn.labels == old] = new
        yield f"phantom_{index:03d}", drawn.image_hu, labels, drawn.spacing_mm[::-1]


def real_copies(files: dict[str, Path], split: str, classes: Sequence[Sequence[str]]) -> Iterator[Case]:
    """Smoothly deformed, scaled and noisy copies, with synthetic lesions of these classes each; names say so."""
    # arrays are written with nnU-Net's usual orientation, that of the phantom; this file's is RAS
    image = sitk.DICOMOrient(sitk.ReadImage(str(files["example_ct"]), sitk.sitkFloat32), "LPS")
    label = sitk.DICOMOrient(sitk.ReadImage(str(files["example_seg_fast_force_split"])), "LPS")
    size = [round(n * s / t) for n, s, t in zip(image.GetSize(), image.GetSpacing(), SPACING_MM, strict=True)]
    grid = (size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), SPACING_MM, image.GetDirection(), -1024)
    smoothed = sitk.SmoothingRecursiveGaussian(image, [0.4 * s for s in SPACING_MM])
    hu = sitk.GetArrayFromImage(sitk.Resample(smoothed, *grid, sitk.sitkFloat32))
    nearest = (*grid[:2], sitk.sitkNearestNeighbor, *grid[3:6], 0, label.GetPixelID())
    found = sitk.GetArrayFromImage(sitk.Resample(label, *nearest))
    organs = np.zeros(found.shape, np.uint8)
    for name, value in REAL_LABELS.items():
        organs[found == value] = LABELS[name]
    insertions = {i.name: i for i in plan_insertions(CONTENT, (*SEEN, UNSEEN), "real copies")}
    for index, wanted in enumerate(classes):
        rng = np.random.default_rng([920, 1 if split == "training" else 2, index])
        field = [ndimage.gaussian_filter(rng.standard_normal(hu.shape), 5) for _ in range(3)]
        scale = rng.uniform(0.9, 1.1, 3)
        middle = [(n - 1) / 2 for n in hu.shape]
        where = [
            m + (g - m) * s + f / np.abs(f).max() * rng.uniform(0.5, 2.5)
            for g, f, s, m in zip(np.indices(hu.shape), field, scale, middle, strict=True)
        ]
        moved = ndimage.map_coordinates(hu, where, order=1, mode="nearest")
        moved = (moved + rng.normal(0, rng.uniform(2, 8), hu.shape)).astype(np.float32)
        labels = ndimage.map_coordinates(organs, where, order=0, mode="nearest")
        for name in wanted:
            for _ in range(int(rng.integers(1, 3))):
                paint_into(moved, labels, insertions[name], SPACING_MM[::-1], "auto", rng)
        name = f"real_ct_{split}_{index:03d}" + (SUFFIX if labels.max() > max(ORGANS.values()) else "")
        yield name, np.rint(moved).astype(np.int16), labels, SPACING_MM


def draw(workspace: RealTumors, dataset: Path, methods: list[str], seed: int) -> Path:
    """Three planes through the largest tumor: the image with the reference's outline, and each method's scores."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(dataset / "imagesTs" / f"{TEST_CASE}_0000.nii.gz")), "LPS")
    spacing = image.GetSpacing()[::-1]
    oriented = sitk.ReadImage(str(dataset / "labelsTs" / f"{TEST_CASE}.nii.gz"))
    reference = sitk.GetArrayFromImage(sitk.DICOMOrient(oriented, "LPS"))
    parts, count = ndimage.label(reference == UNSEEN_LABEL)
    largest = 1 + int(np.argmax(ndimage.sum_labels(parts > 0, parts, range(1, count + 1))))
    center = [round(c) for c in ndimage.center_of_mass(parts == largest)]
    hu = sitk.GetArrayFromImage(image)
    figure = Figure(figsize=(3.2 * (1 + len(methods)), 9.5), layout="constrained")
    axes = figure.subplots(3, 1 + len(methods))
    for column, method in enumerate([None, *methods]):
        scores = None
        if method is not None:
            with np.load(workspace.predictions(method, seed, REAL) / f"{TEST_CASE}_scores.npz") as file:
                raw = file["logits"][file["classes"].tolist().index(UNSEEN)].astype(np.float32)
            volume = sitk.GetImageFromArray(raw)
            volume.CopyInformation(oriented)
            scores = sitk.GetArrayFromImage(sitk.DICOMOrient(volume, "LPS"))
            inside = scores[np.isin(reference, (LABELS["liver"], UNSEEN_LABEL))]
            low, high = np.percentile(inside, (50, 99.5))
        for row in range(3):
            ax, others = axes[row, column], [a for a in range(3) if a != row]
            where = tuple(center[row] if a == row else slice(None) for a in range(3))
            extent = (0, hu.shape[others[1]] * spacing[others[1]], hu.shape[others[0]] * spacing[others[0]], 0)
            shown = {"extent": extent, "origin": "upper"}
            ax.imshow(hu[where], cmap="gray", vmin=-100, vmax=200, **shown)
            if scores is not None:
                host = np.isin(reference[where], (LABELS["liver"], UNSEEN_LABEL))
                ax.imshow(np.ma.masked_where(~host, scores[where]), cmap="inferno", vmin=low, vmax=high, **shown)
            if (reference[where] == UNSEEN_LABEL).any():
                ax.contour(reference[where] == UNSEEN_LABEL, [0.5], colors="cyan", linewidths=0.8, extent=extent,
                           origin="upper")  # fmt: skip
            ax.set_xticks([])
            ax.set_yticks([])
            if row:  # coronal and sagittal: feet below
                ax.invert_yaxis()
            else:
                ax.set_title(method or "CT, reference outlined")
    figure.suptitle("One real patient, liver tumors never shown in training: an illustration, no accuracy claim")
    path = workspace.folder / f"real_tumors_{workspace.budget}_seed{seed}.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    parser = arguments(__doc__, METHODS, "methods")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds abdomen_ct and liver_ct")
    args = parse(parser)
    workspace = RealTumors((args.workspace / "real_tumors").resolve(), args)
    dataset = workspace.prepare()
    settings = {"phantom": VERSION, "configuration": args.configuration, "epochs": args.epochs}
    settings |= {"iterations": args.iterations, "minutes": args.minutes}
    done = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=KEY)
    for seed in range(args.seeds):
        for method in tqdm(args.methods, desc=f"seed {seed}", unit="method"):
            key = settings | {"method": method, "seed": seed}
            if matches(done, key).any():
                continue
            workspace.train_and_predict(method, seed, dataset)
            rows = pd.concat([workspace.evaluate_test(name, method, seed, dataset) for name in (REAL, INSERTED)])
            columns = ["test", "case", "class", "seen", "scope", "metric", "value", "ci_low", "ci_high"]
            rows = rows[columns].assign(**key)
            rows["training_minutes"] = round(minutes_of(workspace, method, seed), 2)
            append_rows(rows, RESULTS)
        if all(workspace.predictions(method, seed, REAL).is_dir() for method in args.methods):
            print(draw(workspace, dataset, args.methods, seed))
    table = pd.read_csv(RESULTS)
    print_table(table[matches(table, settings) & table["method"].isin(args.methods)])


def print_table(table: pd.DataFrame) -> None:
    """Both tests apart: mean over the cases, and over the seeds."""
    keys = pd.Series([*zip(table["scope"], table["metric"], strict=True)], index=table.index)
    table = table[table["case"] == "mean"].assign(column=keys.map(SHOWN)).dropna(subset="column")
    for name, title in (
        (REAL, "One patient with real tumors: an illustration, no accuracy claim."),
        (INSERTED, "Synthetic lesions in deformed copies of one real CT, which training saw other copies of."),
    ):
        print(title)
        shown = table[table["test"] == name].pivot_table("value", ["class", "method"], "column")
        print(shown.round(3).to_string(na_rep="-"))


if __name__ == "__main__":
    main()
