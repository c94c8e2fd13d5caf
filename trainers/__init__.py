"""Trainers for `nnUNetv2_train -tr`, one class per file, and variants of them with other numbers of epochs.

`nnUNetTrainerX_50epochs` trains `nnUNetTrainerX` for 50 epochs instead of 1000, `nnUNetTrainerX_smoke` for 2 epochs of
5 iterations. The classes of these variants are created on demand and stored as attributes of this module, so that there
is one class per name and worker processes can unpickle it.
"""

import re
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from nnunet_dycon.errors import UnknownTrainer
from nnunet_dycon.registry import BUILDERS, RETIRED, TRAINERS

LENGTHS = (
    "Lengths of all trainers: 1000 epochs by default, NAME_50epochs for 50 or any other number, NAME_smoke for a test "
    "run of 2 epochs with 5 iterations."
)
_PREFIX = "nnUNetTrainer"
_LENGTH = re.compile(r"(?P<trainer>.+)_(?P<length>smoke|(?P<epochs>\d+)epochs)")
_SMOKE = {"num_epochs": 2, "num_iterations_per_epoch": 5, "num_val_iterations_per_epoch": 2}


def _split(name: str) -> tuple[str, re.Match | None]:
    """Return a trainer's name without its length suffix, and the regex match of the full name.

    For "nnUNetTrainerBCP_50epochs", the result is "nnUNetTrainerBCP" and a match whose group "epochs" is "50". For a
    name with the suffix _smoke, the group "epochs" is None. For a name without a length suffix, the match is None.
    """
    match = _LENGTH.fullmatch(name)
    return (match["trainer"] if match else name), match


def registered_name(name: str) -> str | None:
    """Return a trainer's name without its length suffix, such as _50epochs; None if it is not in `TRAINERS`.

    `nnunet_dycon.registry.TRAINERS` describes the trainers for `nnUNetv2_train -tr`.

    Raises:
        UnknownTrainer: the trainer was removed from this package, or its number of epochs starts with 0.
    """
    trainer, match = _split(name)
    if trainer in RETIRED:
        raise UnknownTrainer(f"{trainer} was removed; {RETIRED[trainer]}")
    if trainer not in TRAINERS:
        return None
    if match and match["epochs"] and match["epochs"].startswith("0"):
        raise UnknownTrainer(f"{name}: the number of epochs starts with 0; use for example {trainer}_50epochs")
    return trainer


def caveat_of(name: str) -> str | None:
    """Return the warning to log when a training starts, as "TRAINER: text"; None if the trainer has no warning.

    Args:
        name: name of the trainer. TRAINER is this name without its length suffix, such as _50epochs.
    """
    trainer, _ = _split(name)
    caveat = TRAINERS[trainer].caveat if trainer in TRAINERS else ""
    return f"{trainer}: {caveat}" if caveat else None


def trainer_class(name: str) -> Any:
    """Return the class of a trainer.

    Args:
        name: name of a trainer in `nnunet_dycon.registry.TRAINERS`, with or without a length suffix such as _50epochs,
            or of a trainer for internal use in `nnunet_dycon.registry.BUILDERS`, such as nnUNetTrainer_demo.

    Raises:
        UnknownTrainer: there is no such trainer, it was removed, or its number of epochs starts with 0.
    """
    trainer = registered_name(name)
    if trainer is None and name not in BUILDERS:
        endings = [known.removeprefix(_PREFIX) for known in TRAINERS]
        near = get_close_matches(name.removeprefix(_PREFIX).partition("epoch")[0].rstrip("_0123456789"), endings, n=1)
        hint = f"did you mean {_PREFIX}{near[0]}? " if near else ""
        raise UnknownTrainer(f"no trainer is called {name}; {hint}run `nnunet_dycon list` for all trainers")
    if name in (trainer, *BUILDERS):
        return getattr(import_module(f"{__name__}.{name}"), name)
    return globals().get(name) or __getattr__(name)


def __getattr__(name: str) -> Any:
    """Create, store and return the class of a trainer with a length suffix, such as nnUNetTrainerBCP_50epochs.

    Python calls this function if the module has no attribute of this name yet.

    Raises:
        AttributeError: the name has no length suffix, or the trainer is not in `TRAINERS`.
        UnknownTrainer: the number of epochs starts with 0.
    """
    trainer, match = _split(name)
    if match is None or trainer not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = trainer_class(trainer)
    registered_name(name)  # raises for a wrong number of epochs
    length = {"num_epochs": int(match["epochs"])} if match["epochs"] else _SMOKE
    settings = replace(base.training_settings, **length)
    doc = f"{base.__name__}, {settings.num_epochs} epochs of {settings.num_iterations_per_epoch} iterations."
    made = type(name, (base,), {"__module__": __name__, "__doc__": doc, "training_settings": settings})
    return globals().setdefault(name, made)
