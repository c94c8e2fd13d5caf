"""Reading of checkpoints with pretrained weights, without executing code that they may contain.

Four layouts are read:

- checkpoints of nnU-Net v2 and of this package, and models exported by `nnunet_dycon export_vanilla`: the weights are
  under "network_weights", the plans under "init_args";
- checkpoints of nnssl: the weights are under "network_weights", and "nnssl_adaptation_plan" contains the architecture,
  the pre-training plans, and the names of encoder, stem and input layers in the state dict (MIC-DKFZ/nnssl,
  src/nnssl/adaptation_planning/adaptation_plan.py);
- a dict with a state dict under "state_dict", "model_state_dict" or "model";
- a state dict.
"""

import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnunet_dycon.errors import UsageError, UserError, first_line
from nnunet_dycon.training.checkpoints import read

Weights = dict[str, torch.Tensor]

_NESTED = ("network_weights", "state_dict", "model_state_dict", "model")
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")  # of DistributedDataParallel and torch.compile
# Parts of the message of torch about an object that it does not load, such as a class of another package.
_OBJECTS = ("GLOBAL", "Unsupported class")


@dataclass(frozen=True)
class Source:
    """A checkpoint with pretrained weights.

    Attributes:
        file: the checkpoint.
        weights: names without the prefixes of DistributedDataParallel and torch.compile -> tensors on the CPU.
        init_args: arguments of the trainer's constructor in nnU-Net's checkpoints ("plans", "configuration", ...).
        nnssl_plan: nnssl's adaptation plan; empty if the checkpoint is not one of nnssl.
        citations: names of the works to cite, as listed in the checkpoint.
    """

    file: Path
    weights: Weights
    init_args: dict[str, Any] = field(default_factory=dict)
    nnssl_plan: dict[str, Any] = field(default_factory=dict)
    citations: tuple[str, ...] = ()


def read_source(file: Path) -> Source:
    """Read a checkpoint in one of the layouts in the docstring of the module.

    Raises:
        UsageError: the file does not exist.
        UserError: the file is damaged, contains objects that can execute code, or contains no weights.
    """
    content = _load(file)
    content = content if isinstance(content, dict) else {}
    nested = next((content[key] for key in _NESTED if isinstance(content.get(key), dict)), content)
    weights = {
        _WRAPPERS.sub("", name): tensor
        for name, tensor in nested.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    if not weights:
        raise UserError(f"{file} contains no weights; give a checkpoint of nnU-Net or nnssl, or a state dict, with -w")
    listed = content.get("citations")
    citations = [entry.get("name") for entry in (listed if isinstance(listed, list) else ()) if isinstance(entry, dict)]
    return Source(
        file,
        weights,
        _dict(content, "init_args"),
        _dict(content, "nnssl_adaptation_plan"),
        tuple(str(name) for name in citations if name),
    )


def _dict(content: dict, key: str) -> dict[str, Any]:
    return content[key] if isinstance(content.get(key), dict) else {}


def _load(file: Path) -> Any:
    if not file.is_file():
        raise UsageError(f"{file} does not exist; name a checkpoint on this machine, downloaded if necessary")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if (name := archive.testzip()) is not None:  # torch does not verify checksums
                    raise ValueError(f"the checksum of {name} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about old formats
            return read(file)
    except Exception as error:  # its type depends on the damage
        if any(text in str(error) for text in _OBJECTS):
            raise UserError(
                f"{file} contains objects other than tensors and plain data, and loading them could execute code; if "
                "you trust its origin, load it with torch.load(..., weights_only=False) and save its state dict alone"
            ) from None
        raise UserError(
            f"{file} is damaged or not a checkpoint of PyTorch; download or copy it again ({first_line(error)[:80]})"
        ) from None
