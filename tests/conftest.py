"""What the end-to-end tests share: one small dataset and one model with five folds in two configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import Workspace
from tests.small_ct import write_demo_dataset

TINY = (24, 32, 32)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("nnunet"))


def make_dataset(
    workspace: Workspace, dataset_id: int, cases_train: int = 5, cases_test: int = 1, **kwargs: str
) -> Path:
    """A raw dataset of the demo's synthetic CT, small."""
    return write_demo_dataset(
        workspace.raw, dataset_id, cases_train=cases_train, cases_test=cases_test, shape=TINY, **kwargs
    )


@pytest.fixture(scope="session")
def planned(workspace: Workspace) -> Path:
    """Dataset 901, planned and preprocessed by the stock command."""
    folder = make_dataset(workspace, 901)
    workspace.plan(901, "-c", "2d", "3d_fullres", "--verify_dataset_integrity")
    return folder


@pytest.fixture(scope="session")
def trained(workspace: Workspace, planned: Path) -> Path:
    """Folds 0–4 of 2d and 3d_fullres, with probabilities. Returns the raw dataset."""
    for configuration in ("2d", "3d_fullres"):
        for fold in range(5):
            workspace.train(901, configuration, str(fold), "ZePTTrainerTest", "--npz")
    return planned


def read_json(path: Path) -> dict:
    """A JSON file as a dict."""
    return json.loads(path.read_text())
