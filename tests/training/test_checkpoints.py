"""Tests of checkpoints: complete writes, damaged files, and files of another trainer, version or network."""

import os
import uuid
from pathlib import Path
from uuid import UUID

import pytest
import torch
from torch import nn

from nnunet_dycon import __version__
from nnunet_dycon.errors import UserError
from nnunet_dycon.training import checkpoints
from nnunet_dycon.training.checkpoints import KEY, LATEST, PREVIOUS, STUDENT, Damaged

STATE = {"settings": {"method_settings": {"beta": 5.0}}, "method": {"teacher": {}}, "curves": {"loss": [1.0]}}


def save_nnunets(trainer: str = "nnUNetTrainerX"):
    """Return a function that writes a minimal checkpoint of nnU-Net."""
    content = {"trainer_name": trainer, "network_weights": {"weight": torch.ones(3)}, "optimizer_state": {}}
    return lambda filename: torch.save(content, filename)


@pytest.fixture
def latest(tmp_path) -> Path:
    file = tmp_path / LATEST
    checkpoints.save_extended(file, save_nnunets(), STATE)
    return file


def test_additional_state_is_stored_under_one_key_with_the_version(latest):
    content = torch.load(latest, weights_only=True)
    assert content[KEY] == {"version": __version__, **STATE}
    assert content["network_weights"]["weight"].tolist() == [1, 1, 1]
    assert checkpoints.load_state(latest, "nnUNetTrainerX") == content[KEY]


def test_latest_checkpoint_becomes_the_previous_one(latest):
    first = latest.read_bytes()
    checkpoints.save_extended(latest, save_nnunets("nnUNetTrainerY"), STATE)
    assert latest.with_name(PREVIOUS).read_bytes() == first
    assert latest.read_bytes() != first


def fill_disk(monkeypatch):
    """Make the second of the two writes of a checkpoint fail."""
    save, calls = torch.save, []

    def fail(content, target, *arguments):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(content, target, *arguments)

    monkeypatch.setattr(torch, "save", fail)


def test_failed_write_keeps_the_old_file(latest, monkeypatch):
    before = latest.read_bytes()
    fill_disk(monkeypatch)
    with pytest.raises(
        UserError, match=r"latest.pth cannot be written, and the previous file is unchanged; .* --c .*No s"
    ):
        checkpoints.save_extended(latest, save_nnunets(), STATE)
    assert latest.read_bytes() == before
    assert [file.name for file in latest.parent.iterdir()] == [LATEST]


def test_full_disk_keeps_the_old_file(latest, monkeypatch):
    before = latest.read_bytes()
    monkeypatch.setattr(uuid, "uuid4", lambda: UUID(int=0))
    latest.with_name(f".{LATEST}.00000000.partial").symlink_to("/dev/full")  # every write to it fails
    with pytest.raises(UserError, match=r"latest.pth cannot be written, and the previous file is unchanged") as full:
        checkpoints.save_extended(latest, save_nnunets(), STATE)
    assert "\n" not in str(full.value)
    assert latest.read_bytes() == before
    assert not list(latest.parent.glob(".*partial"))


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_bits(content: bytes) -> bytes:
    """Change a byte of the weights."""
    index = content.index(torch.ones(3).numpy().tobytes())
    return content[:index] + b"\xff" + content[index + 1 :]


