"""Record of a run in the folder of the fold: settings, cases, seed and versions."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch

from nnunet_dycon import __version__
from nnunet_dycon.system.files import replacing

_VERSIONS_OF = ("nnunetv2", "torch", "batchgeneratorsv2", "numpy")


def record_file(folder: Path) -> Path:
    """Return the path of the record in the folder of a fold."""
    return folder / "nnunet_dycon.json"


def write_record(folder: Path, trainer: str, settings: dict[str, dict], cases: dict[str, list[str]]) -> None:
    """Write the record of a run, nnunet_dycon.json, to the folder of a fold.

    Args:
        folder: folder of the fold.
        trainer: name of the trainer.
        settings: name of the group, such as "method_settings" -> dict of settings.
        cases: role, such as "labeled" -> identifiers of the cases. A hash of all identifiers is written, too.
    """
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
