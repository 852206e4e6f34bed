"""What nnU-Net finds through nnUNet_extTrainer. Re-exports only: the classes live in the installed package."""

from zept_nnunet.training.baseline_trainers import (
    nnUNetTrainerAnyTumorPlus,
    nnUNetTrainerAnyTumorRel,
    nnUNetTrainerBaseline,
)
from zept_nnunet.training.budget import ZePTTrainerBudget, ZePTTrainerPaperBudget
from zept_nnunet.training.trainer import ZePTTrainer
from zept_nnunet.training.variants import (
    ZePTTrainer_1epoch,
    ZePTTrainer_5epochs,
    ZePTTrainer_50epochs,
    ZePTTrainer_250epochs,
    ZePTTrainerPaper,
    ZePTTrainerStageI,
    ZePTTrainerStageII,
)

__all__ = [
    "ZePTTrainer",
    "ZePTTrainerBudget",
    "ZePTTrainerPaper",
    "ZePTTrainerPaperBudget",
    "ZePTTrainerStageI",
    "ZePTTrainerStageII",
    "ZePTTrainer_1epoch",
    "ZePTTrainer_5epochs",
    "ZePTTrainer_50epochs",
    "ZePTTrainer_250epochs",
    "nnUNetTrainerAnyTumorPlus",
    "nnUNetTrainerAnyTumorRel",
    "nnUNetTrainerBaseline",
]
