"""Breaks the method on purpose, one place at a time, and shows that a test fails for each.

    python benchmarks/mutations.py             # all
    python benchmarks/mutations.py --only 3 7  # rows of the table
    python benchmarks/mutations.py --only hosts "stage I"  # words of what they do

Rows 1 to 10 are the places where the authors' published code works against the idea of the paper (docs/method.md); the
others are slips that a falling loss would not show. A mutation is a piece of text in a file and what replaces it,
applied to a copy of the repository. Exit code 1 if one survives, or if the piece of text is no longer there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, NETWORK = "zept_nnunet", "zept_nnunet/network"
NETWORK_TESTS = ("tests/network/test_reference.py", "tests/network/test_properties.py", "tests/network/test_zept.py")
EFFECTS = ("tests/inference/test_added_tumor_effects.py",)


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands once in `file`, becomes `new`; `tests` should notice."""

    row: int | str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(1, "organ labels include tumors", f"{PACKAGE}/training/targets.py",
             "support if organs_include_tumors else healthy", "support", ("tests/training/test_targets.py",)),
    Mutation(1, "the support of an organ is its healthy tissue", f"{PACKAGE}/training/targets.py",
             "            support[:, i] |= in_this_host\n", "            pass\n", ("tests/training/test_targets.py",)),
    Mutation(2, "the score counts outside the host too", f"{NETWORK}/self_prompting.py",
             "return conjunction(support, -healthy)", "return -healthy", ("tests/network/test_self_prompting.py",)),
    Mutation(2, "no background queries", f"{NETWORK}/zept.py",
             "q = torch.cat((organs_given.expand(batch, -1, -1), background), 1)",
             "q = organs_given.expand(batch, -1, -1)",
             NETWORK_TESTS),
    Mutation(3, "min-max normalization without epsilon", f"{NETWORK}/self_prompting.py",
             "(high - low).clamp_min(eps)", "(high - low)", ("tests/network/test_self_prompting.py",)),
    Mutation(3, "an empty prompt blocks everything", f"{NETWORK}/self_prompting.py",
             "result = torch.where(mask.any(-1, keepdim=True), mask, result)", "result = mask",
             ("tests/network/test_self_prompting.py",)),
    Mutation(3, "the score depends on the rest of the patch", f"{NETWORK}/self_prompting.py",
             "return conjunction(support, -healthy)", "return conjunction(support, -healthy + healthy.mean())",
             ("tests/network/test_properties.py",)),
    Mutation(4, "coarse organ maps are not supervised", f"{NETWORK}/zept.py",
             "if not self.is_calibrated and scale != len(features) - 1:", "if scale != len(features) - 1:",
             NETWORK_TESTS),
    Mutation(4, "coarse maps count nothing", f"{PACKAGE}/losses/zept_loss.py",
             "scale_weights = [0.5**s for s", "scale_weights = [float(s == 0) for s",
             ("tests/losses/test_zept_loss.py", "tests/network/test_reference.py")),
    Mutation(5, "one score for all tumors", f"{NETWORK}/self_prompting.py",
             "return [union(organ_maps[:, list(h)], 1) if h else None for h in hosts]",
             "return [union(organ_maps, 1) if h else None for h in hosts]", ("tests/network/test_self_prompting.py",)),
    Mutation(6, "a query is its own neighbor", f"{PACKAGE}/losses/alignment.py",
             "is_out = itself | ~(", "is_out = ~(", ("tests/losses/test_alignment.py",)),
    Mutation(6, "a query names any of its related classes", f"{PACKAGE}/losses/alignment.py",
             "return F.cross_entropy(logits[is_shown], own[is_shown])",
             "return -torch.log_softmax(logits, -1)[is_shown].mean()", ("tests/losses/test_alignment.py",)),
    Mutation(6, "rows of the target are not normalized", f"{PACKAGE}/losses/alignment.py",
             "target / total.clamp_min(1e-8) * log_p", "target * log_p",
             ("tests/losses/test_alignment.py",)),
    Mutation(6, "no L2 norm before the temperature", f"{PACKAGE}/losses/alignment.py",
             "_products(F.normalize(a.float(), dim=-1, eps=1e-6), F.normalize(b.float(), dim=-1, eps=1e-6))",
             "_products(a.float(), b.float())",
             ("tests/losses/test_alignment.py",)),
    Mutation(7, "queries do not depend on the text", f"{NETWORK}/query_decoder.py",
             "return self.mlp(knowledge * knowledge.shape[-1] ** 0.5) + self.token",
             "return self.mlp(knowledge * 0) + self.token", NETWORK_TESTS),
    Mutation(7, "trained queries see an added one", f"{NETWORK}/query_decoder.py",
             "return ~is_added[None, :] | torch.eye(", "return is_added[None, :] | ~is_added[None, :] | torch.eye(",
             NETWORK_TESTS),
    Mutation(8, "classes that a case does not annotate count", f"{PACKAGE}/losses/segmentation.py",
             "pairs = is_annotated.cpu()", "pairs = torch.ones_like(is_annotated.cpu())",
             ("tests/losses/test_segmentation.py",)),
    Mutation(8, "voxels of the ignore label count", f"{PACKAGE}/losses/zept_loss.py",
             "self.segmentation(logits, wanted, annotated, target.is_valid)",
             "self.segmentation(logits, wanted, annotated, None)",
             ("tests/losses/test_zept_loss.py", "tests/network/test_reference.py")),
    Mutation(8, "a pattern is matched by its beginning", f"{PACKAGE}/declarations.py",
             "fnmatchcase(case_id, p)", "case_id.startswith(p[:3])",
             ("tests/training/test_targets.py", "tests/test_taxonomy.py")),
    Mutation(9, "prompts come from queries before grouping", f"{NETWORK}/zept.py",
             "coarse.append(self._organ_maps(q[:, : self.num_organs], features, scale))",
             "coarse.append(self._organ_maps(organs_given, features, scale))", NETWORK_TESTS),
    Mutation(9, "a tumor attends to tokens of another scale", f"{NETWORK}/zept.py",
             "t = layer(t, tokens[scale], prompts[scale], tumors_see)",
             "t = layer(t, tokens[-1 - scale], prompts[-1 - scale], tumors_see)", NETWORK_TESTS),
    Mutation(10, "small components are removed from the prediction", f"{NETWORK}/heads.py",
             "return torch.stack(channels, 1).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)",
             "z = torch.stack(channels, 1).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)\n"
             "    few = (z > 0).flatten(2).sum(-1) < 20\n"
             "    return z - few.view(*few.shape, *[1] * (z.ndim - 2)) * 100.0",
             ("tests/network/test_properties.py",)),
    Mutation("-", "softmax over voxels in place of queries", f"{NETWORK}/grouping.py",
             "soft = torch.softmax(scores / temperature, dim=1)", "soft = torch.softmax(scores / temperature, dim=2)",
             ("tests/network/test_grouping.py",)),
    Mutation("-", "the assignment is not straight-through", f"{NETWORK}/grouping.py",
             "return one_hot + soft - soft.detach()", "return one_hot + 0 * soft", ("tests/network/test_grouping.py",)),
    Mutation("-", "the gate's gradient reaches the host's support", f"{NETWORK}/zept.py",
             "support = support.detach()\n        gates", "gates", NETWORK_TESTS),
    Mutation("-", "the score's gradient is not stopped", f"{NETWORK}/zept.py",
             "        with torch.no_grad():\n            if self.score_per_organ:",
             "        with torch.enable_grad():\n            if self.score_per_organ:", NETWORK_TESTS),
    Mutation("-", "the gate is the healthy logit", f"{NETWORK}/zept.py",
             "maps.append(conjunction(in_host.to(evidence.dtype), evidence))",
             "maps.append(conjunction(over_hosts(healthy, hosts)[k].to(evidence.dtype), evidence))", NETWORK_TESTS),
    Mutation("-", "the gate is the voxel's own support", f"{NETWORK}/zept.py",
             "highest_nearby(support) if self.gate_reaches_out else support", "support", NETWORK_TESTS),
    Mutation("-", "absent classes count in the Dice", f"{PACKAGE}/losses/segmentation.py",
             "enumerate(is_shown.tolist())", "enumerate(torch.ones_like(is_shown).tolist())",
             ("tests/losses/test_segmentation.py",)),
    Mutation("-", "synthetic anomalies stop short of the organ's surface", f"{PACKAGE}/training/anomalies.py",
             "        blend *= _neighborhood_share(is_organ)\n",
             "        blend *= _neighborhood_share(is_organ)\n        is_anomaly = blend > 0.5\n",
             ("tests/training/test_anomalies.py",)),
    Mutation("-", "gradients are not clipped", f"{PACKAGE}/training/trainer.py",
             "self.settings[\"gradient_norm\"])", "float(\"inf\"))", ("tests/training/test_trainer.py",)),
    Mutation("-", "norms and biases decay", f"{PACKAGE}/training/trainer.py",
             "decays = p.ndim > 1 and not name", "decays = not name", ("tests/training/test_trainer.py",)),
    Mutation(2, "the deviation counts outside the host too", f"{NETWORK}/zept.py",
             "return conjunction(support.detach().to(unlike.dtype), unlike)", "return unlike", NETWORK_TESTS),
    Mutation(5, "the deviation from any organ counts for every tumor", f"{NETWORK}/zept.py",
             "of_hosts = unlike[:, list(h)].float()", "of_hosts = unlike.sum(1, keepdim=True).float()", NETWORK_TESTS),
    Mutation("-", "a conjunction is the sum of the log-odds", f"{NETWORK}/logits.py",
             "return u + a - torch.logaddexp(F.softplus(u), a)", "return u + a", ("tests/network/test_logits.py",)),
    Mutation("-", "healthy tissue ranks below the air around the patient", f"{NETWORK}/zept.py",
             "evidence if floor is None else less_certain(evidence, floor)", "evidence", NETWORK_TESTS),
    Mutation("-", "an organ is cropped more tightly than its features reach", f"{NETWORK}/relative.py",
             "_REACH = max(_SMOOTHINGS)", "_REACH = 0", ("tests/network/test_relative.py",)),
    Mutation("-", "the head does not see what lies beside an organ", f"{NETWORK}/relative.py",
             "_AROUND = 1", "_AROUND = 0", ("tests/network/test_relative.py",)),
    Mutation("-", "surfaces move away from where an organ is surely not", f"{NETWORK}/zept.py",
             "healthy = less_certain(healthy, _EVIDENCE_FLOOR)", "pass", ("tests/network/test_zept.py",)),
    Mutation("-", "coarse voxels are pooled", f"{NETWORK}/relative.py",
             "1 if thick or s >= _COARSE else 2", "1 if thick else 2", ("tests/network/test_relative.py",)),
    Mutation("-", "a voxel is compared with the patch, not with its organ", f"{NETWORK}/relative.py",
             "mean, variance = robust_statistics(values, weights, self.floor)",
             "mean, variance = robust_statistics(values, torch.ones_like(weights), self.floor)",
             ("tests/network/test_relative.py",)),
    Mutation(8, "an organ labeled as a whole is taken for healthy", f"{PACKAGE}/losses/zept_loss.py",
             "organs & labels_tumors\n", "organs\n", ("tests/losses/test_zept_loss.py",)),
    Mutation(8, "an unlabeled tumor stays in the validation's prediction", f"{NETWORK}/heads.py",
             "torch.where(labels[num_organs + k], tumor_logits[:, k], nothing)", "tumor_logits[:, k]",
             ("tests/network/test_heads.py",)),
    Mutation(8, "an unlabeled tumor goes to all of its hosts in the validation", f"{NETWORK}/heads.py",
             "given[k] if which is None else", "given[k] if True else", ("tests/network/test_heads.py",)),
    Mutation("-", "alignment reads the generated queries", f"{NETWORK}/zept.py",
             "        if self.is_calibrated:\n            weight =", "        if False:\n            weight =",
             NETWORK_TESTS),
    Mutation("-", "alignment teaches queries where to point", f"{NETWORK}/zept.py",
             "weight = maps.detach().float()", "weight = maps.float()", ("tests/network/test_regions.py",)),
    Mutation("-", "alignment names classes that are not there", f"{PACKAGE}/losses/zept_loss.py",
             "holds.flatten(2).any(2) & is_annotated", "(holds.flatten(2).sum(2) >= 0) & is_annotated",
             ("tests/network/test_regions.py", "tests/losses/test_zept_loss.py")),
    Mutation("-", "an added tumor's own term keeps its level", f"{NETWORK}/zept.py",
             "if unlike is not None and k in self.added:", "if False:",
             ("tests/network/test_added.py", "tests/network/test_reference.py")),
    Mutation("-", "an added tumor's deviation fades at its host's edge", f"{NETWORK}/zept.py",
             "of_hosts if k in to_the_edge else", "of_hosts if False else",
             ("tests/network/test_added.py",)),
    Mutation("-", "a mean of neighbors does not divide its gradient", f"{NETWORK}/pooling.py",
             "x = _divide_(x.clone(), axis, half) if is_adjoint else x", "pass", ("tests/network/test_pooling.py",)),
    Mutation("-", "a mean of neighbors counts voxels beyond the grid", f"{NETWORK}/pooling.py",
             "x.narrow(axis, place, 1).mul_(everywhere / count)", "pass", ("tests/network/test_pooling.py",)),
    Mutation("-", "a hidden tumor's own map still counts", f"{PACKAGE}/losses/zept_loss.py",
             "tumors[:, hidden] = False", "pass", ("tests/losses/test_zept_loss.py",)),
    Mutation("-", "stage I trains what belongs to stage II", f"{PACKAGE}/training/trainer.py",
             "parameter.grad = None", "pass", ("tests/network/test_properties.py", "tests/training/test_trainer.py")),
    Mutation("-", "an organ's norm is its mean and standard deviation", f"{NETWORK}/relative.py",
             "median = samples.median(-1, keepdim=True).values\n"
             "        spread = _MAD_TO_SD * (samples - median).abs().median(-1, keepdim=True).values",
             "median = samples.mean(-1, keepdim=True)\n        spread = samples.std(-1, keepdim=True)",
             ("tests/network/test_relative.py",)),
    Mutation("-", "the temperature has no bounds", f"{PACKAGE}/losses/alignment.py",
             "return temperature.clamp(*TEMPERATURE_BOUNDS)", "return temperature",
             ("tests/losses/test_alignment.py",)),
    Mutation("-", "a temperature out of its bounds stays there", f"{PACKAGE}/losses/alignment.py",
             "log_temperature.clamp_(low + 1e-3, high - 1e-3)", "pass", ("tests/training/test_trainer.py",)),
    Mutation("-", "tokens are summed in half precision", f"{NETWORK}/grouping.py",
             "with torch.autocast(x.device.type, enabled=False):", "if True:", ("tests/network/test_grouping.py",)),
    Mutation("-", "voxels are assigned with noise at inference too", f"{NETWORK}/grouping.py",
             "noisy=self.training)", "noisy=True)", ("tests/network/test_grouping.py",)),
    Mutation("-", "voxels that nobody labeled count in full, whatever the setting", f"{PACKAGE}/losses/zept_loss.py",
             "weight = 1 - (1 - self.unlabeled_host_weight) * is_open.float()", "weight = None",
             ("tests/losses/test_zept_loss.py",)),
    Mutation("-", "the weight of such voxels stays in the plans", f"{PACKAGE}/training/trainer.py",
             "float(self.settings[\"unlabeled_host_weight\"])", "1.0", ("tests/training/test_trainer.py",)),
    Mutation("-", "a tumor's query does not know its hosts", f"{NETWORK}/zept.py",
             "return organs, self.tumor_queries(knowledge) + self.host_to_tumor(torch.stack(means))",
             "return organs, self.tumor_queries(knowledge) + 0 * self.host_to_tumor(torch.stack(means))",
             NETWORK_TESTS),
    Mutation("-", "an added tumor lowers its host's map by the authors' score", f"{NETWORK}/zept.py",
             "zip(self.hosts, taxonomy.tumors, strict=True) if not t.added]",
             "zip(self.hosts, taxonomy.tumors, strict=True)]", EFFECTS),
    Mutation("-", "two added tumors share a learned query", f"{PACKAGE}/plans_block.py",
             "\"learned\" and twin is not None:", "\"learned\" and False:", EFFECTS),
    Mutation("-", "a tumor with a threshold does not win against its host", f"{NETWORK}/heads.py",
             "logit = torch.minimum(logit, -margin[:, k])", "pass", ("tests/network/test_heads.py",)),
    Mutation("-", "without a threshold the strongest map wins", f"{NETWORK}/zept.py",
             "0.0 if settings[\"tumor_first\"] and not", "0.0 if False and not", EFFECTS),
    Mutation("-", "tumors lower the organs of regions too", f"{NETWORK}/zept.py",
             "if settings[\"tumor_first\"] and not taxonomy.has_regions", "if settings[\"tumor_first\"]",
             ("tests/network/test_reference.py",)),
    Mutation("-", "a region holds an added tumor of its organ", f"{PACKAGE}/taxonomy.py",
             "channels=(*self.channels, (name,)),",
             "channels=(*((*c, name) if {*hosts} & {*c} else c for c in self.channels), (name,)),", EFFECTS),
    Mutation("-", "without alignment its terms count all the same", f"{PACKAGE}/training/trainer.py",
             "float(self.settings[\"alignment\"]))", "1.0)",
             ("tests/training/test_trainer.py",)),
    Mutation("-", "organs that include tumors are not asked for", f"{PACKAGE}/training/trainer.py",
             "include = self.settings[\"organs_include_tumors\"]", "include = False",
             ("tests/training/test_trainer.py",)),
    Mutation("-", "synthetic anomalies are inserted without being asked for", f"{PACKAGE}/training/trainer.py",
             "organs = unlabeled_organs(self.taxonomy) if self.settings[\"synthetic_anomalies\"] else ()",
             "organs = unlabeled_organs(self.taxonomy)", ("tests/training/test_trainer.py",)),
    Mutation("-", "the moving average of stage I runs on in stage II", f"{PACKAGE}/training/trainer.py",
             "[\"ema_fg_dice\"][self.current_epoch] = mean", "[\"ema_fg_dice\"][self.current_epoch] += 0",
             ("tests/training/test_trainer.py",)),
    Mutation("-", "the best average of stage I stays the best", f"{PACKAGE}/training/trainer.py",
             "            self._best_ema = None\n", "", ("tests/training/test_trainer.py",)),
    Mutation("-", "a class keeps a number of each feature channel for its map", f"{NETWORK}/query_decoder.py",
             "z = torch.bmm(weight.to(features.dtype), features.flatten(2))",
             "z = (weight.to(features.dtype)[..., None] * features.flatten(2)[:, None]).sum(2)",
             ("tests/network/test_memory.py",)),
    Mutation("-", "the authors' tumor maps gain no score", f"{NETWORK}/zept.py",
             "return a + score, healthy", "return a, healthy", ("tests/network/test_switches.py",)),
    Mutation("-", "hiding a tumor hides it at inference too", f"{NETWORK}/zept.py",
             "self.tumors_see_training.copy_(tumors_see)",
             "self.tumors_see_training.copy_(tumors_see)\n"
             "        self.tumors_see.copy_(tumors_see[: self.num_tumors, : self.num_tumors])",
             ("tests/network/test_switches.py",)),
)  # fmt: skip


