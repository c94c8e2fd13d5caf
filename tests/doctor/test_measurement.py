"""Tests of doctor --measure: time and memory of real steps, and what is tried if memory does not suffice."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.cli import main
from nnunet_dycon.data.augmenters import Workers
from nnunet_dycon.doctor import measurement
from nnunet_dycon.doctor.findings import FAIL, OK, WARNING
from nnunet_dycon.errors import UserError
from nnunet_dycon.system.processes import exiting_on_sigterm
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from nnunet_dycon.training.preflight import with_memory_advice
from tests.processes import is_running
from tests.trainers.training import narrow

COMMAND = "-d 901 -f 0 --measure -device cpu -tr nnUNetTrainerMeanTeacher"


@pytest.fixture
def in_this_process(base, monkeypatch):
    """Measure fewer steps of a narrow network, in this process, which the test has patched."""
    narrow(base)

    def call(function, arguments, environment):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**environment, "nnUNet_n_proc_DA": os.environ["nnUNet_n_proc_DA"]}.items():
                patch.setenv(name, value)
            return function(*arguments)

    monkeypatch.setattr(measurement, "_in_process", call)
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 1)  # the number of threads
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
        assert its["quartiles"][0] <= its["seconds"] <= its["quartiles"][1]
        assert its["device"] == "cpu (1 thread)"
        assert its["steps"] == 3
        assert its["bytes"] > 2**27  # PyTorch alone has more
        assert sum(its["parts"].values()) == pytest.approx(its["seconds"], rel=0.9)
        hours = (250 * its["seconds"] + 50 * its["validation_step"]) / 3600
        assert its["hours"] == {"250": pytest.approx(250 * hours), "1000": pytest.approx(1000 * hours)}
    first, bottleneck, last, *_ = about_speed(printed)
    assert first["message"].startswith("nnUNetTrainerMeanTeacher on cpu (1 thread): ")
    assert "s per step of 2 labeled and 2 unlabeled patches (quartiles " in first["message"]
    assert bottleneck["status"] in (OK, WARNING)
    assert "nnUNetTrainerMeanTeacher takes" in last["message"]


@pytest.mark.parametrize(("quartiles", "is_unsteady"), [((0.9, 1.1), False), ((0.8, 1.3), True)])
def test_times_that_differ_much_are_called_rough(monkeypatch, quartiles, is_unsteady):
    result = measurement.Measurement("nnUNetTrainer", "cpu", 2, 0, 1.0, quartiles, {"step": 1.0}, 2.0, 0.1, 2**30, 9)
    monkeypatch.setattr(measurement, "_measured", lambda run, environment: result)
    monkeypatch.setattr(measurement, "_scratch_folders", lambda *arguments: {})
    plans = SimpleNamespace(plans={})
    cases = SimpleNamespace(plans=plans, configuration_name="2d", dataset_json={}, is_absent=lambda: True)
    monkeypatch.setattr(measurement, "trainer_class", lambda name: nnUNetTrainer)
    findings = list(measurement.examine_speed("other", cases, None, "cpu", []))
    assert ("differ much" in findings[-1].message) == is_unsteady


def test_batches_that_were_prepared_in_advance_are_not_measured():
    """A slow loader would be hidden: nnU-Net keeps two queues of batches, and each process holds one."""
    augmenter = Workers(None, None, 3, num_cached=4, seeds=None, pin_memory=False, is_ending=lambda: False)
    taken = []
    augmenter.__class__ = type("Counting", (Workers,), {"__next__": lambda self: taken.append(1)})
    measurement._drain(augmenter)
    assert len(taken) == 2 * 4 + 3
    measurement._drain(iter([]))  # in the process of the training, nothing is prepared


def test_lack_of_memory_is_recognized_in_the_error_of_a_trainer():
    @with_memory_advice
    def initialize(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = SimpleNamespace(configuration_manager=SimpleNamespace(batch_size=2), activation_memory_factor=1.0)
    with pytest.raises(SystemExit) as caught:
        initialize(trainer)
    assert measurement._lacks_memory(caught.value)
    assert not measurement._lacks_memory(SystemExit("nnunet_dycon: error: no unlabeled cases"))


def wait_and_never_answer(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


def measure_until_terminated(file: str) -> None:
    with exiting_on_sigterm():
        measurement._in_process(wait_and_never_answer, (file,), {})


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="requires /proc")
def test_the_measuring_process_ends_with_the_doctor(tmp_path):
    file = tmp_path / "process"
    doctor = multiprocessing.get_context("spawn").Process(target=measure_until_terminated, args=(str(file),))
    doctor.start()
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    doctor.terminate()
    doctor.join()
    assert doctor.exitcode == 128 + signal.SIGTERM
    assert not is_running(int(file.read_text()))


def test_waiting_for_data_is_named_as_the_bottleneck(tiny, in_this_process, no_look_up, capsys, monkeypatch):
    monkeypatch.setattr(measurement, "_SLOW_DATA", 0)
    monkeypatch.setattr(measurement, "get_allowed_n_proc_DA", lambda: 7)
    _, waits, *_ = about_speed(measured(capsys)[1])
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
    fault, usual, *_ = about_speed(printed)
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

    def take_no_time(trainer, batch):
        trainer._recorder.mark("step")
        return {"loss": 0.0}

    monkeypatch.setattr(nnUNetTrainer, "on_train_epoch_start", need_memory)
    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", take_no_time)
    monkeypatch.setattr(SemiSupervisedTrainer, "validation_step", take_no_time)
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


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="needs no GPU")
def test_missing_device_is_refused_at_once(capsys, device):
    assert main(["doctor", "-d", "901", "--measure", "-device", device]) == 2
    assert f"no {device.upper()} device is available" in capsys.readouterr().err


@pytest.mark.slow
def test_measurement_in_processes_of_their_own(tiny, no_look_up, capsys):
    code, printed = measured(capsys)
    assert code == 0
    assert [its["steps"] > 2 for its in printed["measurements"]] == [True, True]
