"""Tests of the comparison with pretraining: methods, commands, and the checkpoint in the layout of nnssl."""

import copy
from argparse import Namespace

import numpy as np
import pytest
import torch

from benchmarks import pretraining
from benchmarks.comparison import Benchmark, Run, compare
from benchmarks.preparation import LabeledSet, Preparation
from benchmarks.report import as_markdown, read
from nnunet_dycon.cli import main
from nnunet_dycon.pretraining.sources import read_source


@pytest.fixture
def benchmark(tmp_path) -> Benchmark:
    (tmp_path / "work").mkdir()
    return Benchmark(
        Namespace(
            work=tmp_path / "work", data=tmp_path, table=tmp_path / "a.csv", spacing=2.0, features=[16, 32],
            iterations=200, device="cpu", sets=["val"], precision="float32", weights="student",
        ),
        pretraining.DATA_SET,
    )  # fmt: skip


def test_checkpoint_can_be_adapted_to_the_same_plans(tiny, tmp_path, capsys):
    file = tmp_path / "new" / "mae.pth"
    losses = pretraining.pretrain("901", "nnUNetPlans", 3, file)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    plan = read_source(file).nnssl_plan
    assert (plan["key_to_encoder"], plan["key_to_stem"]) == ("encoder.stages", "encoder.stages.0")
    assert main(["adapt_weights", "-w", str(file), "-d", "901", "-o", str(tmp_path / "adapted.pth")]) == 0
    name = "encoder.stages.1.0.convs.0.conv.weight"
    both = [torch.load(each, weights_only=True)["network_weights"] for each in (file, tmp_path / "adapted.pth")]
    assert torch.equal(both[0][name], both[1][name])
    assert main(["adapt_weights", "--plans_like", str(file), "-d", "901"]) == 0


def test_patches_have_the_planned_size_and_three_quarters_are_hidden():
    rng = np.random.default_rng(0)
    for shape in ((1, 6, 30, 20), (1, 16, 16, 16)):
        image = rng.normal(size=shape).astype(np.float32)
        patch = pretraining._patch(image, [16, 16, 16], rng)
        assert patch.shape == (1, 16, 16, 16)
        assert set(patch.unique().tolist()) <= {0.0, *np.unique(image).tolist()}
    torch.manual_seed(0)
    hidden = pretraining._hidden(torch.Size([33, 32, 30]))
    assert hidden.shape == (1, 1, 33, 32, 30)
    assert hidden.float().mean() == pytest.approx(pretraining.HIDDEN, abs=0.05)
    assert hidden[..., :4, :4, :4].float().mean() in (0, 1)


def test_network_is_pretrained_and_adapted_once_for_all_seeds(benchmark, monkeypatch):
    commands = []

    def run(self, entry_point, *arguments, log):
        commands.append((entry_point, arguments))
        (self.work / arguments[arguments.index("-o") + 1]).touch()

    monkeypatch.setattr(Preparation, "command", run)
    files = [benchmark.pretrained(Run(f"{name}+mae10", LabeledSet(4), seed))
             for name in ("lower_bound", "nnUNetTrainerDyCON") for seed in (0, 1)]  # fmt: skip
    assert len(set(files)) == 2
    entries = [entry for entry, _ in commands]
    assert entries == ["benchmarks.pretraining:main", *["nnunet_dycon.cli:main"] * 2]
    assert commands[0][1][:6] == ("-d", "304", "-p", "nnUNetPlans_2mm_16_32f", "--steps", "10")
    assert "nnUNetTrainer" in commands[1][1]
    assert "nnUNetTrainerDyCON" in commands[2][1]


def test_all_default_methods_are_run_and_told_apart_in_the_csv(benchmark, monkeypatch, tmp_path):
    performed = []
    monkeypatch.setattr(Benchmark, "perform", lambda self, run: performed.append(run))
    monkeypatch.setattr(Benchmark, "prepare", lambda self, labels: None)
    options = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--table", str(benchmark.table)]
    compare(pretraining.DATA_SET, None, [*options, "--labels", "4", "--methods", *pretraining.METHODS])
    assert [run.pretraining_steps for run in performed] == [0, 1000, 0, 1000, 1000]
    assert [run.trainer for run in performed] == ["nnUNetTrainer"] * 2 + ["nnUNetTrainerWeakToStrong"] * 3
    assert performed[-1].settings == {"learning_rate_factor": 0.1, "warmup": 0.05}
    for number, run in enumerate(performed):
        scored = [
            {"case": case, "label": "a", "dice": 0.5 + 0.01 * number, "hd95_mm_max_directed": 3.0} for case in "ab"
        ]
        benchmark._append([benchmark._row(run, "student", "val", case, "abc") for case in scored])
    table = as_markdown(read(benchmark.table, "val"))
    assert all(f"| {method} |" in table or f"`{method}`" in table for method in pretraining.METHODS)
    assert not any(copy.copy(benchmark).missing(run) for run in performed)
