"""What `zept prepare` and TotalSegmentator's files label is described."""

from __future__ import annotations

from importlib import resources

import pytest
import yaml

from zept_nnunet.datasets.prepare import dataset_json, labels_of, recipes
from zept_nnunet.knowledge.dataset import class_texts
from zept_nnunet.knowledge.texts import describe_organ, describe_tumor
from zept_nnunet.names import infer_is_tumor

pytestmark = pytest.mark.filterwarnings("ignore:.*the whole body:UserWarning")


@pytest.mark.parametrize("name", [name for name in recipes() if name != "one-tumor"])  # whose tumor the user names
def test_every_label_of_a_recipe_is_described(name: str, tmp_path) -> None:
    recipe = recipes()[name]
    labels = {"background": 0, **{label: i for i, label in enumerate(labels_of(recipe), start=1)}}
    found = class_texts(dataset_json(name, recipe, labels, tmp_path))
    assert len(found) == len(labels) - 1
    assert {n: d.origin for n, d in found.items() if not d.origin.startswith("built-in (")} == {}


def test_every_label_of_a_class_map_is_described() -> None:
    text = (resources.files("zept_nnunet") / "datasets" / "class_maps.yaml").read_text(encoding="utf-8")
    maps = yaml.safe_load(text)
    assert maps
    for names in maps.values():
        found = [describe_tumor(n) if infer_is_tumor(n) else describe_organ(n) for n in names]
        assert [n for n, d in zip(names, found, strict=True) if not d.origin.startswith("built-in (")] == []
        assert len({d.text for d in found}) == len(names)
