"""ZePTTrainer: nnU-Net's trainer with ZePT's network, losses and two stages, through its hooks alone.

Stage I learns organs (fundamental queries), stage II tumors too (advanced queries); one run holds both.
"""

from __future__ import annotations

import os
import random
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json, save_json
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, autocast, nn
from torch._dynamo import OptimizedModule

from zept_nnunet.errors import ZePTError
from zept_nnunet.losses import TERMS, ZePTLoss
from zept_nnunet.losses.alignment import bound_temperature
from zept_nnunet.network.backbone import check_wrappable
from zept_nnunet.network.heads import keep_to_annotated
from zept_nnunet.network.zept import ZePT, ZePTOutput
from zept_nnunet.plans_block import (
    build_block,
    check_planned_texts,
    differences,
    own_parts,
    read_block,
    shared_settings,
    unlabeled_organs,
)
from zept_nnunet.taxonomy import Taxonomy, annotated_patterns
from zept_nnunet.training.anomalies import InsertAnomalies, with_anomalies
from zept_nnunet.training.intensity import intensity_scales, noise_floors
from zept_nnunet.training.orientation import KeepsSides
from zept_nnunet.training.progress import StagesLogger
from zept_nnunet.training.sampling import ForegroundDataset
from zept_nnunet.training.targets import Annotations, Targets, anomaly_labels, make_targets

WEIGHT_DECAY = 1e-2
BETAS = (0.9, 0.99)
_SEEDS_APART = 10_000  # of two processes of one training


