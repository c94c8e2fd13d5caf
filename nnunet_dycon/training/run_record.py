"""Record of a training run: nnunet_dycon.json in the fold's output folder, with settings, cases, seed and versions."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from nnunet_dycon import __version__
from nnunet_dycon.system.files import replacing

_VERSIONS_OF = ("nnunetv2", "torch", "batchgeneratorsv2", "numpy")


def record_file(folder: Path) -> Path:
    """Return the path of nnunet_dycon.json, the record of a training run, in the output folder of a fold."""
    return folder / "nnunet_dycon.json"


def update_record(
    folder: Path,
    trainer: str,
    settings: dict[str, dict],
    cases: dict[str, list[str]],
    is_new: bool,
    log: Callable[[str], None],
) -> None:
    """Write nnunet_dycon.json if the training is new, its cases have changed, or the existing file is unreadable.

    Args:
        folder, trainer, settings, cases: see `write_record`.
        is_new: True for a new training, False for a resumed one.
        log: called with a warning for each role (such as "labeled") whose cases have changed.
    """
    recorded: dict = {}
    if not is_new:
        with suppress(OSError, ValueError, KeyError, TypeError):
            recorded = dict(json.loads(record_file(folder).read_text())["cases"])
    changed = [role for role in cases if recorded and recorded.get(role, []) != cases[role]]
    for role in changed:
        before, now = len(recorded.get(role, [])), len(cases[role])
        log(f"WARNING: the cases have changed since this training started: {role} {before}, now {now}")
    if changed or not recorded:
        write_record(folder, trainer, settings, cases)


def write_record(folder: Path, trainer: str, settings: dict[str, dict], cases: dict[str, list[str]]) -> None:
    """Write nnunet_dycon.json, which records the trainer, settings, cases, seed and versions of a training run.

    Args:
        folder: output folder of the fold.
        trainer: name of the trainer.
        settings: name of a group of settings, such as "method_settings" -> dict of the settings in this group.
        cases: role, such as "labeled" -> identifiers of the cases. The SHA-256 hash of this dict is written, too.
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
