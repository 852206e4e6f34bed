"""nnU-Net's folders, empty, for the tests of raw datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nnunet_folders import make_nnunet_folders


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_nnunet_folders(tmp_path, monkeypatch)
    return tmp_path / "nnUNet_raw"
