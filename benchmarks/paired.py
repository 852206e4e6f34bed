"""ZePT against each baseline, paired over the same seeds and test cases: the difference with its 95 % interval.

    python benchmarks/paired.py --size small --seeds 5 --epochs 15 --iterations 250 --methods any_tumor_rel supervised

It evaluates predictions that zero_shot.py left in its workspace, and trains nothing; a missing run is named. The
bootstrap draws seeds and cases together for both methods (docs/evaluation.md). Thresholds of a matched rate of false
positives come from each method's own validation predictions. Figures go to results/paired.csv, with --final those of
the final-unseen types to results/paired_final.csv; a comparison that stands there is replaced. `ratio` is ours over
theirs: of the DSC against `supervised`, the share of the ceiling that is reached without a label.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tqdm import tqdm
from zero_shot import METHODS, Workspace, arguments, concerns_final, matches, parse, phantom_of

from zept_nnunet.files import write_whole

RESULTS = Path(__file__).parent / "results" / "paired.csv"
OURS = "zept"
SAMPLES = 2000
SHOWN = {("host", "auroc"): "AUROC in host", ("volume", "froc_score"): "FROC score", ("volume", "dsc"): "DSC"}
AT_RATE = {("volume", "dsc_at_fp_1"): "DSC at 1 FP", ("volume", "lesion_recall_at_fp_1"): "lesion recall at 1 FP"}


def compare(workspace: Workspace, dataset: Path, method: str, seeds: range) -> pd.DataFrame:
    """Class, scope, metric → ours, difference, its interval, and the ratio.

    Raises:
        SystemExit: a run's predictions are not there.
    """
    flags: list[str | Path] = []
    for name, predictions, calibration in ((OURS, "-i", "--calibration"), (method, "--versus", "--versus-calibration")):
        folders = {
            split: [workspace.predictions(name, seed, split) for seed in seeds] for split in splits_of(workspace)
        }
        missing = [str(folder) for of in folders.values() for folder in of if not folder.is_dir()]
        if missing:
            raise SystemExit(f"no predictions in {missing}; make them with zero_shot.py --methods {name} first")
        flags += [predictions, *folders[workspace.test]]
        flags += [calibration, *folders["validation"]] if "validation" in folders else []
    out = workspace.predictions(OURS, 0, "paired").parent.parent / f"versus_{method}"
    references: list[str | Path] = ["-d", str(workspace.dataset_id)]
    if workspace.args.test_cases:
        references = ["-r", workspace.folder / workspace.test / "labelsTs"]
    workspace.run(0, "paired", "zept", "evaluate", *references, *flags, "-o", out, "--bootstrap", str(SAMPLES),
                  "--overwrite", "--disable_progress_bar")  # fmt: skip
    key = ["class", "scope", "metric"]
    ours = pd.read_csv(out / "metrics.csv").query("case == 'mean'").set_index(key)["value"].rename("ours")
    rows = pd.read_csv(out / "comparison.csv").join(ours, on=key)
    rows = rows.rename(columns={"value": "difference"})
    rows["ratio"] = rows["ours"] / (rows["ours"] - rows["difference"])
    return rows[[*key, "seen", "ours", "difference", "ci_low", "ci_high", "ratio", "cases"]]


def splits_of(workspace: Workspace) -> tuple[str, ...]:
    """Test predictions, and those of the validation cases where thresholds can come from them."""
    can_calibrate = workspace.can_calibrate() and not workspace.args.test_cases
    return (workspace.test, "validation") if can_calibrate else (workspace.test,)


def main() -> None:
    parser = arguments(__doc__, tuple(m for m in METHODS if m != OURS), "methods")
    parser.add_argument("--final", action="store_true", help="the final-unseen types in place of all others")
    args = parse(parser)
    workspace = Workspace((args.workspace / args.size).resolve(), args)
    dataset = workspace.prepare()
    results = RESULTS.with_name("paired_final.csv") if args.final else RESULTS
    settings = {"phantom": phantom_of(dataset)["version"], "size": args.size, "configuration": args.configuration}
    settings |= {"epochs": args.epochs, "iterations": args.iterations, "minutes": args.minutes}
    settings |= {"test_cases": args.test_cases, "seeds": args.seeds}
    tables = []
    for method in tqdm(args.methods, desc="compare", unit="method"):
        rows = compare(workspace, dataset, method, range(args.seeds))
        tables.append(rows[concerns_final(rows["class"], dataset) == args.final].assign(**settings, versus=method))
    table = pd.concat(tables)
    before = pd.read_csv(results) if results.is_file() else table.iloc[:0]
    others = before[~(matches(before, settings) & before["versus"].isin(args.methods))]
    both = table if others.empty else pd.concat([others, table])
    write_whole(results, both.to_csv(index=False, float_format="%.5g"))
    shown = table.assign(column=[(SHOWN | AT_RATE).get(k) for k in zip(table["scope"], table["metric"], strict=True)])
    shown = shown[~shown["seen"]].dropna(subset="column")
    shown["figure"] = [
        f"{d:+.3f} [{low:+.3f}, {high:+.3f}] × {r:.2f}"
        for d, low, high, r in zip(shown["difference"], shown["ci_low"], shown["ci_high"], shown["ratio"], strict=True)
    ]
    print(shown.pivot_table("figure", ["class", "versus"], "column", aggfunc="first").fillna("-").to_string())


if __name__ == "__main__":
    main()
