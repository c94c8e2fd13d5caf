"""Journal of moves of cases between imagesUn and imagesTr, which is completed after an interruption.

A change of a raw data set consists of many renamings. It is first written to the folder .label_journal of the data set.
From then on, every command of this package that uses the data set completes it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from nnunet_dycon.errors import UserError, explained
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import replacing
from nnunet_dycon.system.locks import Lock

_FOLDER, _FILE = ".label_journal", "journal.json"
HISTORY = "label_history"  # folder with a record of each completed change


@contextmanager
def locked(source: Path, *, wait: bool = False) -> Iterator[None]:
    """Context in which only this process changes or completes a journal.

    Args:
        source: nnUNet_raw/DatasetXXX_Name.
        wait: if another process does so, wait until it has finished instead of raising an error.

    Raises:
        UserError: another process does so, and `wait` is False.
        OSError: the lock file cannot be written.
    """
    lock = Lock(source / ".label_journal.lock", f"a command that moves cases of {source.name}")
    lock.acquire(wait=wait)
    with closing(lock):
        yield


@contextmanager
def prepared(source: Path) -> Iterator[Path]:
    """Context with a new empty folder for the label files of a change. The folder is hidden until `commit`."""
    partial = source / f"{_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted call, which has changed nothing
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after `commit`, it has another name


def commit(
    source: Path,
    moves: Sequence[tuple[Path, Path]],
    contents: Mapping[Path, object],
    record: Mapping[str, Any],
) -> None:
    """Write the journal of a change and apply it. After the journal is written, the change can only be completed.

    The caller must hold the lock and be in the context of `prepared`.

    Args:
        source: nnUNet_raw/DatasetXXX_Name.
        moves: files to rename: old path, new path, in this order. Old paths can be in the folder of `prepared`.
        contents: JSON files to replace: path -> new content; None removes the file. Files in a folder that does not
            exist when the change is applied are skipped.
        record: content of the record of this change in label_history.

    Raises:
        UserError: a file does not exist or would be replaced, or a folder cannot be written to. Nothing is changed.
    """
    partial = source / f"{_FOLDER}.partial"
    _check(moves, contents)
    number = max((int(file.stem) for file in records(source)), default=0) + 1
    journal = {
        "moves": [[_named(old, source), _named(new, source)] for old, new in moves],
        "contents": [[_named(path, source), content] for path, content in contents.items()],
        "record": [number, dict(record)],
    }
    with replacing(partial / _FILE) as new:
        new.write_text(json.dumps(journal))
    os.replace(partial, source / _FOLDER)
    _apply(source)


def _roots(source: Path) -> dict[str, Path]:
    """Return the folders to which the paths in a journal are relative, so that the data set can be moved."""
    return {
        "journal": source / _FOLDER,
        "raw": source,
        "preprocessed": nnunet_folder("nnUNet_preprocessed") / source.name,
    }


def _named(path: Path, source: Path) -> list[str]:
    """Return a path as the name of a folder in `_roots` and the path relative to it."""
    if path.parent == source / f"{_FOLDER}.partial":
        return ["journal", path.name]
    root = "raw" if path.is_relative_to(source) else "preprocessed"
    return [root, str(path.relative_to(_roots(source)[root]))]


def _check(moves: Sequence[tuple[Path, Path]], contents: Mapping[Path, object]) -> None:
    """Raise UserError if a change could not be completed."""
    for old, new in moves:
        if not old.exists():
            raise UserError(f"{old} does not exist; restore it (nothing was changed)")
        if new.exists():
            raise UserError(f"{new} exists already; move it away (nothing was changed)")
        target = next(folder for folder in new.parents if folder.exists())
        if old.stat().st_dev != target.stat().st_dev:
            raise UserError(
                f"{old.parent} and {target} are on different file systems; move both to one (nothing was changed)"
            )
        for folder in (old.parent, target):
            _require_writable(folder)
    for path in contents:
        if path.parent.is_dir():
            _require_writable(path.parent)


def _require_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written to; change its permissions (nothing was changed)")


def finish_interrupted(source: Path) -> None:
    """Complete a change of a raw data set that was interrupted; do nothing if there is none.

    Args:
        source: nnUNet_raw/DatasetXXX_Name, which need not exist.

    Raises:
        UserError: another process is changing the data set, or the journal cannot be read or applied.
    """
    if is_interrupted(source):
        failed = f"{source} has an unfinished move of cases and cannot be written to; make it writable"
        with explained(OSError, failed), locked(source, wait=True):
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
        journal, roots = json.loads((folder / _FILE).read_text()), _roots(source)
        for old, new in ([roots[root] / name for root, name in move] for move in journal["moves"]):
            if old.exists():
                if new.exists():
                    raise UserError(f"{new} exists, and {old} would replace it; move one of both away")
                new.parent.mkdir(parents=True, exist_ok=True)
                os.replace(old, new)
            elif not new.exists():
                raise UserError(f"neither {old} nor {new} exists; restore one of both")
        for (root, name), content in journal["contents"]:
            path = roots[root] / name
            if content is None:
                path.unlink(missing_ok=True)
            elif path.parent.is_dir():
                with replacing(path) as partial:
                    partial.write_text(json.dumps(content, indent=4))
        number, record = journal["record"]
        (source / HISTORY).mkdir(exist_ok=True)
        with replacing(source / HISTORY / f"{number:03d}.json") as partial:
            partial.write_text(json.dumps(record, indent=2))
        finished = source / f"{_FOLDER}.finished"
        shutil.rmtree(finished, ignore_errors=True)
        os.replace(folder, finished)
        shutil.rmtree(finished)
