"""Tests of resuming, validation only (--val), pretrained weights, and checkpoints that cannot be resumed."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.nnUNetTrainerDyCON_adapted import nnUNetTrainerDyCON_adapted
from nnunet_dycon.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_dycon.trainers.nnUNetTrainerUGPL import nnUNetTrainerUGPL
from nnunet_dycon.training import checkpoints
from nnunet_dycon.training.checkpoints import KEY
from tests.tiny import set_environment
from tests.trainers.training import (
    METHODS,
    Interrupted,
    assert_same_weights,
    deterministic,
    draw_no_pictures,
    make_trainer,
    narrow,
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    draw_no_pictures(monkeypatch)


def interrupt_and_resume(base: type, epochs: int, after: int):
    short = deterministic(base, epochs)
    first = make_trainer(short)
    first.save_every = 1
    first.interrupt_before_epoch = after
    with pytest.raises(Interrupted):
        first.run_training()
    second = make_trainer(short)
    torch.manual_seed(99)  # other initial weights: all must come from the checkpoint
    maybe_load_checkpoint(second, continue_training=True, validation_only=False)
    assert second.current_epoch == after
    second.run_training()
    return second


@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_uninterrupted_training(tiny, train, name):
    narrow(tiny / "nnUNet_preprocessed" / "Dataset901_Tiny")
    base = trainer_class(name)
    whole = train(base, epochs=2)
    shutil.rmtree(whole.output_folder)  # otherwise its final checkpoint would be resumed
    resumed = interrupt_and_resume(base, epochs=2, after=1)
    assert_same_weights(resumed, whole)
    if whole.method.teacher is not None:
        assert resumed.method.teacher.updates == whole.method.teacher.updates == 6
    assert resumed.progress == whole.progress
    assert resumed.curves.keys() == whole.curves.keys()
    for curve, values in resumed.curves.items():
        assert len(values) == 2
        if not curve.startswith("seconds_"):
            np.testing.assert_array_equal(values, whole.curves[curve])
    logged = resumed.logger.get_checkpoint()
    assert {len(logged[name]) for name in ("train_losses", "val_losses", "mean_fg_dice", "lrs")} == {2}


def test_resume_does_not_overwrite_the_record_of_the_run(tiny):
    short = deterministic(nnUNetTrainerDyCON, 2)
    first = make_trainer(short)
    first.save_every = 1
    first.interrupt_before_epoch = 1
    with pytest.raises(Interrupted):
        first.run_training()
    record = Path(first.output_folder) / "nnunet_dycon.json"
    written = json.loads(record.read_text())
    assert written["method_settings"]["uncl_weight"] == 0.5
    assert written["cases"]["unlabeled"] == ["scan_00", "scan_01", "scan_02", "scan_03"]
    written["note"] = "first record"
    record.write_text(json.dumps(written))
    second = make_trainer(short)
    maybe_load_checkpoint(second, continue_training=True, validation_only=False)
    second.run_training()
    assert json.loads(record.read_text()) == written


def test_progress_is_the_fraction_of_steps_done(tiny):
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON, 4))
    assert trainer.progress == 0
    trainer.current_epoch, trainer._step_in_epoch = 2, 1
    assert trainer.progress == pytest.approx((2 * 3 + 1) / (4 * 3))


def test_pretrained_weights_are_copied_to_the_teacher(tiny, train):
    """nnU-Net loads them after initialize, when the teacher already exists."""
    pretrained = train(nnUNetTrainerMeanTeacher, epochs=1)
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    file = Path(pretrained.output_folder) / "checkpoint_final.pth"
    maybe_load_checkpoint(trainer, False, False, str(file))
    trainer.on_train_start()
    student = trainer.network.state_dict()
    own = pretrained.network.state_dict()
    loaded = [key for key in own if torch.equal(student[key], own[key])]
    assert len(loaded) > len(own) / 2  # nnU-Net excludes the segmentation layers
    torch.testing.assert_close(trainer.method.teacher.network.state_dict(), student, rtol=0, atol=0)
    assert trainer.method.teacher.updates == 0


def test_validation_only_requires_no_unlabeled_cases(tiny, train):
    trained = train(epochs=1)
    for folder in (tiny / "nnUNet_preprocessed" / "Dataset901_Tiny").glob("*_unlabeled*"):
        folder.rename(folder.with_name(f"away_{folder.name}"))
    again = make_trainer(deterministic(nnUNetTrainerDyCON, 1))
    maybe_load_checkpoint(again, continue_training=False, validation_only=True)
    assert_same_weights(again, trained)


def test_checkpoint_of_another_trainer_raises(tiny, train):
    other = train(nnUNetTrainerMeanTeacher, epochs=1)
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    file = str(Path(other.output_folder) / "checkpoint_final.pth")
    with pytest.raises(SystemExit, match="was written by nnUNetTrainerMeanTeacher_deterministic"):
        trainer.load_checkpoint(file)


def test_damaged_checkpoint_raises(tiny, train):
    file = Path(train(epochs=1).output_folder) / "checkpoint_final.pth"
    for content in (file.read_bytes()[:5000], b"no checkpoint", b""):
        file.write_bytes(content)
        with pytest.raises(SystemExit, match=r"checkpoint_final.pth cannot be loaded"):
            make_trainer(deterministic(nnUNetTrainerDyCON)).load_checkpoint(str(file))


def change_temperature(checkpoint: dict) -> None:
    checkpoint[KEY]["settings"]["method_settings"]["temperature"] = 0.1


def remove_mixing(checkpoint: dict) -> None:
    """Simulate a checkpoint from before the setting existed."""
    del checkpoint[KEY]["settings"]["method_settings"]["mixing"]


def remove_teacher(checkpoint: dict) -> None:
    del checkpoint[KEY]["method"]["teacher"]


def remove_head(checkpoint: dict) -> None:
    del checkpoint[KEY]["method"]["head"]


def remove_second(checkpoint: dict) -> None:
    del checkpoint[KEY]["method"]["second"]


def swap_second(checkpoint: dict) -> None:
    checkpoint[KEY]["method"]["second"] = checkpoint["network_weights"]


def narrow_network(checkpoint: dict) -> None:
    name, weight = next(iter(checkpoint["network_weights"].items()))
    checkpoint["network_weights"][name] = weight[:2]


# Change of the checkpoint, error message, and trainer unless it is nnUNetTrainerDyCON.
CHECKPOINTS = {
    "other settings": (
        change_temperature,
        "was trained with other settings: temperature 0.1 .now 0.6.; change them back to resume, or train a subclass",
    ),
    "missing setting": (
        remove_mixing,
        "was trained with other settings: mixing None .now cutmix.; change them back to resume",
        nnUNetTrainerDyCON_adapted,
    ),
    "no teacher": (
        remove_teacher,
        "latest.pth lacks the saved state of the module teacher, which .* needs to resume; start from its weights with",
    ),
    "no head": (
        remove_head,
        "latest.pth lacks the saved state of the module head, which .* needs to resume; start from its",
    ),
    "no second network": (
        remove_second,
        "latest.pth lacks the saved state of the module second, which .* needs to resume; start from its weights with",
        nnUNetTrainerUGPL,
    ),
    "another second network": (
        swap_second,
        "latest.pth does not fit the networks; perhaps the plans have changed",
        nnUNetTrainerUGPL,
    ),
    "other plans": (
        narrow_network,
        "latest.pth does not fit the networks; perhaps the plans have changed; start from its weights with",
    ),
    "another version": (
        lambda checkpoint: checkpoint[KEY].pop("settings"),
        "latest.pth was written by nnUNetTrainerDyCON_deterministic of nnunet-dycon .*, which this version cannot",
    ),
    "0.1": (
        lambda checkpoint: checkpoint[KEY].update(version="0.1.0"),
        "latest.pth was written by nnUNetTrainerUGPL_deterministic of nnunet-dycon 0.1.0, which this version cannot "
        "resume; start from its weights with -pretrained_weights",
        nnUNetTrainerUGPL,
    ),
    "no state of the optimizer": (
        lambda checkpoint: checkpoint.pop("optimizer_state"),
        "latest.pth does not fit the networks; perhaps the plans have changed; start from its weights with",
    ),
}


@pytest.fixture(scope="module")
def interrupted(tiny_root, tmp_path_factory) -> Callable[[type], Path]:
    """Return interrupted(trainer), which returns a data set with a training that was killed after one epoch.

    Do not modify the data set.
    """
    roots: dict[type, Path] = {}

    def root_of(base: type) -> Path:
        if base not in roots:
            roots[base] = tmp_path_factory.mktemp("interrupted") / "tiny"
            shutil.copytree(tiny_root, roots[base])
            with pytest.MonkeyPatch.context() as patch:
                set_environment(patch, roots[base])
                draw_no_pictures(patch)
                first = make_trainer(deterministic(base, 2))
                first.save_every, first.interrupt_before_epoch = 1, 1
                with pytest.raises(Interrupted):
                    first.run_training()
        return roots[base]

    return root_of


@pytest.mark.parametrize("fault", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoint_that_cannot_be_resumed_raises_and_is_unchanged(interrupted, tmp_path, monkeypatch, fault):
    change, message, base = (*fault, nnUNetTrainerDyCON)[:3]
    root = shutil.copytree(interrupted(base), tmp_path / "tiny")
    set_environment(monkeypatch, root)
    second = make_trainer(deterministic(base, 2))
    file = Path(second.output_folder) / "checkpoint_latest.pth"
    checkpoint = torch.load(file, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, file)
    before = file.read_bytes()

    def resume():
        maybe_load_checkpoint(second, continue_training=True, validation_only=False)
        second.run_training()

    with pytest.raises(SystemExit, match=message) as stopped:
        resume()
    assert "\n" not in str(stopped.value)
    assert file.read_bytes() == before


def test_resume_with_more_epochs_logs_a_warning(tiny):
    first = make_trainer(deterministic(nnUNetTrainerDyCON, 2))
    first.save_every, first.interrupt_before_epoch = 1, 1
    with pytest.raises(Interrupted):
        first.run_training()
    second = make_trainer(deterministic(nnUNetTrainerDyCON, 3))
    maybe_load_checkpoint(second, continue_training=True, validation_only=False)
    second.run_training()
    assert second.current_epoch == 3
    logs = "".join(file.read_text() for file in Path(second.output_folder).glob("training_log*"))
    assert "WARNING: the resumed training had other settings: num_epochs 2 (now 3)" in logs


def test_validation_only_ignores_changed_settings(tiny, train):
    file = Path(train(epochs=1).output_folder) / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    change_temperature(checkpoint)
    torch.save(checkpoint, file)
    again = make_trainer(deterministic(nnUNetTrainerDyCON, 1))
    maybe_load_checkpoint(again, continue_training=False, validation_only=True)
    again.perform_actual_validation()
    assert (file.parent / "validation" / "summary.json").is_file()


def test_full_disk_at_the_end_of_training_can_be_resumed(tiny, monkeypatch):
    """The checkpoint of the student has been written by then. Resuming writes that of the teacher, too."""
    short = deterministic(nnUNetTrainerDyCON, 1)
    first = make_trainer(short)
    teacher = Path(first.output_folder) / "checkpoint_final_teacher.pth"
    save = checkpoints.save_companions

    def save_on_a_full_disk(*arguments):
        teacher.with_name(f".{teacher.name}.00000000.partial").symlink_to("/dev/full")
        patch.setattr(uuid, "uuid4", lambda: UUID(int=0))
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_companions", save_on_a_full_disk)
        with pytest.raises(SystemExit, match=r"checkpoint_final_teacher.pth cannot be written.* --c"):
            first.run_training()
    second = make_trainer(short)
    maybe_load_checkpoint(second, continue_training=True, validation_only=False)
    second.run_training()
    assert teacher.is_file()


def test_checkpoints_can_be_loaded_with_weights_only(tiny, train):
    """Other objects would require this package when nnUNetv2_predict loads the file."""
    folder = Path(train(epochs=1).output_folder)
    own = torch.load(folder / "checkpoint_final.pth", weights_only=False)[KEY]
    torch.save(own, folder / "own.pth")
    torch.load(folder / "own.pth", weights_only=True)
    teacher = torch.load(folder / "checkpoint_final_teacher.pth", weights_only=False)
    assert "optimizer_state" not in teacher
    assert not list(folder.glob(".*partial"))