def is_meant(mutation: Mutation, words: str) -> bool:
    """By its row, or by words of more than two letters."""
    return words == str(mutation.row) or (len(words) > 2 and words in mutation.what)


def copy_repository(target: Path) -> None:
    """What the tests need; trainers/ and plans/ stand inside the package, as setup.cfg maps them."""
    for name in (PACKAGE, "trainers", "plans", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, target / name)
    for name in ("trainers", "plans"):
        if not (target / PACKAGE / name).exists():
            (target / PACKAGE / name).symlink_to(target / name)


def tests_pass(folder: Path, tests: tuple[str, ...]) -> bool:
    """Whether pytest passes in the copy; an error before any test ran is not a finding.

    Raises:
        SystemExit: pytest ran no test.
    """
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW_OR_WORDS")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.only or any(is_meant(m, words) for words in args.only)]
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        for tests in sorted({m.tests for m in chosen}):
            if not tests_pass(folder, tests):
                raise SystemExit(f"{' '.join(tests)}: fails without any mutation")
        for mutation in tqdm(chosen, desc="mutations", unit="mutation"):
            path = folder / mutation.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                raise SystemExit(f"{mutation.file}: {mutation.old!r} stands there {text.count(mutation.old)} times")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            survived = tests_pass(folder, mutation.tests)
            path.write_text(text, encoding="utf-8")
            survivors += [mutation] if survived else []
            tqdm.write(f"{'SURVIVED' if survived else 'killed':<9}{mutation.row!s:>3}  {mutation.what}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
