"""Where nnU-Net finds the trainers: nnUNet_extTrainer names this folder.

nnU-Net imports every module below that folder by its bare name, asks it for the wanted class with hasattr, and drops it
from sys.modules afterwards. A class defined here could not be pickled and would be a new class at each look-up.
So this module defines none: it hands on the class of that name from nnunet_dycon.trainers, and imports only that one.
"""

from importlib import import_module

from nnunet_dycon.registry import BUILDERS, TRAINERS


def __getattr__(name: str) -> type:
    module = TRAINERS[name].module if name in TRAINERS else BUILDERS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"nnunet_dycon.trainers.{module}"), name)
