"""What each part of ZePT is worth: the model without it, on the phantom, at one budget; one table over seeds.

    python benchmarks/ablation.py --size small --seeds 3 --epochs 4 --iterations 250 --test-cases 48

Variants differ by settings of the plans' `zept` block alone (docs/method.md); data, split, seeds and evaluation are
those of zero_shot.py, and so is the workspace, whose phantom and preprocessed data serve both. A run appends its
figures to results/ablation.csv and is skipped when they are there. Figures on the final-unseen types are left out:
variants are chosen on the development-unseen type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zero_shot import PLANS, Workspace, arguments, measure, minutes_of, parse, print_table

from zept_nnunet.plans_block import build_block

RESULTS = Path(__file__).parent / "results" / "ablation.csv"
VARIANTS: dict[str, dict[str, Any]] = {
    "zept": {},
    "no_grouping": {"grouping": False},
    "no_self_prompting": {"self_prompting": False},
    "prompts_from_organs": {"prompts": "organs"},
    "score_in_maps": {"score_in_maps": True},
    "gate_at_voxels": {"gate": "voxel"},
    "strongest_map_wins": {"tumor_first": False},
    "no_alignment": {"alignment": 0.0},
    "tenfold_alignment": {"alignment": 1.0},
    "tenth_of_alignment": {"alignment": 0.01},
    "shuffled_descriptions": {"descriptions": "shuffled"},
    "learned_queries": {"queries": "learned"},
    "patchwise_score": {"score_range": "patch", "prompt_probability": 0.5, "prompts": "organs"},
    "organs_include_tumors": {"organs_include_tumors": True},
    "no_synthetic_anomalies": {"synthetic_anomalies": False},
    "no_relative_features": {"relative": False, "prompts": "organs"},
    "hiding": {"hiding_probability": 0.3},
    "longer_stage_one": {"stage_one_share": 0.5},
    "one_stage": {"stage_one_share": 0.0},
    "half_the_rate": {"learning_rate": 2e-3},
    "twice_the_rate": {"learning_rate": 8e-3},
    "warmup": {"warmup_iterations": 250},
    "no_decay": {"weight_decay": 0.0},
    "more_decay": {"weight_decay": 0.05},
    "tighter_clipping": {"gradient_norm": 1.0},
    "unlabeled_hosts_left_out": {"unlabeled_host_weight": 0.0},
    "no_background_queries": {"background_queries": 0},
}


def write_plans(workspace: Workspace, dataset: Path, variant: str) -> str:
    """The benchmark's plans with the variant's settings over the preset's, beside them; returns their name.

    Without a setting of its own a variant is the benchmark's ZePT, which zero_shot.py trains too, once for both.
    """
    if not VARIANTS[variant]:
        return PLANS
    folder = workspace.folder / "nnUNet_preprocessed" / dataset.name
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    name = f"{PLANS}_{variant}"
    settings = plans["zept"]["decoder"] | plans["zept"]["training"] | VARIANTS[variant]
    content = json.loads((dataset / "dataset.json").read_text())
    plans |= {"plans_name": name, "zept": build_block(content, settings=settings)}
    (folder / f"{name}.json").write_text(json.dumps(plans, indent=4))
    return name


def main() -> None:
    args = parse(arguments(__doc__, tuple(VARIANTS), "variants"))
    workspace = Workspace((args.workspace / args.size).resolve(), args)
    dataset = workspace.prepare()

    def one(variant: str, seed: int) -> float:
        plans = write_plans(workspace, dataset, variant)
        # no column wants a matched threshold; zero_shot.py, which shares the variant without a setting, does
        shared = not VARIANTS[variant] and not args.test_cases
        workspace.zept(variant, plans, seed, dataset, None if shared else (workspace.test,))
        return minutes_of(workspace, variant, seed, plans)

    print_table(measure(workspace, dataset, args.variants, one, RESULTS))


if __name__ == "__main__":
    main()
