"""Trainings with torchrun on CPUs with gloo. They complete although worker processes are killed."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.run import run_training

from nnunet_dycon.errors import UsageError
from nnunet_dycon.launch import MARK, _own_device, _should_resume, main
from nnunet_dycon.training.checkpoints import KEY
from tests.launched.nnunet_dycon_test_trainers import EPOCHS, STEPS
from tests.processes import ONE_THREAD
from tests.trainers.training import narrow

ROOT = Path(__file__).parents[1]
LAUNCH = ["-m", "nnunet_dycon.launch", "901", "3d_fullres", "0", "-device", "cpu"]


@pytest.fixture
def results(tiny, monkeypatch) -> Path:
    """Return the results folder. The trainers of tests/launched are found, and each process uses one thread."""
    narrow(tiny / "nnUNet_preprocessed" / "Dataset901_Tiny")
    folder = str(ROOT / "tests" / "launched")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([os.environ["nnUNet_extTrainer"], folder]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", ONE_THREAD)
    return tiny / "nnUNet_results" / "Dataset901_Tiny"


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_of(output: str, attempt: int, rank: int) -> list[tuple[int, int]]:
    """Return epoch and number of each completed step."""
    found = re.findall(rf"attempt {attempt} rank {rank} epoch (\d+) step (\d+)", output)
    return [(int(epoch), int(step)) for epoch, step in found]


def test_training_completes_after_sigkill_and_sigterm_of_a_worker(results):
    """A checkpoint of an earlier training is renamed, and not resumed."""
    fold = results / "nnUNetTrainerHit__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").write_text("earlier training")
    run = start(
        torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "2", *LAUNCH, "-tr", "nnUNetTrainerHit")
    )
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    assert "checkpoint_final.pth, of an earlier training, is renamed to earlier_checkpoint_final.pth" in output
    # Killed after the first step of epoch 1: that epoch is trained again.
    assert steps_of(output, 0, rank=1) == [(0, 1), (0, 2), (0, 3), (1, 1)]
    # Stopped in the middle of epoch 2: both ranks end after the same step, and that epoch is trained again.
    for rank in (0, 1):
        assert steps_of(output, 1, rank) == [(1, 1), (1, 2), (1, 3), (2, 1)]
        assert steps_of(output, 2, rank) == [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]
    assert f"stopped by SIGTERM in epoch 2, after 2 of {STEPS} steps; checkpoint_latest.pth is written" in output
    assert output.count("training restarted by torchrun, resumed from a checkpoint") == 2
    final = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert final["current_epoch"] == EPOCHS
    assert int(final[KEY]["method"]["teacher"]["_extra_state"]) == EPOCHS * STEPS + 2  # two steps were repeated
    assert {len(curve) for curve in final[KEY]["curves"].values()} == {EPOCHS}
    assert {len(curve) for curve in final["logging"].values()} == {EPOCHS}
    assert not list(fold.glob("checkpoint_previous*"))


@pytest.mark.slow
def test_two_nodes_resume_after_sigkill_with_nnunets_own_trainer(results):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        end = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", end, "--local-addr", "127.0.0.1"]
    nodes = [start(torchrun(*options, *LAUNCH, "-tr", "nnUNetTrainerPlainHit")) for _ in range(2)]
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "training restarted by torchrun, resumed from a checkpoint" in "".join(outputs)
    fold = results / "nnUNetTrainerPlainHit__nnUNetPlans__3d_fullres" / "fold_0"
    assert torch.load(fold / "checkpoint_final.pth", weights_only=False)["current_epoch"] == EPOCHS
    assert (fold / "validation" / "summary.json").is_file()


# (restarted, --c, content of the file MARK, has a checkpoint; expected: resumes, renames the checkpoint)
STARTS = {
    "new": (False, False, None, False, False, False),
    "new, after another training": (False, False, "other", True, False, True),
    "new, with an equal torchrun ID": (False, False, "run", True, False, True),
    "with --c": (False, True, "other", True, True, False),
    "restarted": (True, False, "run", True, True, False),
    "restarted before its first checkpoint": (True, False, "run", False, False, False),
    "with --c, restarted before its first checkpoint": (True, True, "run", False, False, False),
    "restarted before its first step, after another training": (True, False, "other", True, False, True),
    "restarted before its first step, with --c": (True, True, None, True, True, False),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_restarted_training_resumes_from_its_own_checkpoints_only(tmp_path, monkeypatch, start):
    is_restarted, is_resume, mark, has_checkpoint, resumes, is_renamed = start
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    if mark is not None:
        (tmp_path / MARK).write_text(mark)
    if has_checkpoint:
        (tmp_path / "checkpoint_final.pth").touch()
    assert _should_resume(tmp_path, is_restarted, is_resume) == resumes
    assert (tmp_path / MARK).read_text() == "run"
    assert (tmp_path / "earlier_checkpoint_final.pth").is_file() == is_renamed
    assert (tmp_path / "checkpoint_final.pth").is_file() == (has_checkpoint and not is_renamed)


@pytest.fixture
def launched(monkeypatch):
    """launched(*arguments) calls main with these arguments, and returns its error message."""
    monkeypatch.setattr(run_training, "run_training", run_training.run_training)  # main replaces it

    def launch_with(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["launch", "901", "3d_fullres", "0", "-device", "cpu", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return str(end.value)

    return launch_with


def test_error_without_torchrun_contains_the_command(launched):
    line = launched()
    assert line.startswith(
        "nnunet_dycon: error: nnunet_dycon.launch was not started by torchrun; start it with torchrun"
    )
    assert "torchrun --nproc-per-node 2 -m nnunet_dycon.launch 101" in line
    assert "\n" not in line


def test_num_gpus_is_refused(launched, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "-num_gpus is not supported with torchrun; use torchrun's --nproc-per-node" in launched("-num_gpus", "2")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for variable, value in (("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="3 processes on a machine with 2 GPUs: each needs one; lower --nproc"):
        _own_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _own_device("cuda") == torch.device("cuda", 1)
