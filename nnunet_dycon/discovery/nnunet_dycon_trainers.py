"""Where nnU-Net finds the trainers: nnUNet_extTrainer names this folder.

nnU-Net imports every module below that folder by its bare name, asks it for the wanted class with hasattr, and drops it
from sys.modules afterwards. A class defined here could not be pickled and would be a new class at each look-up.
So this module defines none: it returns the class of that name from nnunet_dycon.trainers, and imports only that one.
"""

import os
from pathlib import Path

from nnunet_dycon.registry import BUILDERS
from nnunet_dycon.trainers import registered_name, trainer_class


def __getattr__(name: str) -> type:
    if not name.startswith("nnUNetTrainer"):  # Python's own look-ups
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if registered_name(name) is not None or name in BUILDERS or _is_searched_last():
        return trainer_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_searched_last() -> bool:
    """Whether no folder behind this one in nnUNet_extTrainer could have the trainer."""
    folders = [Path(entry) for entry in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if entry.strip()]
    folders = [folder.resolve() for folder in folders if folder.exists()]
    return bool(folders) and folders[-1] == Path(__file__).resolve().parent
