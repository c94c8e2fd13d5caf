"""The module in which nnU-Net finds the trainers of this package.

The environment variable nnUNet_extTrainer must contain the folder of this module.

For each look-up, nnU-Net imports every module in this folder by its bare name, looks for the trainer class with
hasattr, and removes the module from sys.modules. A class defined in such a module could not be pickled, and each
look-up would return a different class. This module therefore defines no class. Its __getattr__ returns the class from
nnunet_dycon.trainers, and imports only the module of this class.
"""

import os
from pathlib import Path

from nnunet_dycon.registry import BUILDERS
from nnunet_dycon.trainers import registered_name, trainer_class


def __getattr__(name: str) -> type:
    if not name.startswith("nnUNetTrainer"):  # attributes that Python itself looks up, such as __path__
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if registered_name(name) is not None or name in BUILDERS or _is_searched_last():
        return trainer_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_searched_last() -> bool:
    """Return whether this module's folder is the last existing folder in nnUNet_extTrainer.

    If so, nnU-Net searches no other folder after it for the trainer.
    """
    folders = [Path(entry) for entry in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if entry.strip()]
    folders = [folder.resolve() for folder in folders if folder.exists()]
    return bool(folders) and folders[-1] == Path(__file__).resolve().parent
