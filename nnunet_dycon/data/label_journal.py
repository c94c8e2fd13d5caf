"""Journal of moves of cases between imagesUn and imagesTr, which is completed after an interruption.

A change of a raw data set consists of many renamings. It is first written to the folder .label_journal of the data set.
From then on, every command of this package that uses the data set completes it.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from nnunet_dycon.errors import UserError, explained
from nnunet_dycon.system.files import replacing
from nnunet_dycon.system.locks import Lock

_FOLDER, _FILE = ".label_journal", "journal.json"
HISTORY = "label_history"  # folder with a record of each completed change


def lock(source: Path) -> Lock:
    """Return the lock that a process must hold while it changes or completes a journal.

    Args:
        source: nnUNet_raw/DatasetXXX_Name.
    """
    return Lock(source / ".label_journal.lock", f"a command that moves cases of {source.name}")


def prepare(source: Path) -> Path:
    """Return a new empty folder for the label files of a change, of which nothing is visible before `commit`."""
    partial = source / f"{_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted call, which has changed nothing
    partial.mkdir()
    return partial


def commit(
    source: Path,
    moves: Sequence[tuple[Path, Path]],
    contents: Mapping[Path, object],
    record: Mapping[str, Any],
) -> Path:
    """Write the journal of a change and apply it. After the journal is written, the change can only be completed.

    The caller must hold the lock and have called `prepare`.

    Args:
        source: nnUNet_raw/DatasetXXX_Name.
        moves: files to rename: old path, new path, in this order. Old paths can be in the folder of `prepare`.
        contents: JSON files to replace: path -> new content; None removes the file.
        record: content of the record of this change in label_history.

    Returns:
        The file of the record.
    """
    partial = source / f"{_FOLDER}.partial"
    final = source / _FOLDER
    history = source / HISTORY / f"{len(records(source)) + 1:03d}.json"
    journal = {
        "moves": [[str(final / old.name if old.parent == partial else old), str(new)] for old, new in moves],
        "contents": {str(path): content for path, content in contents.items()},
        "record": [str(history), dict(record)],
    }
    with replacing(partial / _FILE) as new:
        new.write_text(json.dumps(journal))
    os.replace(partial, final)
    _apply(source)
    return history


def finish_interrupted(source: Path) -> None:
    """Complete a change of a raw data set that was interrupted; do nothing if there is none.

    Args:
        source: nnUNet_raw/DatasetXXX_Name, which need not exist.

    Raises:
        UserError: another process is changing the data set, or the journal cannot be read or applied.
    """
    if is_interrupted(source):
        held = lock(source)
        held.acquire(wait=True)
        with closing(held):
            if is_interrupted(source):  # otherwise, the other process has completed it
                print(f"completing an interrupted move of cases in {source.name}")
                _apply(source)


def is_interrupted(source: Path) -> bool:
    """Return whether a raw data set has a change that must be completed."""
    return (source / _FOLDER).is_dir()


def records(source: Path) -> list[Path]:
    """Return the records of all completed changes, the oldest first."""
    return sorted((source / HISTORY).glob("[0-9][0-9][0-9].json"))


def _apply(source: Path) -> None:
    """Apply the journal; steps that have been done before are skipped, so that it can be repeated."""
    folder = source / _FOLDER
    failed = f"cannot complete the move of cases in {source}; fix the cause and run any command for this data set again"
    with explained((OSError, ValueError, KeyError), failed):
        journal = json.loads((folder / _FILE).read_text())
        for old, new in journal["moves"]:
            if Path(old).exists() or Path(old).is_symlink():
                if Path(new).exists():
                    raise UserError(f"{new} exists, and {old} would replace it; move one of both away")
                Path(new).parent.mkdir(parents=True, exist_ok=True)
                os.replace(old, new)
        for path, content in journal["contents"].items():
            if content is None:
                Path(path).unlink(missing_ok=True)
                continue
            with replacing(path) as partial:
                partial.write_text(json.dumps(content, indent=4))
        history, record = journal["record"]
        Path(history).parent.mkdir(exist_ok=True)
        with replacing(history) as partial:
            partial.write_text(json.dumps(record, indent=2))
        finished = source / f"{_FOLDER}.finished"
        shutil.rmtree(finished, ignore_errors=True)
        os.replace(folder, finished)
        shutil.rmtree(finished)
