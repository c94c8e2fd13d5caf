"""Checkpoints: nnU-Net's checkpoints, with the state of the semi-supervised training under one additional key.

A file is written completely or not at all. The additional state contains only tensors and plain dicts, lists and
numbers, so that nnUNetv2_predict can load the file without this package.
"""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_dycon import __version__
from nnunet_dycon.components.wrappers import unwrap
from nnunet_dycon.errors import UserError, explained, first_line
from nnunet_dycon.system.distributed import on_rank_zero
from nnunet_dycon.system.files import link_or_copy, replacing

KEY = "nnunet_dycon"
# Checkpoints of a finished training: the student, and the EMA teacher or the second network if there is one.
STUDENT, TEACHER, SECOND = "checkpoint_final.pth", "checkpoint_final_teacher.pth", "checkpoint_final_second.pth"
# Checkpoints of an unfinished training. nnU-Net itself writes no previous one.
LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
RESUMABLE = (STUDENT, LATEST, PREVIOUS, BEST)
_ASIDE = "earlier_"  # prefix of the names of an earlier training's checkpoints
_PARTS = {"version", "settings", "method", "curves"}
_REMEDY = "start from its weights with -pretrained_weights instead"


# NumPy's scalars: nnU-Net's checkpoints contain some, such as the best pseudo Dice. NumPy 1 and 2 differ in the name.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


class Damaged(UserError):
    """Error for a checkpoint that cannot be read."""


def read(filename: Path | str) -> Any:
    """Load a checkpoint to the CPU without executing code that it may contain.

    Raises:
        pickle.UnpicklingError: the file contains other objects than tensors, plain Python data and NumPy scalars.
        Exception: of various types, if the file is damaged.
    """
    with torch.serialization.safe_globals(_SAFE_GLOBALS):
        return torch.load(filename, map_location="cpu", weights_only=True)


def save_extended(filename: Path | str, save: Callable[[str], None], state: dict) -> None:
    """Write nnU-Net's checkpoint with an additional state. An existing file is replaced atomically.

    When checkpoint_latest.pth is replaced, its old version is kept as checkpoint_previous.pth.

    Args:
        filename: file to write.
        save: nnUNetTrainer.save_checkpoint, bound to the trainer; writes nnU-Net's checkpoint to a given file.
        state: the additional state, a dict with three keys:

            - "settings": dict, name of a group of settings (such as "method_settings") -> dict of the settings;
            - "method": the result of `method_state`;
            - "curves": dict, name of a curve -> one value per epoch.

    Raises:
        UserError: the file cannot be written.
    """
    with _written_completely(filename) as partial:
        save(str(partial))
        checkpoint = read(partial)
        checkpoint[KEY] = {"version": __version__, **state}
        torch.save(checkpoint, partial)
        if Path(filename).name == LATEST and Path(filename).is_file():
            with replacing(Path(filename).with_name(PREVIOUS)) as kept:
                link_or_copy(filename, kept)


def set_aside(folder: Path, log: Callable[[str], None]) -> None:
    """Rename the checkpoints of an earlier training to "earlier_" + name, so that no later training resumes from them.

    Args:
        folder: output folder of the fold.
        log: called with a line for each renamed checkpoint.
    """
    for file in (folder / name for name in (*RESUMABLE, TEACHER, SECOND)):
        if file.is_file():
            log(f"{file}, of an earlier training, is renamed to {_ASIDE}{file.name}")
            file.replace(file.with_name(_ASIDE + file.name))


def find_readable(filename: str, log: Callable[[str], None], lock: Callable[[], None] = lambda: None) -> str:
    """Return a checkpoint to resume from: the given one, or if it is damaged the newest readable one in its folder.

    All ranks must call this function: rank 0 searches, the other ranks wait for the result.

    Args:
        filename: checkpoint to try first.
        log: called with a line for each damaged checkpoint.
        lock: function that locks the fold for this training. It is called on rank 0 before the search, so that no other
            training writes a newer checkpoint afterwards.

    Raises:
        Damaged: no checkpoint is readable.
    """

    def find() -> str:
        lock()
        return str(_find_readable(Path(filename), log))

    return on_rank_zero(find)


def _find_readable(file: Path, log: Callable[[str], None]) -> Path:
    others = [other for name in RESUMABLE if (other := file.with_name(name)) != file and other.is_file()]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    for candidate, following in zip([file, *others], [*others, None]):
        try:
            _load(candidate)
        except Damaged as error:
            if following is None:
                raise
            log(f"WARNING: {error}. Trying {following.name} instead, the newest of the other checkpoints")
        else:
            break
    return candidate


