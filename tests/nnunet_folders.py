"""nnU-Net's three folders, empty."""

from __future__ import annotations

from pathlib import Path

import pytest


def make_nnunet_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `root`, with the variables that name them."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(name, str(root / name))
