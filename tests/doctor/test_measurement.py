"""Tests of doctor --measure: time and memory of real steps, and what is tried if memory does not suffice."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.cli import main
from nnunet_dycon.doctor import measurement
from nnunet_dycon.doctor.findings import FAIL, OK, WARNING
from nnunet_dycon.errors import UserError
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer

COMMAND = "-d 901 -f 0 --measure -device cpu -tr nnUNetTrainerMeanTeacher"


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure fewer steps, in this process, which the test has patched."""

    def call(function, arguments, environment):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**environment, "nnUNet_n_proc_DA": os.environ["nnUNet_n_proc_DA"]}.items():
                patch.setenv(name, value)
            return function(*arguments)

    monkeypatch.setattr(measurement, "_in_process", call)
    monkeypatch.setattr(measurement, "_WARM_UP", 1)
    monkeypatch.setattr(measurement, "_MAX_STEPS", 3)


def measured(capsys, arguments: str = COMMAND) -> tuple[int, dict]:
    code = main(["doctor", "--json", *arguments.split()])
    return code, json.loads(capsys.readouterr().out)


def modified(folder: Path) -> dict[Path, int]:
    """Return the time of the last change of each file in a folder."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def about_speed(printed: dict) -> list[dict]:
    return [finding for finding in printed["findings"] if finding["check"] == "speed"]


def test_time_and_memory_of_both_trainers_are_reported_and_no_file_is_written(
    tiny, in_this_process, no_look_up, capsys
):
    before = modified(tiny)
    code, printed = measured(capsys)
    assert code == 0
    assert modified(tiny) == before
    own, usual = printed["measurements"]
    assert [own["trainer"], usual["trainer"]] == ["nnUNetTrainerMeanTeacher", "nnUNetTrainer"]
    assert (own["labeled"], own["unlabeled"], usual["unlabeled"]) == (2, 2, 0)
    assert own["parts"].keys() == {"data", "teacher", "student", "losses", "backward", "update"}
    assert usual["parts"].keys() == {"data", "step"}
    for its in (own, usual):
        assert its["steps"] == 3
        assert its["bytes"] > 2**27  # PyTorch alone has more
        assert sum(its["parts"].values()) == pytest.approx(its["seconds"], rel=0.9)
        hours = (250 * its["seconds"] + 50 * its["validation_step"]) / 3600
        assert its["hours"] == {"250": pytest.approx(250 * hours), "1000": pytest.approx(1000 * hours)}
    first, bottleneck, last = about_speed(printed)
    assert first["message"].startswith("nnUNetTrainerMeanTeacher on cpu: ")
    assert "s per step of 2 labeled and 2 unlabeled patches (data " in first["message"]
    assert bottleneck["status"] in (OK, WARNING)
    assert "nnUNetTrainerMeanTeacher takes" in last["message"]


def test_waiting_for_data_is_named_as_the_bottleneck(tiny, in_this_process, no_look_up, capsys, monkeypatch):
    monkeypatch.setattr(measurement, "_SLOW_DATA", 0)
    monkeypatch.setattr(measurement, "get_allowed_n_proc_DA", lambda: 7)
    _, waits, _ = about_speed(measured(capsys)[1])
    assert waits["status"] == WARNING
    assert "with 7 processes that prepare batches" in waits["message"]
    assert "nnUNet_n_proc_DA" in waits["remedy"]


def test_fewer_unlabeled_patches_are_tried_before_they_are_recommended(
    tiny, in_this_process, no_look_up, capsys, monkeypatch
):
    step = SemiSupervisedTrainer.train_step

    def need_memory(trainer, batch):
        if trainer.unlabeled_batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(trainer, batch)

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", need_memory)
    code, printed = measured(capsys)
    fault, usual = about_speed(printed)
    assert code == 1
    assert (fault["status"], fault["message"]) == (FAIL, "nnUNetTrainerMeanTeacher: the memory does not suffice")
    assert fault["remedy"].startswith("train a subclass with unlabeled_batch_size=1 (tried: ")
    assert usual["message"].startswith("nnUNetTrainer on cpu")


def test_smaller_plans_are_tried_before_they_are_recommended(tiny, in_this_process, no_look_up, capsys, monkeypatch):
    start = nnUNetTrainer.on_train_epoch_start

    def need_memory(trainer):
        if trainer.plans_manager.plans_name != "ExperimentPlanner_4GB":
            raise RuntimeError("MPS backend out of memory")
        start(trainer)

    monkeypatch.setattr(nnUNetTrainer, "on_train_epoch_start", need_memory)
    before = modified(tiny)
    fault, usual = about_speed(measured(capsys)[1])
    assert modified(tiny) == before
    assert "-pl ExperimentPlanner -gpu_memory_target 4 -overwrite_plans_name ExperimentPlanner_4GB" in fault["remedy"]
    assert "-plans_name ExperimentPlanner_4GB -c 3d_fullres, and train with -p ExperimentPlanner_4GB" in fault["remedy"]
    assert usual["message"] == "nnUNetTrainer: the memory does not suffice either"


def test_nothing_is_measured_if_training_would_fail(tiny, no_look_up, capsys):
    code, printed = measured(capsys, "-d 901 -c 3d_lowres --measure -device cpu")
    (finding,) = about_speed(printed)
    assert (code, printed["measurements"]) == (1, [])
    assert finding["message"] == "not measured, because training would fail"


def test_nothing_is_measured_before_the_unlabeled_cases_are_preprocessed(tiny, base, no_look_up, capsys):
    (base / "nnUNetPlans_3d_fullres_unlabeled").rename(base / "nnUNetPlans_3d_fullres_unlabeled.partial")
    before = modified(tiny)
    (finding,) = about_speed(measured(capsys)[1])
    assert finding["message"] == "not measured, because the unlabeled cases are not preprocessed yet"
    assert finding["remedy"] == "run: nnunet_dycon preprocess_unlabeled -d 901 -c 3d_fullres"
    assert modified(tiny) == before


def test_a_process_that_is_killed_has_too_little_memory():
    assert measurement._in_process(signal.raise_signal, (signal.SIGKILL,), {}) is None


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (os._exit, (9,), "it ended with exit code 9"),
        (sys.exit, ("nnunet_dycon: error: too few cases",), "measured: too few cases"),
        (int, ("x",), "ValueError: invalid literal"),
    ],
)
def test_other_errors_of_the_process_are_shown(function, arguments, message):
    with pytest.raises(UserError, match=message):
        measurement._in_process(function, arguments, {})


@pytest.mark.parametrize(
    ("arguments", "message"), [("--measure", "--measure needs a data set"), ("-d 901 -device cpu", "add --measure")]
)
def test_options_that_contradict_each_other_are_refused(tiny, capsys, arguments, message):
    assert main(["doctor", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_measurement_in_processes_of_their_own(tiny, no_look_up, capsys):
    code, printed = measured(capsys)
    assert code == 0
    assert [its["steps"] > 2 for its in printed["measurements"]] == [True, True]
