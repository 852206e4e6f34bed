"""docs/method.md, its figure and the package name the same parts."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_svg import FigureCanvasSVG

from zept_nnunet.plans_block import DECODER_SETTINGS, TRAINING_SETTINGS

ROOT = Path(__file__).parent.parent
IN_FIGURE = {
    "queries": "organ queries",
    "grouping": "grouping",
    "organ maps": "organ maps",
    "anomaly score": "score",
    "visual prompts": "visual prompts",
    "advanced layers": "masked attention",
    "relative features": "deviation",
    "tumor maps": "tumor maps",
    "alignment": "alignment",
}
"""Parts of the network, and the alignment, by the words of the figure."""


def table(section: str) -> list[list[str]]:
    """Rows of the table that stands under a heading, before the next one; without its head."""
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    lines = page.split(f"\n## {section}\n")[1].split("\n#")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")][2:]


def parts() -> dict[str, tuple[list[str], list[str]]]:
    """Part → its files and its settings, from the table."""
    names = re.compile(r"`([^`]+)`")
    return {row[0]: (names.findall(row[-2]), names.findall(row[-1])) for row in table("Parts")}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_method_figure", ROOT / "docs" / "make_method_figure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_and_settings_of_the_table_are_there() -> None:
    settings = DECODER_SETTINGS["zept"].keys() | TRAINING_SETTINGS["zept"].keys()
    found = parts()
    assert len(found) > 12
    for files, named in found.values():
        assert files and all((ROOT / "zept_nnunet" / name).is_file() for name in files)
        assert settings.issuperset(named)


def test_the_table_of_settings_holds_each_with_its_defaults() -> None:
    defaults = {"decoder": DECODER_SETTINGS, "training": TRAINING_SETTINGS}
    wanted = [
        [block, *(f"`{text}`" for text in (name, json.dumps(ours), json.dumps(settings["paper"][name])))]
        for block, settings in defaults.items()
        for name, ours in settings["zept"].items()
    ]
    rows = table("Settings")
    assert sorted(row[:4] for row in rows) == sorted(wanted)
    assert all(len(row) == 5 and row[4] for row in rows)


def test_the_figure_names_every_part_of_the_network(script: ModuleType) -> None:
    drawn = {n for n, (files, _) in parts().items() if any(f.startswith("network/") for f in files)} | {"alignment"}
    assert drawn == set(IN_FIGURE)
    texts = [t.get_text().replace("\n", " ") for t in script.draw().axes[0].texts]
    assert {part for part, words in IN_FIGURE.items() if not any(words in text for text in texts)} == set()


def test_the_committed_figure_is_the_one_that_is_drawn(script: ModuleType) -> None:
    """To the byte where matplotlib is the one that drew it, else by its texts and the number of its shapes."""
    drawn = io.StringIO()
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever style a test before has set
        mpl.rcParams["svg.hashsalt"] = "zept"
        FigureCanvasSVG(script.draw()).print_svg(drawn, metadata={"Date": None})
    pictures = [drawn.getvalue(), script.PICTURE.read_text(encoding="utf-8")]
    if f"Matplotlib v{mpl.__version__}," in pictures[1]:
        assert pictures[0] == pictures[1], "run: python docs/make_method_figure.py"
    texts, shapes = ([re.findall(p, picture) for picture in pictures] for p in ("<!-- (.*) -->", '<g id="patch_'))
    assert texts[0] == texts[1] and len(shapes[0]) == len(shapes[1]) > 30
