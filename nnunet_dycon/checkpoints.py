"""nnU-Net's checkpoint files, extended: all that is ours lies under one key, and files appear whole or not at all.

Only tensors and plain dicts, lists and numbers go in, so that nnUNetv2_predict loads them without this package.
"""

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nnunet_dycon.errors import UserError, explained, first_line
from nnunet_dycon.files import replacing

KEY = "nnunet_dycon"
# Of a finished training: the student, and the network beside it.
STUDENT, TEACHER, SECOND = "checkpoint_final.pth", "checkpoint_final_teacher.pth", "checkpoint_final_second.pth"
# Of one that goes on; nnU-Net knows nothing of the one before the latest.
LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
RESUMABLE = (STUDENT, LATEST, PREVIOUS, BEST)
_ASIDE = "earlier_"  # before the names of checkpoints of an earlier training
_PARTS = {"version", "settings", "method", "curves"}


class Damaged(UserError):
    """A checkpoint that cannot be loaded at all."""


def save_extended(filename: Path | str, save: Callable[[str], None], state: dict) -> None:
    """Have ``save`` write nnU-Net's checkpoint, add our state to it, and only then give it its name.

    The latest checkpoint becomes the previous one when it is replaced.

    Args:
        filename: of the checkpoint.
        save: of nnU-Net's trainer.
        state: with the keys version, settings, method, curves.

    Raises:
        UserError: it cannot be written.
    """
    with _written_whole(filename) as partial:
        save(str(partial))
        checkpoint = torch.load(partial, map_location="cpu", weights_only=False)
        checkpoint[KEY] = state
        torch.save(checkpoint, partial)
        if Path(filename).name == LATEST and Path(filename).is_file():
            with replacing(Path(filename).with_name(PREVIOUS)) as kept:
                _link(filename, kept)


def _link(file: Path | str, link: Path) -> None:
    link.unlink(missing_ok=True)
    try:
        os.link(file, link)
    except OSError:  # there are file systems without links
        shutil.copyfile(file, link)


def set_aside(folder: Path, tell: Callable[[str], None]) -> None:
    """Rename the checkpoints of an earlier training, so that no later one goes on from them.

    Args:
        folder: of the fold.
        tell: called with a line for each.
    """
    for file in (folder / name for name in (*RESUMABLE, TEACHER, SECOND)):
        if file.is_file():
            tell(f"{file}, of an earlier training, is renamed to {_ASIDE}{file.name}")
            file.replace(file.with_name(_ASIDE + file.name))


def whole_one(file: Path, tell: Callable[[str], None]) -> Path:
    """A checkpoint to go on from: the one that is named, or if it is damaged the newest whole one beside it.

    Args:
        file: of the checkpoint.
        tell: called with a line for each damaged one.

    Raises:
        Damaged: all are.
    """
    others = [other for name in RESUMABLE if (other := file.with_name(name)) != file and other.is_file()]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    for candidate, following in zip([file, *others], [*others, None]):
        try:
            _load(candidate)
        except Damaged as error:
            if following is None:
                raise
            tell(f"WARNING: {error}. Trying {following.name}, the newest of the others")
        else:
            break
    return candidate


def load_state(filename: Path | str, trainer_name: str) -> dict:
    """Our state in a checkpoint, on the CPU.

    Raises:
        UserError: another trainer wrote the file, or it cannot be loaded.
    """
    checkpoint = _load(filename)
    writer = checkpoint.get("trainer_name", "something else") if isinstance(checkpoint, dict) else "something else"
    if writer != trainer_name or KEY not in checkpoint:
        raise UserError(
            f"{filename} was written by {writer} and has no state for {trainer_name} to go on "
            "from; start from its weights with -pretrained_weights instead"
        )
    state = checkpoint[KEY]
    version = state.get("version", "unknown") if isinstance(state, dict) else "unknown"
    if version.startswith("0.1.") or not state.keys() >= _PARTS:
        raise UserError(
            f"{filename} was written by {trainer_name} of nnunet-dycon {version}, which this version cannot continue; "
            "start from its weights with -pretrained_weights, or finish the training with that version"
        )
    return state


def _load(filename: Path | str) -> Any:
    try:
        with zipfile.ZipFile(filename) as archive:
            if (name := archive.testzip()) is not None:  # torch does not compare checksums
                raise ValueError(f"the checksum of {name} is wrong")
        return torch.load(filename, map_location="cpu", weights_only=False)
    except Exception as error:  # of all kinds, according to what is damaged
        remedy = "go on from another checkpoint, put in its place"
        raise Damaged(f"{filename} cannot be loaded ({first_line(error)}); {remedy}") from None


def save_for_prediction(
    filename: Path, source: Path, network_weights: dict[str, torch.Tensor], trainer_name: str
) -> None:
    """Write a checkpoint like ``source`` with other weights, and without what only training needs.

    Args:
        filename: of the checkpoint.
        source: a checkpoint of the same training.
        network_weights: the other ones.
        trainer_name: of the trainer whose network they belong to.

    Raises:
        UserError: it cannot be written.
    """
    checkpoint = torch.load(source, map_location="cpu", weights_only=False)
    checkpoint |= {"network_weights": network_weights, "trainer_name": trainer_name}
    for key in (KEY, "optimizer_state"):
        del checkpoint[key]
    with _written_whole(filename) as partial:
        torch.save(checkpoint, partial)


@contextmanager
def _written_whole(filename: Path | str) -> Iterator[Path]:
    problem = f"{filename} cannot be written; what was there before stays as it is. Make room, and go on with --c"
    # torch.save tells of a full disk by a RuntimeError.
    with explained((OSError, RuntimeError), problem), replacing(filename) as partial:
        yield partial
