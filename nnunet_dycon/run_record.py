"""What a model was trained with, written into its folder: settings, cases, seed, versions."""

import hashlib
import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunet_dycon import __version__
from nnunet_dycon.files import replacing

_VERSIONS_OF = ("nnunetv2", "torch", "batchgeneratorsv2", "numpy")


def write_record(folder: Path, trainer: str, settings: dict[str, dict], cases: dict[str, list[str]]) -> None:
    """Write nnunet_dycon.json: the settings, the cases of each kind with a hash over all, torch's seed, versions."""
    record = {
        "trainer": trainer,
        **settings,
        "cases": cases,
        "cases_sha256": hashlib.sha256(json.dumps(cases, sort_keys=True).encode()).hexdigest(),
        "torch_seed": torch.initial_seed(),
        "versions": {"nnunet-dycon": __version__, **{name: version(name) for name in _VERSIONS_OF}},
    }
    with replacing(record_file(folder)) as partial:
        partial.write_text(json.dumps(record, indent=2))


def completed(recorded: dict[str, Any], settings: Any) -> dict[str, Any]:
    """Recorded settings, with the defaults of those that are newer.

    A new setting's default is therefore what was done before there was a choice.

    Args:
        recorded: by name, as they were when a model was trained.
        settings: a dataclass of today's.
    """
    return {field.name: field.default for field in fields(settings)} | recorded


def record_file(folder: Path) -> Path:
    return folder / "nnunet_dycon.json"
