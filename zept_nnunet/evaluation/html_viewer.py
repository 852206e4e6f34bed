"""The volume viewer of a comparison page: niivue's script and the volumes, all inside the page.

The script comes from the installed package ipyniivue, whose bundle for notebooks holds niivue. The bundle exports a
widget only; a line that is appended to it exports the class as well.
"""

from __future__ import annotations

import base64
import gzip
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from zept_nnunet.evaluation.html_cases import CLASS_COLORS, CaseVolumes
from zept_nnunet.evaluation.html_methods import TumorClass

INSTALL = 'pip install "zept-nnunet[report]"'
_BUNDLE = "ipyniivue/static/widget.js"
_CLASS = re.compile(r"Creating new Niivue instance.{0,200}?=new ([\w$]+)\(", re.DOTALL)
_MOST_VOXELS = 1 << 23  # of a volume in the page: larger ones are shown at a half, a third, … of their resolution


@dataclass(frozen=True)
class Script:
    """niivue: an ES module that exports `Niivue` (gzip, base64), its version's name, and its license."""

    module: str
    version: str
    license: str


def find_script() -> Script | str:
    """The script, else why there is none."""
    try:
        package = metadata.distribution("ipyniivue")
        path = Path(str(package.locate_file(_BUNDLE)))
        source = path.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return f"The volume viewer wants the package ipyniivue: {INSTALL}, then make this page again."
    name = _CLASS.search(source)
    if name is None:
        return f"ipyniivue {package.version} holds no niivue that this version knows: {INSTALL}."
    module = f"{source}\nexport{{{name.group(1)} as Niivue}};\n"
    packed = base64.b64encode(gzip.compress(module.encode("utf-8"), mtime=0)).decode("ascii")
    terms = [str(f.read_text()) for f in package.files or () if f.name.startswith("LICENSE")]
    return Script(packed, f"ipyniivue {package.version}", "\n".join(terms))


def viewer_case(volumes: CaseVolumes, classes: Sequence[TumorClass], title: str) -> dict[str, Any]:
    """One case as the page's script reads it: layers in base64, and where the crosshair begins."""
    factor = int(np.ceil((volumes.image.size / _MOST_VOXELS) ** (1 / 3)))
    layers = [_layer("image", "image", volumes.image * 255, volumes, factor)]
    layers.append(_layer("reference", "labels", volumes.reference, volumes, factor))
    layers += [_layer(name, "labels", p, volumes, factor) for name, p in volumes.predictions.items()]
    layers += [
        _layer(f"{name}: anomaly score", "score", score * 255, volumes, factor)
        for name, score in volumes.anomaly.items()
    ]
    tumor = np.argwhere(volumes.reference > 0)
    place = np.median(tumor, axis=0) if len(tumor) else np.array(volumes.image.shape) / 2
    x, y, z = volumes.like.TransformContinuousIndexToPhysicalPoint([float(v) for v in place[::-1]])
    return {
        "title": title,
        "layers": layers,
        "crosshair": [-x, -y, z],  # RAS
        "colors": [list(CLASS_COLORS[i % len(CLASS_COLORS)]) for i in range(len(classes))],
        "classes": [c.name for c in classes],
        "shrunk": factor,
    }


def _layer(name: str, kind: str, array: np.ndarray, volumes: CaseVolumes, factor: int) -> dict[str, str]:
    image = sitk.GetImageFromArray(np.round(array).astype(np.uint8))
    image.CopyInformation(volumes.like)
    if factor > 1:
        shrink = sitk.Shrink if kind == "labels" else sitk.BinShrink
        image = shrink(image, [min(factor, n) for n in image.GetSize()])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.nii.gz"
        sitk.WriteImage(image, str(path), True)
        return {"name": name, "kind": kind, "data": base64.b64encode(path.read_bytes()).decode("ascii")}