DAMAGES = {
    "truncated": truncate,
    "flipped bits": flip_bits,
    "zeros": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "text": lambda content: b"no checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_newest_readable_checkpoint_is_used_instead_of_a_damaged_one(latest, damage):
    whole = latest.read_bytes()
    for age, name in enumerate((PREVIOUS, "checkpoint_best.pth")):
        latest.with_name(name).write_bytes(whole)
        os.utime(latest.with_name(name), (1000 - age, 1000 - age))
    lines = []
    assert checkpoints.find_readable(str(latest), lines.append) == str(latest)
    latest.write_bytes(damage(whole))
    assert checkpoints.find_readable(str(latest), lines.append) == str(latest.with_name(PREVIOUS))
    (line,) = lines
    assert "checkpoint_latest.pth cannot be loaded" in line
    assert line.endswith(f"Trying {PREVIOUS} instead, the newest of the other checkpoints")
    latest.with_name(PREVIOUS).write_bytes(damage(whole))
    assert checkpoints.find_readable(str(latest), lines.append) == str(latest.with_name("checkpoint_best.pth"))
    latest.with_name("checkpoint_best.pth").write_bytes(damage(whole))
    with pytest.raises(Damaged, match=r"\w+.pth cannot be loaded \(.*; replace it with another checkpoint") as damaged:
        checkpoints.find_readable(str(latest), lines.append)
    assert "\n" not in str(damaged.value)
    with pytest.raises(Damaged, match=r"latest.pth cannot be loaded"):
        checkpoints.load_state(latest, "nnUNetTrainerX")


OTHER_CHECKPOINTS = {
    "another trainer": ({}, "nnUNetTrainerY", "was written by nnUNetTrainerX, so nnUNetTrainerY cannot resume from it"),
    "nnU-Net's": ({KEY: None}, "nnUNetTrainerX", "was written by nnUNetTrainerX, so nnUNetTrainerX cannot resume"),
    "0.1": (
        {KEY: {"version": "0.1.0", **STATE}},
        "nnUNetTrainerX",
        "was written by nnUNetTrainerX of nnunet-dycon 0.1.0, which this version cannot resume; start from its weights "
        "with -pretrained_weights, or finish",
    ),
    "missing part": (
        {KEY: {"version": "0.2.0", "method": {}}},
        "nnUNetTrainerX",
        "was written by nnUNetTrainerX of nnunet-dycon 0.2.0, which this version cannot resume",
    ),
    "state of another type": ({KEY: []}, "nnUNetTrainerX", "of nnunet-dycon unknown, which this version cannot resume"),
}


@pytest.mark.parametrize("other", OTHER_CHECKPOINTS.values(), ids=OTHER_CHECKPOINTS.keys())
def test_checkpoint_of_another_trainer_or_version_raises(latest, other):
    changes, trainer, message = other
    content = {**torch.load(latest, weights_only=True), **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, latest)
    with pytest.raises(UserError, match=message) as refused:
        checkpoints.load_state(latest, trainer)
    assert "-pretrained_weights" in str(refused.value)


def method() -> nn.Module:
    module = nn.Module()
    module.teacher, module.head = nn.Linear(2, 3), nn.Linear(3, 1)
    return module


def test_state_of_each_module_of_a_method_is_restored():
    one, other = method(), method()
    checkpoints.load_method_state(other, checkpoints.method_state(one), "file", "nnUNetTrainerX")
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)


def test_state_does_not_contain_names_of_wrappers():
    one = method()
    one.teacher = torch.compile(one.teacher, backend="eager")
    assert checkpoints.method_state(one)["teacher"].keys() == {"weight", "bias"}


def test_missing_state_of_a_module_raises():
    state = checkpoints.method_state(method())
    del state["head"]
    message = (
        "latest.pth lacks the saved state of the module head, which nnUNetTrainerX needs to resume; start from its wei"
    )
    with pytest.raises(UserError, match=message):
        checkpoints.load_method_state(method(), state, "latest.pth", "nnUNetTrainerX")


def test_state_of_another_shape_raises():
    state = checkpoints.method_state(method())
    state["head"] = nn.Linear(4, 4).state_dict()
    with (
        pytest.raises(UserError, match=r"latest.pth does not fit the networks; perhaps the plans have changed; start"),
        checkpoints.fitting("latest.pth"),
    ):
        checkpoints.load_method_state(method(), state, "latest.pth", "nnUNetTrainerX")


def test_companions_are_written_and_the_previous_checkpoint_is_removed(latest):
    latest.rename(latest.with_name(STUDENT))
    latest.with_name(PREVIOUS).touch()
    teacher = nn.Linear(2, 3)
    checkpoints.save_companions(latest.parent, {checkpoints.TEACHER: ("nnUNetTrainerTeacher", teacher)})
    content = torch.load(latest.with_name(checkpoints.TEACHER), weights_only=True)
    assert content.keys() == {"trainer_name", "network_weights"}
    assert content["trainer_name"] == "nnUNetTrainerTeacher"
    torch.testing.assert_close(content["network_weights"], dict(teacher.state_dict()))
    assert {file.name for file in latest.parent.iterdir()} == {STUDENT, checkpoints.TEACHER}


def test_checkpoints_of_an_earlier_training_are_renamed(latest):
    lines = []
    checkpoints.set_aside(latest.parent, lines.append)
    assert [file.name for file in latest.parent.iterdir()] == [f"earlier_{LATEST}"]
    assert lines == [f"{latest}, of an earlier training, is renamed to earlier_{LATEST}"]
