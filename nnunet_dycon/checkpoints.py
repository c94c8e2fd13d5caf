"""nnU-Net's checkpoint files, extended: all that is ours lies under one key, and files appear whole or not at all.

Only tensors and plain dicts, lists and numbers go in, so that nnUNetv2_predict loads them without this package.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nnunet_dycon.errors import UserError, explained, first_line
from nnunet_dycon.files import replacing

KEY = "nnunet_dycon"
# Of a finished training: the student, and the network beside it.
STUDENT, TEACHER, SECOND = "checkpoint_final.pth", "checkpoint_final_teacher.pth", "checkpoint_final_second.pth"
_PARTS = {"version", "settings", "method", "curves"}


def save_extended(filename: Path | str, save: Callable[[str], None], state: dict) -> None:
    """Have ``save`` write nnU-Net's checkpoint, add our state to it, and only then give it its name.

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


def load_state(filename: Path | str, trainer_name: str) -> dict:
    """Our state in a checkpoint, on the CPU.

    Raises:
        UserError: another trainer wrote the file, or it cannot be loaded.
    """
    try:
        checkpoint = torch.load(filename, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        remedy = "go on from another checkpoint, put in its place"
        raise UserError(f"{filename} cannot be loaded ({first_line(error)}); {remedy}") from None
    writer = checkpoint.get("trainer_name", "something else") if isinstance(checkpoint, dict) else "something else"
    if writer != trainer_name or KEY not in checkpoint:
        raise UserError(
            f"{filename} was written by {writer} and has no state for {trainer_name} to go on "
            "from; start from its weights with -pretrained_weights instead"
        )
    state = checkpoint[KEY]
    if not (isinstance(state, dict) and state.keys() >= _PARTS):
        raise UserError(
            f"{filename} was written by another version of nnunet-dycon; start from its weights with "
            "-pretrained_weights instead"
        )
    return state


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
