"""Entry point of nnU-Net's look-up of trainers. nnUNet_extTrainer must contain this folder.

nnU-Net imports every module below this folder by its bare name, looks for the class with hasattr, and removes the
module from sys.modules. A class defined here could not be pickled, and would be a new class at each look-up. This
module therefore defines none. It returns the class from nnunet_dycon.trainers, and imports only that class's module.
"""

import os
from pathlib import Path

from nnunet_dycon.registry import BUILDERS
from nnunet_dycon.trainers import registered_name, trainer_class


def __getattr__(name: str) -> type:
    if not name.startswith("nnUNetTrainer"):  # attributes that Python looks up
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if registered_name(name) is not None or name in BUILDERS or _is_searched_last():
        return trainer_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_searched_last() -> bool:
    """Return whether this is the last folder in nnUNet_extTrainer, so that no later one can contain the trainer."""
    folders = [Path(entry) for entry in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if entry.strip()]
    folders = [folder.resolve() for folder in folders if folder.exists()]
    return bool(folders) and folders[-1] == Path(__file__).resolve().parent