def load_state(filename: Path | str, trainer_name: str) -> dict:
    """Return the state that `save_extended` has added to a checkpoint, with tensors on the CPU.

    Args:
        filename: the checkpoint.
        trainer_name: name of the trainer class that resumes from the checkpoint.

    Returns:
        A dict with the keys "settings", "method" and "curves", see `save_extended`, and "version", the version of this
        package that wrote the checkpoint.

    Raises:
        UserError: the file is damaged, or was written by another trainer or by version 0.1 of this package.
    """
    checkpoint = _load(filename)
    writer = checkpoint.get("trainer_name", "another program") if isinstance(checkpoint, dict) else "another program"
    if writer != trainer_name or KEY not in checkpoint:
        raise UserError(f"{filename} was written by {writer}, so {trainer_name} cannot resume from it; {_REMEDY}")
    state = checkpoint[KEY] if isinstance(checkpoint[KEY], dict) else {}
    version = state.get("version", "unknown")
    if version.startswith("0.1.") or not state.keys() >= _PARTS:
        raise UserError(
            f"{filename} was written by {trainer_name} of nnunet-dycon {version}, which this version cannot resume; "
            "start from its weights with -pretrained_weights, or finish the training with the old version"
        )
    return state


def _load(filename: Path | str) -> Any:
    try:
        with zipfile.ZipFile(filename) as archive:
            if (name := archive.testzip()) is not None:  # torch does not verify checksums
                raise ValueError(f"the checksum of {name} is wrong")
        return read(filename)
    except Exception as error:  # its type depends on the damage
        remedy = "replace it with another checkpoint of this training"
        raise Damaged(f"{filename} cannot be loaded ({first_line(error)}); {remedy}") from None


def method_state(method: nn.Module) -> dict[str, dict]:
    """Return the state dict of each child module of a semi-supervised method, such as the EMA teacher.

    Args:
        method: the `Method` of the training. Wrappers of DDP and torch.compile around its child modules are ignored.

    Returns:
        Name of the child module -> state dict.
    """
    return {name: unwrap(child).state_dict() for name, child in method.named_children()}


def load_method_state(method: nn.Module, state: dict[str, dict], filename: Path | str, trainer_name: str) -> None:
    """Load the state dict of each child module of a semi-supervised method, such as the EMA teacher.

    Args:
        method: the `Method` of the training, which is changed in place.
        state: a state returned by `method_state`.
        filename: name of the checkpoint, for the error message.
        trainer_name: name of the trainer class that resumes from the checkpoint, for the error message.

    Raises:
        UserError: the state of a child module is missing.
    """
    for name, child in method.named_children():
        if name not in state:
            raise UserError(
                f"{filename} lacks the saved state of the module {name}, which {trainer_name} needs to resume; "
                f"{_REMEDY}"
            )
        unwrap(child).load_state_dict(state[name])


@contextmanager
def fitting(filename: Path | str) -> Iterator[None]:
    """Return a context for loading weights, in which errors of weights that do not fit the networks become UserError.

    Args:
        filename: the checkpoint with the weights, for the error message.

    Raises:
        UserError: the code in the context has raised RuntimeError, KeyError, ValueError or TypeError.
    """
    unfit = (RuntimeError, KeyError, ValueError, TypeError)
    with explained(unfit, f"{filename} does not fit the networks; perhaps the plans have changed; {_REMEDY}"):
        yield


def save_companions(folder: Path, companions: dict[str, tuple[str, nn.Module]]) -> None:
    """Write the networks other than the student, such as the EMA teacher, as checkpoints for prediction.

    Then remove checkpoint_previous.pth, which is required only while the training is not finished.

    Args:
        folder: folder of a fold whose training is finished.
        companions: file name of the checkpoint -> (name of the trainer class that builds the network for prediction,
            network). The network is the EMA teacher or the second network.

    Raises:
        UserError: a file cannot be written.
    """
    for file, (trainer_name, network) in companions.items():
        save_for_prediction(folder / file, folder / STUDENT, network.state_dict(), trainer_name)
    (folder / PREVIOUS).unlink(missing_ok=True)  # as nnU-Net does with the latest checkpoint


def save_for_prediction(
    filename: Path, source: Path, network_weights: dict[str, torch.Tensor], trainer_name: str
) -> None:
    """Write a checkpoint for prediction with the weights of a network other than the student.

    The other entries are copied from a checkpoint of the student. The optimizer state and this package's training state
    are left out.

    Args:
        filename: file to write.
        source: checkpoint of the student in the same training.
        network_weights: state dict of the network to write, such as the EMA teacher.
        trainer_name: name of the trainer class that builds this network for prediction.

    Raises:
        UserError: the file cannot be written.
    """
    checkpoint = read(source)
    checkpoint |= {"network_weights": network_weights, "trainer_name": trainer_name}
    for key in (KEY, "optimizer_state"):
        del checkpoint[key]
    with _written_completely(filename) as partial:
        torch.save(checkpoint, partial)


@contextmanager
def _written_completely(filename: Path | str) -> Iterator[Path]:
    problem = f"{filename} cannot be written, and the previous file is unchanged; free disk space and resume with --c"
    # torch.save raises a RuntimeError if the disk is full.
    with explained((OSError, RuntimeError), problem), replacing(filename) as partial:
        yield partial
