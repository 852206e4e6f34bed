"""Time and memory of `zept evaluate` on one large scan with many classes.

    python benchmarks/evaluate_large.py --shape 600 512 512 --organs 20 --tumors 10

The scan is made up: organs are ellipsoids on a grid, each tumor a ball with a noisy edge in one of them; the prediction
is the reference moved by two voxels, and scores fall with the distance from the tumor. Prints seconds, also beside
those of reading the same files once, and the peak memory of the command.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

SPACING_MM = (1.0, 0.8, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, default=(600, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--organs", type=int, default=20)
    parser.add_argument("--tumors", type=int, default=10, help="at most as many as organs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_case(folder, tuple(args.shape), args.organs, args.tumors, np.random.default_rng(args.seed))
        start = time.perf_counter()
        for path in (folder / "references" / "a.nii.gz", folder / "predictions" / "a.nii.gz"):
            sitk.ReadImage(str(path))
        scores = folder / "predictions" / "a_scores.npz"
        with zipfile.ZipFile(scores) as archive, archive.open("logits.npy") as stream:
            while stream.read(1 << 24):
                pass
        reading = time.perf_counter() - start
        command = [Path(sys.executable).parent / "zept", "evaluate", "-r", folder / "references"]
        command += ["-i", folder / "predictions", "-o", folder / "report", "--disable_progress_bar"]
        start = time.perf_counter()
        subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        rows = sum(1 for _ in (folder / "report" / "metrics.csv").open()) - 1
    print(
        f"{args.shape}, {args.organs + args.tumors} classes: {seconds:.0f} s, {seconds / reading:.1f} times the reading"
    )
    print(f"of its files ({reading:.0f} s); peak memory {peak:.2f} GB; {rows} rows of metrics")


def write_case(
    folder: Path, shape: tuple[int, int, int], num_organs: int, num_tumors: int, rng: np.random.Generator
) -> None:
    """References and predictions of one case as nnU-Net and `zept predict --save_scores` leave them."""
    organs = [f"organ {i}" for i in range(num_organs)]
    tumors = {f"tumor {i}": [organs[i]] for i in range(num_tumors)}
    names = [*organs, *tumors]
    dataset_json = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{n: i + 1 for i, n in enumerate(names)}},
        "numTraining": 1,
        "file_ending": ".nii.gz",
        "zept": {"organs": organs, "tumors": {n: {"hosts": h} for n, h in tumors.items()}},
    }
    cells = int(np.ceil(num_organs ** (1 / 3)))
    size = np.array(shape) // cells
    reference = np.zeros(shape, dtype=np.uint8)
    grid = np.stack(np.meshgrid(*(np.arange(s) - s // 2 for s in size), indexing="ij")).astype(np.float32)
    radius = np.sqrt((grid**2).sum(0))
    inside = ((grid / (0.45 * size.reshape(3, 1, 1, 1))) ** 2).sum(0) < 1
    balls = []
    for i in tqdm(range(num_organs), desc="organs", unit="organ"):
        corner = np.array([i // cells**2, i // cells % cells, i % cells]) * size
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        reference[box][inside] = i + 1
        if i < num_tumors:
            edge = radius + rng.normal(0, 0.7, radius.shape).astype(np.float32)
            ball = (edge < rng.uniform(6, 20)) & inside
            reference[box][ball] = num_organs + i + 1
            balls.append((box, edge.max() / 8 - edge / 4))
    for name, labels in (("references", reference), ("predictions", np.roll(reference, 2, axis=2))):
        (folder / name).mkdir()
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing(SPACING_MM[::-1])
        sitk.WriteImage(image, str(folder / name / "a.nii.gz"), True)
    for name in ("references", "predictions"):
        (folder / name / "dataset.json").write_text(json.dumps(dataset_json))
    path = folder / "predictions" / "a_scores.npz"
    header = np.lib.format.header_data_from_array_1_0(np.empty((0,), np.float16)) | {"shape": (num_tumors, *shape)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        with archive.open("logits.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for box, score in tqdm(balls, desc="scores", unit="tumor"):
                logits = np.full(shape, -1000, dtype=np.float16)
                logits[box] = np.round(score, 1)
                file.write(logits.tobytes())
        with archive.open("classes.npy", "w") as file:
            np.lib.format.write_array(file, np.array([*tumors], dtype=np.str_))


if __name__ == "__main__":
    main()
