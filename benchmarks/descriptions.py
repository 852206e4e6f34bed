"""How much of an unseen tumor's result does its text carry? One model, one tumor, several descriptions.

    python benchmarks/descriptions.py --size small --seeds 3 --epochs 15 --iterations 250

The model is zero_shot.py's "zept" (it is trained where it is not there), which never saw a spleen tumor. The tumor is
added once for each wording, right or wrong, and predicted once: no added tumor sees another, so each map is the one
that it would have alone (tests/network/test_properties.py). Judged on the development-unseen type alone; the DSC is
that of {map above one half}, before other classes compete. A seed's figures are appended to results/descriptions.csv
and skipped when they are there. --final judges the final-unseen types in place of it, each by its own description, by
one that says nothing of it, and by that of another unseen type; their figures go to results/descriptions_final.csv.
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
    parser = arguments(__doc__)
    parser.add_argument("--final", action="store_true", help="the final-unseen types")
    args = parse(parser)
    if args.final and args.test_cases:
        parser.error("--final goes without --test-cases: drawn test cases hold no tumor of a final-unseen type")
    results = RESULTS.with_stem(f"{RESULTS.stem}_final") if args.final else RESULTS
    workspace = Workspace((args.workspace / args.size).resolve(), args)
    dataset = workspace.prepare()
    texts = wordings(dataset, args.final)
    settings = [
        phantom_of(dataset)["version"],
        args.size,
        args.configuration,
        args.epochs,
        args.iterations,
        args.minutes,
        args.test_cases,
    ]
    done = pd.read_csv(results) if results.is_file() else pd.DataFrame(columns=KEY)
    for seed in range(args.seeds):
        key = dict(zip(KEY, [*settings, seed], strict=True))
        if not matches(done, key).any():
            append_rows(one_seed(workspace, dataset, seed, texts).assign(**key), results)
    table = pd.read_csv(results)
    table = table[matches(table, dict(zip(KEY, settings, strict=False)))]
    columns = ["AUROC in host", "DSC"]
    over_seeds = table.groupby(["tumor", "is_right", "wording"])[columns]
    print((over_seeds.mean().map("{:.3f}".format) + " ± " + over_seeds.std().map("{:.3f}".format)).to_string())
    means = table.groupby(["tumor", "seed", "is_right"])[columns].mean().unstack()
    for column in columns:
        differences = means[column][True] - means[column][False]
        for tumor, difference in differences.groupby("tumor"):
            print(f"{tumor}, {column}: right minus wrong {difference.mean():+.3f} ± {difference.std():.3f} over seeds")


def wordings(dataset: Path, final: bool) -> dict[str, dict[str, str]]:
    """Unseen tumor → wording → description."""
    record = phantom_of(dataset)
    if not final:
        (tumor,) = record["development_unseen"]
        return {tumor: RIGHT | WRONG}
    own = {tumor: catalog().entries[tumor].text for tumor in (*record["final_unseen"], *record["development_unseen"])}
    names = list(own)
    others = dict(zip(names, [*names[1:], names[0]], strict=True))
    return {
        tumor: {"built-in": own[tumor], "generic": WRONG["generic"], "another unseen tumor's": own[others[tumor]]}
        for tumor in record["final_unseen"]
    }


def one_seed(workspace: Workspace, dataset: Path, seed: int, texts: dict[str, dict[str, str]]) -> pd.DataFrame:
    """Train where needed, add the tumors in every wording, predict, and rank."""
    workspace.zept("zept", PLANS, seed, dataset, splits=())
    results = Path(workspace.environment(seed)["nnUNet_results"]) / dataset.name
    trained = results / f"{ZEPT_TRAINER}__{PLANS}__{workspace.args.configuration}"
    name = "wordings_final" if workspace.args.final else "wordings"
    grown = trained.with_name(trained.name.replace(PLANS, f"{PLANS}_{name}"))
    unseen = json.loads((dataset / "dataset.json").read_text())["zept"]["unseen"]
    if not grown.is_dir():
        tumors = [
            word
            for tumor, its in texts.items()
            for wording, text in its.items()
            for word in ("--name", f"{tumor} ({wording})", *(x for h in unseen[tumor]["hosts"] for x in ("--host", h)),
                         "--description", text)
        ]  # fmt: skip
        workspace.run(seed, name, "zept", "add-tumor", trained, *tumors, "-o", grown)
    out = workspace.predictions(name, seed, workspace.test)
    workspace.predict(name, seed, grown, workspace.images(dataset)[workspace.test], out)
    return pd.concat([rank(dataset, out, tumor, its) for tumor, its in texts.items()])


def rank(dataset: Path, predictions: Path, tumor: str, texts: dict[str, str]) -> pd.DataFrame:
    """AUROC in the hosts over the voxels of all test cases; DSC at the model's own threshold, mean over cases."""
    content = json.loads((dataset / "dataset.json").read_text())
    declared = content["zept"]["unseen"][tumor]
    hosts = [content["labels"][host] for host in declared["hosts"]]
    counts = {name: np.zeros((2, NUM_CODES), dtype=np.int64) for name in texts}
    overlaps: dict[str, list[float]] = {name: [] for name in texts}
    for path in tqdm(sorted(predictions.glob("*_scores.npz")), desc=f"rank {tumor}", unit="case"):
        case = path.name.removesuffix("_scores.npz")
        reference = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset / "labelsTs" / f"{case}.nii.gz")))
        is_tumor = reference == declared["label"]
        inside = is_tumor | np.isin(reference, hosts)
        with np.load(path) as file:
            names, logits = file["classes"].tolist(), file["logits"]
        for name in texts:
            scores = logits[names.index(f"{tumor} ({name})")]
            for i, voxels in enumerate((inside & ~is_tumor, is_tumor)):
                counts[name][i] += np.bincount(encode(scores[voxels]), minlength=NUM_CODES)
            if is_tumor.any():
                found = scores > 0
                overlaps[name].append(dice(int((found & is_tumor).sum()), int(is_tumor.sum()), int(found.sum())))
    rows = []
    for name, (negative, positive) in counts.items():
        auroc = ranking_metrics(positive, negative)["auroc"]
        row = {"tumor": tumor, "wording": name, "is_right": name in RIGHT, "AUROC in host": auroc}
        rows.append(row | {"DSC": np.mean(overlaps[name]), "cases": len(overlaps[name])})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
