"""Tests that a process killed before any change of a file leaves the old or new state, which the next run completes."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nnunet_dycon.data.unlabeled import UnlabeledCases, preprocess_unlabeled
from nnunet_dycon.system.files import replacing
from nnunet_dycon.training import checkpoints
from tests.dataset_conversion.sources import convert, image, label, stems, write
from tests.tiny import tiny_volume, write_volume

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
_WRITES = os.O_WRONLY | os.O_RDWR


def _is_change(event: str, arguments: tuple) -> bool:
    if event == "open":
        file, _, flags = arguments
        return isinstance(file, (str, os.PathLike)) and bool((flags or 0) & _WRITES) and os.fspath(file) != os.devnull
    return event in _CHANGES


def is_killed(change: int, work: Callable[[], object]) -> bool:
    """Run `work` in a forked process, and kill it with SIGKILL before a change of the file system.

    Args:
        change: number of the change, from 0: creating, opening for writing, renaming or removing a file or folder.
        work: function to run.

    Returns:
        True, or False if there are fewer changes, so that `work` was completed.
    """
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0
        return False
    left = change

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if _is_change(event, arguments):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    code = 1
    try:
        sys.addaudithook(hook)
        work()
        code = 0
    finally:
        os._exit(code)


def kills(restore: Callable[[], object], work: Callable[[], object]) -> Iterator[int]:
    """Yield the number of a change after each run of `work` that was killed before this change."""
    for change in range(1000):
        restore()
        if not is_killed(change, work):
            return
        yield change
    raise AssertionError("work does not end")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_replaced_file_is_old_or_new(tmp_path):
    file = tmp_path / "a.json"
    seen = set()

    def work():
        with replacing(file) as partial:
            partial.write_text("new")

    for _ in kills(lambda: file.write_text("old"), work):
        seen.add(file.read_text())
    assert file.read_text() == "new"
    assert seen == {"old", "new"}


def test_checkpoint_can_be_resumed_after_a_kill(tmp_path):
    folder = tmp_path / "fold_0"
    state = {"settings": {}, "method": {}, "curves": {}}

    def save(epoch: int) -> None:
        content = {"trainer_name": "nnUNetTrainerX", "current_epoch": epoch, "network_weights": {}}
        checkpoints.save_extended(folder / checkpoints.LATEST, lambda file: torch.save(content, file), state)

    def restore():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save(1)
        save(2)

    kinds = set()
    for _ in kills(restore, lambda: save(3)):
        log = []
        file = checkpoints.find_readable(str(folder / checkpoints.LATEST), log.append)
        previous = checkpoints.read(folder / checkpoints.PREVIOUS)
        kinds.add((checkpoints.read(file)["current_epoch"], previous["current_epoch"]))
        assert not log
    assert kinds == {(2, 1), (2, 2), (3, 2)}


def test_conversion_is_absent_or_complete_after_a_kill_and_can_be_repeated(tmp_path, monkeypatch):
    raw, source = tmp_path / "raw", tmp_path / "scans"
    target = raw / "Dataset101_Own"
    monkeypatch.setenv("nnUNet_raw", str(raw))
    for number, case in enumerate("ac"):
        write(source / "images" / f"{case}.nii.gz", image(number))
        if case != "c":
            write(source / "masks" / f"{case}.nii.gz", label())
    options = ("--channel", "CT=images/{case}.nii.gz", "--masks", "masks/{case}.nii.gz")

    def work():
        assert convert("folder", source, *options) == 0

    def restore():
        for entry in raw.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def files() -> set[str]:
        names = {name for name in contents(target) if not name.startswith(".")}
        return names - {"conversion_overlay.png"}

    work()
    expected, dataset_json = files(), (target / "dataset.json").read_bytes()
    states = set()
    for change in kills(restore, work):
        states.add(target.exists())
        if target.exists():
            assert files() == expected
            continue
        if change % 4:  # each repetition takes a part of a second
            continue
        work()
        assert files() == expected
        assert (target / "dataset.json").read_bytes() == dataset_json
        assert stems(target / "labelsTr") == ["a"]
        assert not list(raw.glob(".Dataset101*.partial"))
    assert states == {False, True}


def test_preprocessed_folder_is_old_or_new_after_a_kill(tiny, base, raw):
    """The unlabeled cases are preprocessed again because an image was added."""
    shutil.rmtree(raw / "imagesUn")
    for number in range(2):
        write_volume(tiny_volume(number)[0], raw / "imagesUn" / f"scan_0{number}_0000.nii.gz")
    folder = preprocess_unlabeled("901", "3d_fullres")
    before = tiny.with_name("before")
    shutil.copytree(folder, before)
    old = contents(before)
    write_volume(tiny_volume(7)[0], raw / "imagesUn" / "scan_07_0000.nii.gz")

    def cases() -> UnlabeledCases:
        return UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans")

    def restore():
        for entry in base.glob(f"{folder.name}*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(before, folder)

    def work():
        preprocess_unlabeled("901", "3d_fullres")

    seen = set()
    for number in kills(restore, work):
        if not folder.is_dir():
            (kept,) = base.glob(f"{folder.name}.*.replaced")  # between the two renamings
            assert contents(kept) == old
            seen.add("renamed")
        elif contents(folder) == old:
            seen.add("old")
        else:
            assert cases().fault() is None
            assert json.loads(cases().manifest_file.read_text())["files"].keys() == {"scan_00", "scan_01", "scan_07"}
            seen.add("new")
        if number % 5 == 0 or "renamed" in seen:  # each repetition takes a second
            work()
            assert cases().fault() is None
            assert {entry.name for entry in base.glob(f"{folder.name}*") if entry.is_dir()} == {folder.name}
    assert seen == {"old", "renamed", "new"}
