"""The same change for several model folders, or for the members of an ensemble: all of them or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from zept_nnunet.datasets.raw_folder import new_dataset
from zept_nnunet.errors import ZePTError
from zept_nnunet.files import new_parents, written_as
from zept_nnunet.inference.add_tumor import AddedTumors
from zept_nnunet.inference.model_folder import read_json, update_copies

_PREFIX = "ensemble___"
_FILES = ("postprocessing.pkl", "postprocessing.json", "summary.json")


def is_ensemble(folder: Path) -> bool:
    """Whether the folder is one that nnUNetv2_find_best_configuration made for an ensemble."""
    return folder.resolve().name.startswith(_PREFIX)


def members(ensemble: Path) -> list[Path]:
    """The model folders of an ensemble's folder, `…/DATASET/ensembles/ensemble___MODEL___MODEL___FOLDS`.

    Raises:
        ZePTError: a member is not there.
    """
    dataset = ensemble.resolve().parent.parent
    found = [dataset / name for name in ensemble.resolve().name.split("___")[1:-1]]
    missing = [str(path) for path in found if not path.is_dir()]
    if missing or not found:
        raise ZePTError(f"the ensemble {ensemble} is made of {[p.name for p in found]}; not there: {missing}")
    return found


def change_all(
    folders: Sequence[Path], change: Callable[[Path], AddedTumors], parent: Path | None = None
) -> list[AddedTumors]:
    """Change each folder. Where one fails, what was written for the others is removed again, and a new `parent`."""
    done: list[AddedTumors] = []
    with nullcontext() if parent is None else new_parents(parent.absolute()), _removed_on_failure(done):
        for folder in folders:
            done.append(change(folder))
    return done


@contextmanager
def _removed_on_failure(changed: Iterable[AddedTumors]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for new in changed:
            shutil.rmtree(new.folder, ignore_errors=True)
        raise


def change_ensemble(
    ensemble: Path, change: Callable[[Path], AddedTumors], parent: Path | None = None
) -> tuple[list[AddedTumors], Path]:
    """Change every member, and write the ensemble's folder that goes with the new members.

    `parent` holds the new members, where they do not stand beside the old ones; its folder `ensembles` the new
    ensemble.
    nnU-Net's postprocessing was determined on the trained classes; it goes on to hold for them.

    Raises:
        ZePTError: a member is missing or cannot be changed, or the new ensemble's folder exists; nothing is left then.
    """
    here = ensemble.resolve()
    folder = here.parent if parent is None else parent.absolute() / "ensembles"
    with new_parents(folder):
        changed = change_all(members(ensemble), change)
        target = folder / "___".join(
            (_PREFIX.rstrip("_"), *(c.folder.name for c in changed), here.name.split("___")[-1])
        )
        with _removed_on_failure(changed):
            _write_ensemble(here, changed[0].folder, target)
    return changed, target


def _write_ensemble(old: Path, member: Path, target: Path) -> None:
    if target.exists():
        raise ZePTError(f"the ensemble's folder {target} exists already; remove it")
    with new_dataset(target) as scratch, written_as(target, scratch):
        for name in _FILES:
            if (old / name).is_file():
                shutil.copyfile(old / name, scratch / name)
        update_copies(old, scratch, read_json(member / "plans.json"), read_json(member / "dataset.json"))
