"""What panoptica finds on small random volumes, to hold `lesions.match_lesions` against.

panoptica wants older numpy, pandas and cc3d than this package is developed with, so it runs in an environment of its
own: `pip install panoptica==2.1.7`, then `python panoptica_reference.py panoptica_reference.json`. Needs nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

VERSION = "2.1.7"
IOUS = (0.1, 0.5)
SEEDS = range(24)


def volumes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks (Z, Y, X) bool with boxes that overlap in many ways: hits, splits, merges, touching corners, misses."""
    rng = np.random.default_rng([7, seed])
    shape = (14, 22, 26)
    reference, prediction = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for _ in range(int(rng.integers(1, 9))):
        low = rng.integers(0, np.array(shape) - 3)
        size = rng.integers(1, 7, size=3)
        reference[tuple(slice(int(a), int(a + s)) for a, s in zip(low, size))] = True  # noqa: B905
        if rng.random() < 0.8:
            low = np.maximum(low + rng.integers(-2, 3, size=3), 0)
            size = np.maximum(size + rng.integers(-2, 3, size=3), 1)
            prediction[tuple(slice(int(a), int(a + s)) for a, s in zip(low, size))] = True  # noqa: B905
    prediction[tuple(rng.integers(0, shape, size=(4, 3)).T)] ^= True
    return reference, prediction


def main(target: Path) -> None:
    """Write the counts as JSON."""
    from importlib.metadata import version

    from panoptica import (  # type: ignore[import-not-found]
        ConnectedComponentsInstanceApproximator,
        InputType,
        NaiveThresholdMatching,
        Panoptica_Evaluator,
    )

    rows = []
    for iou in IOUS:
        evaluator = Panoptica_Evaluator(
            expected_input=InputType.SEMANTIC,
            instance_approximator=ConnectedComponentsInstanceApproximator(),
            instance_matcher=NaiveThresholdMatching(matching_threshold=iou),
        )
        for seed in SEEDS:
            reference, prediction = (v.astype(np.uint8) for v in volumes(seed))
            result = evaluator.evaluate(prediction, reference, verbose=False)["ungrouped"]
            counts = [int(result.n_ref_instances), int(result.n_pred_instances), int(result.tp)]
            rows.append(
                {
                    "iou": iou,
                    "seed": seed,
                    "counts": counts,
                    "recall": float(result.rec),
                    "precision": float(result.prec),
                }
            )
    lines = ",\n".join(json.dumps(row) for row in rows)
    target.write_text(f'{{"panoptica": "{version("panoptica")}", "results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
