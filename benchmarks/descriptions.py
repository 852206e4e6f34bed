"""How much of an unseen tumor's result does its text carry? One model, one tumor, several descriptions.

    python benchmarks/descriptions.py --size small --seeds 3 --epochs 15 --iterations 250

The model is zero_shot.py's "zept" (it is trained where it is not there), which never saw a spleen tumor. The tumor is
added once for each wording, right or wrong, and predicted once: no added tumor sees another, so each map is the one
that it would have alone (tests/network/test_properties.py). Judged on the development-unseen type alone; the DSC is
that of {map above one half}, before other classes compete. A seed's figures are appended to results/descriptions.csv
and skipped when they are there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from tqdm import tqdm
from zero_shot import PLANS, ZEPT_TRAINER, Workspace, append_rows, arguments, matches, parse, phantom_of

from zept_nnunet.evaluation.overlap import dice
from zept_nnunet.evaluation.ranking import NUM_CODES, encode, ranking_metrics
from zept_nnunet.knowledge.catalog import catalog

RESULTS = Path(__file__).parent / "results" / "descriptions.csv"
HOST, TUMOR = "spleen", "spleen tumor"
RIGHT = {
    "built-in": catalog().entries["spleen tumor"].text,
    "short": "a dark round mass in the spleen",
    "report": "Focal splenic lesion, hypoattenuating to the normally enhancing parenchyma, with ill-defined margins.",
}
WRONG = {
    "generic": "a tumor",
    "another organ's": catalog().entries["kidney tumor"].text,
    "far away": catalog().entries["osteosarcoma"].text,
    "no tumor at all": catalog().entries["trachea"].text,
}
KEY = ["phantom", "size", "configuration", "epochs", "iterations", "minutes", "test_cases", "seed"]


def main() -> None:
    args = parse(arguments(__doc__))
    workspace = Workspace((args.workspace / args.size).resolve(), args)
    dataset = workspace.prepare()
    settings = [
        phantom_of(dataset)["version"],
        args.size,
        args.configuration,
        args.epochs,
        args.iterations,
        args.minutes,
        args.test_cases,
    ]
    done = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=KEY)
    for seed in range(args.seeds):
        key = dict(zip(KEY, [*settings, seed], strict=True))
        if not matches(done, key).any():
            append_rows(one_seed(workspace, dataset, seed).assign(**key), RESULTS)
    table = pd.read_csv(RESULTS)
    table = table[matches(table, dict(zip(KEY, settings, strict=False)))]
    columns = ["AUROC in host", "DSC"]
    over_seeds = table.groupby(["is_right", "wording"])[columns]
    print((over_seeds.mean().map("{:.3f}".format) + " ± " + over_seeds.std().map("{:.3f}".format)).to_string())
    means = table.groupby(["seed", "is_right"])[columns].mean().unstack()
    for column in columns:
        difference = means[column][True] - means[column][False]
        print(f"{column}: right minus wrong {difference.mean():+.3f} ± {difference.std():.3f} over seeds")


def one_seed(workspace: Workspace, dataset: Path, seed: int) -> pd.DataFrame:
    """Train where needed, add the tumor in every wording, predict, and rank."""
    workspace.zept("zept", PLANS, seed, dataset, splits=())
    results = Path(workspace.environment(seed)["nnUNet_results"]) / dataset.name
    trained = results / f"{ZEPT_TRAINER}__{PLANS}__{workspace.args.configuration}"
    grown = trained.with_name(trained.name.replace(PLANS, f"{PLANS}_wordings"))
    texts = RIGHT | WRONG
    if not grown.is_dir():
        tumors = [
            x for n, text in texts.items() for x in ("--name", f"{TUMOR} ({n})", "--host", HOST, "--description", text)
        ]
        workspace.run(seed, "wordings", "zept", "add-tumor", trained, *tumors, "-o", grown)
    out = workspace.predictions("wordings", seed, workspace.test)
    images = workspace.images(dataset)[workspace.test]
    workspace.run(seed, "wordings", "zept", "predict", "-m", grown, "-f", "0", "-i", images, "-o", out, "--save_scores",
                  "--continue_prediction", "--disable_tta", "-device", workspace.args.device, "-npp", "1", "-nps",
                  "1")  # fmt: skip
    return rank(dataset, out, texts)


def rank(dataset: Path, predictions: Path, texts: dict[str, str]) -> pd.DataFrame:
    """AUROC in the host over the voxels of all test cases; DSC at the model's own threshold, mean over cases."""
    content = json.loads((dataset / "dataset.json").read_text())
    host, tumor = content["labels"][HOST], content["zept"]["unseen"][TUMOR]["label"]
    counts = {name: np.zeros((2, NUM_CODES), dtype=np.int64) for name in texts}
    overlaps: dict[str, list[float]] = {name: [] for name in texts}
    for path in tqdm(sorted(predictions.glob("*_scores.npz")), desc="rank", unit="case"):
        case = path.name.removesuffix("_scores.npz")
        reference = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset / "labelsTs" / f"{case}.nii.gz")))
        is_tumor = reference == tumor
        inside = is_tumor | (reference == host)
        with np.load(path) as file:
            names, logits = file["classes"].tolist(), file["logits"]
        for name in texts:
            scores = logits[names.index(f"{TUMOR} ({name})")]
            for i, voxels in enumerate((inside & ~is_tumor, is_tumor)):
                counts[name][i] += np.bincount(encode(scores[voxels]), minlength=NUM_CODES)
            if is_tumor.any():
                found = scores > 0
                overlaps[name].append(dice(int((found & is_tumor).sum()), int(is_tumor.sum()), int(found.sum())))
    rows = []
    for name, (negative, positive) in counts.items():
        auroc = ranking_metrics(positive, negative)["auroc"]
        row = {"wording": name, "is_right": name in RIGHT, "AUROC in host": auroc, "DSC": np.mean(overlaps[name])}
        rows.append(row | {"cases": len(overlaps[name])})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