class ZePTTrainer(KeepsSides):
    """Stage I for the first fifth of the epochs (`stage_one_share`), stage II for the rest."""

    variant = "zept"
    """Which decoder settings the model gets: ours, or "paper"."""
    fixed_stage: int | None = None
    """1 or 2 where a trainer runs one stage alone."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ):
        # all that can be refused is refused before the parent makes the results folder
        block = self._checked_block(plans, configuration, dataset_json)
        self.taxonomy = Taxonomy.from_dict(block["taxonomy"])
        self.settings = block["training"]
        organs = unlabeled_organs(self.taxonomy) if self.settings["synthetic_anomalies"] else ()
        self.anomaly_labels = anomaly_labels(self.taxonomy, organs)
        self.annotations = Annotations(self.taxonomy, annotated_patterns(dataset_json))
        seed_everything()
        plans = {**plans, "zept": block}
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr, self.weight_decay = self.settings["learning_rate"], self.settings["weight_decay"]
        self._iteration = 0  # within the epoch
        self._epoch_rate: float | None = None
        self.logger.local_logger = StagesLogger(self.logger.local_logger.verbose)
        self._register_loss_terms()

    @classmethod
    def _checked_block(cls, plans: dict, configuration: str, dataset_json: dict) -> dict[str, Any]:
        name = plans["plans_name"]
        manager = PlansManager({k: v for k, v in plans.items() if k != "continue_training"})
        check_wrappable(manager.get_configuration(configuration), source=f"{name}.json")
        source = f"dataset.json of {plans['dataset_name']}"
        if "zept" not in plans:
            block = build_block(dataset_json, cls.variant, source)
        else:  # from ZePTPlanner: its knowledge and settings hold, and nothing has to be encoded
            block = read_block(plans, f"{name}.json")
            if block["taxonomy"] != Taxonomy.from_dataset_json(dataset_json, source).to_dict():
                raise ZePTError(
                    f"{name}.json was planned for other classes than {plans['dataset_name']}/dataset.json names now; "
                    "plan again: zept plan -d ID"
                )
            check_planned_texts(block, dataset_json, f"{name}.json", f"zept plan -d {plans['dataset_name']}")
            if cls.variant != "zept":  # another variant's trainer takes its own settings, in a network of that size
                decoder, training, anomalies = own_parts(dataset_json, cls.variant, source, shared_settings(block))
                block = {**block, "decoder": decoder, "training": training, "anomalies": anomalies}
        if nnUNet_results.is_set():
            folder = join(nnUNet_results, plans["dataset_name"], f"{cls.__name__}__{name}__{configuration}")
            cls._check_model_folder(folder, block)
        return block

    @staticmethod
    def _check_model_folder(folder: str, block: dict[str, Any]) -> None:
        """Every fold's start rewrites plans.json there, and it must go on to describe the folds beside it."""
        plans_file = join(folder, "plans.json")
        if not isfile(plans_file):
            return
        different = differences(read_block(load_json(plans_file), plans_file), block)
        if different:
            raise ZePTError(
                f"{plans_file} belongs to a model with another {', another '.join(different)}: a fold trained now "
                "could not be used together with the folds that stand there. Remove or rename that folder, or "
                "restore the dataset.json and plans that it was trained with"
            )

    # ------------------------------------------------------------------------------------------------ building
    @classmethod
    def _predicts_tumors(cls) -> bool:
        return cls.fixed_stage != 1

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build from the plans alone, in training and at inference.

        Raises:
            ZePTError: the plans hold no `zept` block, or its channels are not those of the labels.
        """
        block = read_block(plans_manager.plans, f"plans.json ({plans_manager.plans_name})")
        heads = len(Taxonomy.from_dict(block["taxonomy"]).channels)
        if heads != num_output_channels:
            raise ZePTError(
                f"dataset.json asks for {num_output_channels} output channels, the 'zept' block of plans.json "
                f"describes {heads}: the two files do not belong together. Restore the files that stood in the "
                "model folder"
            )
        noise = noise_floors(plans_manager, configuration_manager, num_input_channels)
        return ZePT(
            block, configuration_manager, num_input_channels, enable_deep_supervision, cls._predicts_tumors(), noise
        )

    def initialize(self) -> None:
        """nnU-Net's; a process of a DDP training keeps its own buffers.

        They hold no statistics, and in the final validation what the next case labels. DDP would copy those of the
        first process at the next prediction, for which it would wait in every one, also in one that has no case.
        """
        super().initialize()
        if isinstance(self.network, nn.parallel.DistributedDataParallel):
            self.network.broadcast_buffers = False

    def _build_loss(self) -> nn.Module:
        batch_dice = self.configuration_manager.batch_dice and not (self.is_ddp and self.annotations.is_partial)
        weights = dict.fromkeys(("query_to_knowledge", "query_to_query"), float(self.settings["alignment"]))
        return ZePTLoss(
            self._zept(), batch_dice, self.is_ddp, weights, float(self.settings["unlabeled_host_weight"])
        ).to(self.device)

    def _zept(self) -> ZePT:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network.module if isinstance(self.network, nn.parallel.DistributedDataParallel) else self.network
        return cast(ZePT, network._orig_mod if isinstance(network, OptimizedModule) else network)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the type of the network's output."""
        self._zept().decoder.deep_supervision = enabled

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW with nnU-Net's polynomial schedule. Groups are the same in both stages.

        No weight decay on norms, biases and tokens. In short trainings nnU-Net's SGD left small organs and tumors
        unlearned that this finds (CHANGELOG has the figures).
        """
        network = self._zept()
        advanced = {id(p) for p in network.stage_two_parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in network.named_parameters():
            decays = p.ndim > 1 and not name.endswith(("queries", "token"))
            groups.setdefault((id(p) in advanced, decays), []).append(p)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "weight_decay": self.weight_decay if decays else 0.0,
                    "trained_decay": self.weight_decay if decays else 0.0,
                    "is_advanced": is_advanced,
                }
                for (is_advanced, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
            ],
            lr=self.initial_lr,
            betas=BETAS,
            fused=next(network.parameters()).device.type in ("cpu", "cuda"),
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    # ------------------------------------------------------------------------------------------------ stages
    def stage_at(self, epoch: int, iteration: int) -> int:
        """1 or 2. The switch is after `stage_one_share` of the epochs, or of one epoch's iterations, at least one."""
        if self.fixed_stage is not None:
            return self.fixed_stage
        if not self.taxonomy.organs:
            return 2  # nothing to learn in stage I
        share = self.settings["stage_one_share"]
        done, total = (epoch, self.num_epochs) if self.num_epochs > 1 else (iteration, self.num_iterations_per_epoch)
        return 1 if done < (max(1, int(total * share)) if share else 0) else 2

    def _enter_stage(self) -> int:
        """Set the network and the optimizer to the stage of the current iteration, and the rate to the warm-up's."""
        stage = self.stage_at(self.current_epoch, self._iteration)
        network = self._zept()
        if self._epoch_rate is None:
            self._epoch_rate = float(self.optimizer.param_groups[0]["lr"])  # as the scheduler has set it
        past = self.current_epoch * self.num_iterations_per_epoch + self._iteration + 1
        rate = self._epoch_rate * min(1.0, past / max(1, self.settings["warmup_iterations"]))
        if network.stage != stage:
            self.print_to_log_file(f"Stage {'I: organs' if stage == 1 else 'II: organs and tumors'}")
            network.stage = stage
        for group in self.optimizer.param_groups:
            frozen = stage == 1 and group["is_advanced"]
            group["lr"] = 0.0 if frozen else rate
            group["weight_decay"] = 0.0 if frozen else group["trained_decay"]
        return stage

    # ------------------------------------------------------------------------------------------------ data
    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:  # upstream's is static
        """nnU-Net's, and synthetic anomalies in organs whose tumors nobody labeled.

        The integer label map stays: regions are made on the device (nnU-Net's issue 2136).
        """
        transforms = nnUNetTrainer.get_training_transforms(*args, **{**kwargs, "regions": None})
        if not self.anomaly_labels:
            return transforms
        insert = InsertAnomalies(
            self.anomaly_labels,
            [t.label for t in self.taxonomy.tumors],
            self.configuration_manager.spacing[-len(self.configuration_manager.patch_size) :],
            intensity_scales(self.plans_manager, self.configuration_manager),
        )
        return with_anomalies(transforms, insert)

    @staticmethod
    def get_validation_transforms(*args: Any, **kwargs: Any) -> Any:
        """As `get_training_transforms`."""
        return nnUNetTrainer.get_validation_transforms(*args, **{**kwargs, "regions": None})

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's split; training cases favor tumors among their foreground, of the classes that they label.

        A pattern of `zept.annotated` that matches no case is named in the log: it may be for test cases, or misspelled.
        """
        training, validation = super().get_tr_and_val_datasets()
        cases = (*training.identifiers, *validation.identifiers)
        for pattern in self.annotations.unmatched(cases):
            self.print_to_log_file(
                f"WARNING: zept.annotated[{pattern!r}] matches no case of this fold. A training case that no pattern "
                "matches counts as one that labels every class: correct the pattern if it was meant for one"
            )
        tumors = [] if self.fixed_stage == 1 else [t.label for t in self.taxonomy.tumors]
        return ForegroundDataset(training, tumors, self.annotations.labels_in), validation

    # ------------------------------------------------------------------------------------------------ logging
    def _register_loss_terms(self) -> None:
        logging = self.logger.local_logger.my_fantastic_logging
        epochs = len(logging["train_losses"])
        for key in (*(f"loss_{term}" for term in TERMS), "stage"):
            logging.setdefault(key, [0.0] * epochs)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's, with the file's name in the error where its classes or knowledge differ."""
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except ZePTError as error:
            raise ZePTError(f"{filename_or_checkpoint}: {error}") from error
        self._register_loss_terms()

    def on_train_start(self) -> None:
        """nnU-Net's, and the taxonomy as a table. The model folder keeps its thresholds.

        Training itself knows none: all folds are validated alike, and cross-validation compares like with like.
        """
        plans_file = join(self.output_folder_base, "plans.json")
        thresholds = load_json(plans_file).get("zept", {}).get("thresholds") if isfile(plans_file) else None
        super().on_train_start()
        if thresholds and self.local_rank == 0:
            plans = load_json(plans_file)
            plans["zept"]["thresholds"] = thresholds
            save_json(plans, plans_file, sort_keys=False)
        self.print_to_log_file("\nClasses:\n" + self.taxonomy.table() + "\n", add_timestamp=False)
        names = self.dataset_json.get("channel_names") or self.dataset_json.get("modality") or {}
        if not any(str(n).lower() == "ct" for n in names.values()):
            self.print_to_log_file("WARNING: no CT channel: what is only for CT (Hounsfield units) is off")

    # ------------------------------------------------------------------------------------------------ steps
    def on_train_epoch_start(self) -> None:
        """nnU-Net's, then the stage: its scheduler writes one learning rate into every group."""
        super().on_train_epoch_start()
        self._iteration, self._epoch_rate = 0, None
        self._enter_stage()

    def train_step(self, batch: dict) -> dict:
        """One optimizer step; returns the loss and its terms by name."""
        stage = self._enter_stage()
        hidden = self.hidden_tumor(self.current_epoch, self._iteration) if stage == 2 else None
        self._iteration += 1
        self.optimizer.zero_grad(set_to_none=True)
        _, _, loss, terms = self._forward(batch, hidden)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            self._clip_and_freeze()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            self._clip_and_freeze()
            self.optimizer.step()
        bound_temperature(self._zept().log_temperature)
        return {"loss": loss.detach().cpu().numpy(), **{term: value.cpu().numpy() for term, value in terms.items()}}

    def _clip_and_freeze(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), self.settings["gradient_norm"])
        if self._zept().stage == 1:  # no state either: Adam's moments must not start with a stage of zeros
            for parameter in self._zept().stage_two_parameters():
                parameter.grad = None

    def hidden_tumor(self, epoch: int, iteration: int) -> int | None:
        """Index of the tumor type that this batch hides, if any: the same in every process and after a resume.

        Only a type whose hosts all have a query for abnormal tissue, which learns it in its place.
        """
        if not self.settings["hiding_probability"]:
            return None
        network = self._zept()
        with_query = {organ for (organ,) in network.anomaly_hosts}
        may_hide = [k for k, hosts in enumerate(network.hosts) if hosts and with_query.issuperset(hosts)]
        rng = np.random.default_rng((epoch, iteration))
        if not may_hide or rng.random() >= self.settings["hiding_probability"]:
            return None
        return int(rng.choice(may_hide))

    def _forward(self, batch: dict, hidden: int | None = None) -> tuple[ZePTOutput, Tensor, Tensor, dict[str, Tensor]]:
        """Output, finest label map, loss, terms."""
        data = batch["data"].to(self.device, non_blocking=True)
        maps = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        maps = [m.to(self.device, non_blocking=True) for m in maps]
        annotated = self.annotations.of_batch(batch["keys"])
        if self.settings["hiding_probability"]:
            self._zept().hide(hidden)
        with autocast(self.device.type, enabled=True) if self.device.type == "cuda" else dummy_context():
            output = self.network(data)
            targets = [self._targets(m) for m in maps[: len(output.support)]]
            loss, terms = self.loss(output, targets, annotated, hidden)
        return output, maps[0], loss, terms

    def _targets(self, label_map: Tensor) -> Targets:
        include = self.settings["organs_include_tumors"]
        return make_targets(label_map, self.taxonomy, include, self.anomaly_labels)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the loss and each of its terms."""
        super().on_train_epoch_end(train_outputs)
        outputs = collate_outputs(train_outputs)
        means = {term: float(np.mean(self._gather(np.mean(outputs[term])))) for term in TERMS}
        for term, value in means.items():
            self.logger.log(f"loss_{term}", value, self.current_epoch)
        self.logger.log("stage", self._zept().stage, self.current_epoch)
        self.print_to_log_file("loss terms", {term: round(value, 4) for term, value in means.items()})

    def validation_step(self, batch: dict) -> dict:
        """Loss and voxel counts per output channel, over the cases that annotate it."""
        output, label_map, loss, _ = self._forward(batch)
        tumors = output.tumor[0] if output.tumor else None
        healthy = output.healthy[0]
        if tumors is None:
            tumors = healthy.new_full((healthy.shape[0], len(self.taxonomy.tumors), *healthy.shape[2:]), -1000.0)
        is_annotated = self.annotations.of_batch(batch["keys"])
        if self.annotations.is_partial:
            args = output.support[0], self.taxonomy.host_indices(), is_annotated
            healthy, tumors = keep_to_annotated(healthy, tumors, *args)
        network = self._zept()
        logits = network.to_channels(healthy, tumors, [network.own_threshold] * tumors.shape[1])
        wanted = make_targets(label_map, self.taxonomy)
        reference, annotated = self._reference_channels(wanted, is_annotated)
        if self.taxonomy.has_regions:
            predicted = logits > 0
        else:
            predicted = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)
        counts = annotated.to(logits.device).view(*annotated.shape, *[1] * (logits.ndim - 2))
        counts = counts if wanted.is_valid is None else counts & wanted.is_valid
        axes = [0, *range(2, logits.ndim)]
        keep = [c for c, members in enumerate(self.taxonomy.channels) if members]  # not background
        return {
            "loss": loss.detach().cpu().numpy(),
            "tp_hard": (predicted & reference & counts).sum(axes).cpu().numpy()[keep],
            "fp_hard": (predicted & ~reference & counts).sum(axes).cpu().numpy()[keep],
            "fn_hard": (~predicted & reference & counts).sum(axes).cpu().numpy()[keep],
        }

    def _reference_channels(self, wanted: Targets, is_annotated: Tensor) -> tuple[Tensor, Tensor]:
        """Reference (B, heads, *) and whether a case annotates the channel (B, heads).

        A region is annotated where each of its classes is, or belongs to an organ of the region that is.
        """
        maps, annotated = [], []
        num_organs, hosts = len(self.taxonomy.organs), self.taxonomy.host_indices()
        for organs, tumors in self.taxonomy.channel_indices():
            members = [wanted.healthy[:, i] for i in organs] + [wanted.tumor[:, k] for k in tumors]
            empty = torch.zeros_like((wanted.healthy if num_organs else wanted.tumor)[:, 0])
            maps.append(torch.stack(members).any(0) if members else empty)
            alone = [num_organs + k for k in tumors if not hosts[k] or not set(hosts[k]) <= set(organs)]
            annotated.append(is_annotated[:, [*organs, *alone]].all(1))
        return torch.stack(maps, 1), torch.stack(annotated, 1)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Pseudo Dice over the classes that this stage learns and this epoch's cases annotate; never NaN."""
        outputs = collate_outputs(val_outputs)
        tp, fp, fn = (np.sum(self._gather(np.sum(outputs[k], 0)), 0) for k in ("tp_hard", "fp_hard", "fn_hard"))
        stage = self._zept().stage
        members = [c for c in self.taxonomy.channel_indices() if c[0] or c[1]]
        is_learned = np.array([stage == 2 or bool(organs) for organs, _ in members])
        voxels = 2 * tp + fp + fn
        dice = np.where(voxels > 0, 2 * tp / np.maximum(voxels, 1), np.nan)
        counted = dice[is_learned & np.isfinite(dice)]
        mean = float(counted.mean()) if counted.size else 0.0
        self.logger.log("mean_fg_dice", mean, self.current_epoch)
        if self.current_epoch > 0 and self.stage_at(self.current_epoch - 1, 0) != stage:
            # other classes count from here on: the moving average starts again, or checkpoint_best stays in stage I
            self.logger.local_logger.my_fantastic_logging["ema_fg_dice"][self.current_epoch] = mean
            self._best_ema = None
        self.logger.log("dice_per_class_or_region", list(dice), self.current_epoch)
        self.logger.log("val_losses", float(np.mean(self._gather(np.mean(outputs["loss"])))), self.current_epoch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's; of a partially labeled case it predicts the classes that the case labels.

        Cross-validation, ensembling and postprocessing judge these files by the reference: a lesion that nobody labeled
        must not count as a false positive, nor an organ around it as missed.
        """
        if not self.annotations.is_partial:
            super().perform_actual_validation(save_probabilities)
            return
        network, annotations = self._zept(), self.annotations
        dataset_class: Any = getattr(self, "dataset_class")  # noqa: B009 - nnU-Net declares no type

        class Announces(dataset_class):
            """Tells the network which case comes next."""

            def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
                network.restrict_to(annotations.of_case(identifier))
                return cast(tuple[Any, Any, Any, dict], super().load_case(identifier))

        self.dataset_class = Announces
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = dataset_class
            network.restrict_to(None)

    def _gather(self, value: Any) -> list[Any]:
        """The value of every process of a DDP training."""
        if not self.is_ddp:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values


def seed_everything() -> None:
    """`ZEPT_SEED` makes a training repeatable, together with nnUNet_n_proc_DA=0. Processes of one training differ."""
    seed = os.environ.get("ZEPT_SEED")
    if seed is None:
        return
    if not seed.isdigit():
        raise ZePTError(f"ZEPT_SEED must be a non-negative integer, got {seed!r}")
    number = int(seed) + _SEEDS_APART * (dist.get_rank() if dist.is_initialized() else 0)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
