"""Trainers for `nnUNetv2_train -tr`, one class per file, and variants of them for fine-tuning or of other lengths.

`nnUNetTrainerX_50epochs` trains `nnUNetTrainerX` for 50 epochs instead of 1000, `nnUNetTrainerX_smoke` for 2 epochs of
5 iterations. `nnUNetTrainerX_finetune` is for training with -pretrained_weights: its learning rate is lower and has a
warm-up. A length follows: `nnUNetTrainerX_finetune_50epochs`. The classes of these variants are created on demand and
stored as attributes of this module, so that there is one class per name and worker processes can unpickle it.
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
FINE_TUNING = (
    "Fine-tuning with all trainers: NAME_finetune, or NAME_finetune_50epochs, for pretrained weights "
    "(-pretrained_weights): a tenth of the learning rate, after a warm-up."
)
_PREFIX = "nnUNetTrainer"
_VARIANT = re.compile(
    r"(?P<trainer>.*?)(?P<finetune>_finetune)?(?:_(?P<length>smoke|(?P<epochs>\d+)epochs))?", re.DOTALL
)
# Their source is given in nnunet_dycon/training/finetune.py. A factor also suits the trainers with another optimizer.
_FINE_TUNING = {"learning_rate_factor": 0.1, "warmup": 0.05}
_SMOKE = {"num_epochs": 2, "num_iterations_per_epoch": 5, "num_val_iterations_per_epoch": 2}


def _split(name: str) -> re.Match:
    """Return the regex match of a trainer's name.

    Its groups are "trainer" (the name without suffixes), "finetune" and "length" (None without this suffix), and
    "epochs" (the number of epochs as text; None without a number). For "nnUNetTrainerBCP_finetune_50epochs", they are
    "nnUNetTrainerBCP", "_finetune", "50epochs" and "50".
    """
    match = _VARIANT.fullmatch(name)
    assert match is not None  # everything is optional
    return match


def registered_name(name: str) -> str | None:
    """Return a trainer's name without suffixes (_finetune, _50epochs, _smoke); None if it is not in `TRAINERS`.

    `nnunet_dycon.registry.TRAINERS` describes the trainers for `nnUNetv2_train -tr`.

    Raises:
        UnknownTrainer: the trainer was removed from this package, or its number of epochs starts with 0.
    """
    match = _split(name)
    trainer = match["trainer"]
    if trainer in RETIRED:
        raise UnknownTrainer(f"{trainer} was removed; {RETIRED[trainer]}")
    if trainer not in TRAINERS:
        return None
    if (match["epochs"] or "").startswith("0"):
        raise UnknownTrainer(f"{name}: the number of epochs starts with 0; use for example {trainer}_50epochs")
    return trainer


def caveat_of(name: str) -> str | None:
    """Return the warning to log when a training starts, as "TRAINER: text"; None if the trainer has no warning.

    Args:
        name: name of the trainer. TRAINER is this name without suffixes such as _50epochs.
    """
    trainer = _split(name)["trainer"]
    caveat = TRAINERS[trainer].caveat if trainer in TRAINERS else ""
    return f"{trainer}: {caveat}" if caveat else None


def trainer_class(name: str) -> Any:
    """Return the class of a trainer.

    Args:
        name: name of a trainer in `nnunet_dycon.registry.TRAINERS`, with or without suffixes such as _finetune and
            _50epochs, or of a trainer for internal use in `nnunet_dycon.registry.BUILDERS`, such as nnUNetTrainer_demo.

    Raises:
        UnknownTrainer: there is no such trainer, it was removed, or its number of epochs starts with 0.
    """
    trainer = registered_name(name)
    if trainer is None and name not in BUILDERS:
        endings = [known.removeprefix(_PREFIX) for known in TRAINERS]
        written = _split(name)["trainer"].removeprefix(_PREFIX).partition("epoch")[0].rstrip("_0123456789")
        near = get_close_matches(written, endings, n=1)
        suffixes = "_finetune before the length, as in _finetune_50epochs" if "_finetune" in name else ""
        hint = f"did you mean {_PREFIX}{near[0]}{', with ' * bool(suffixes)}{suffixes}? " if near else ""
        raise UnknownTrainer(f"no trainer is called {name}; {hint}run `nnunet_dycon list` for all trainers")
    if name in (trainer, *BUILDERS):
        return getattr(import_module(f"{__name__}.{name}"), name)
    return globals().get(name) or __getattr__(name)


def __getattr__(name: str) -> Any:
    """Create, store and return the class of a trainer with a suffix, such as nnUNetTrainerBCP_finetune_50epochs.

    Python calls this function if the module has no attribute of this name yet.

    Raises:
        AttributeError: the name has no suffix, or the trainer is not in `TRAINERS`.
        UnknownTrainer: the number of epochs starts with 0.
    """
    match = _split(name)
    if match["trainer"] not in TRAINERS or match["trainer"] == name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    registered_name(name)  # raises for a wrong number of epochs
    changes: dict[str, Any]
    if match["length"]:
        base = trainer_class(match["trainer"] + (match["finetune"] or ""))
        changes = {"num_epochs": int(match["epochs"])} if match["epochs"] else _SMOKE
    else:
        base, changes = trainer_class(match["trainer"]), _FINE_TUNING
    settings = replace(base.training_settings, **changes)
    doc = f"{base.__name__}, {settings.num_epochs} epochs of {settings.num_iterations_per_epoch} iterations."
    if not match["length"]:
        doc = f"{base.__name__} for fine-tuning of pretrained weights; see `nnunet_dycon.training.finetune`."
    made = type(name, (base,), {"__module__": __name__, "__doc__": doc, "training_settings": settings})
    return globals().setdefault(name, made)
