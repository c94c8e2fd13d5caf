"""The machine that fills the left-atrium table: what a run is, what is run again, and the trainers it names."""

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.la import CEILING, COLUMNS, Benchmark, Run
from nnunet_dycon.registry import TRAINERS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(tmp_path) -> Benchmark:
    return Benchmark(
        Namespace(
            work=tmp_path / "work", data=tmp_path, table=tmp_path / "la.csv", spacing=2.5, features=[16, 32],
            iterations=200, device="cpu", sets=["val"],
        )
    )  # fmt: skip


def test_a_method_names_its_trainer_settings_and_data_set():
    run = Run('nnUNetTrainerDyCON:uncl_weight=0.1,fecl_form="paper"', labels=4, seed=0)
    assert run.trainer == "nnUNetTrainerDyCON"
    assert run.settings == {"uncl_weight": 0.1, "fecl_form": "paper"}
    assert run.dataset == 104
    assert Run("floor", 8, 0).trainer == Run("ceiling", 8, 0).trainer == "nnUNetTrainer"
    assert Run("ceiling", 8, 0).dataset == 100 + CEILING


def test_protocols_share_held_out_cases_and_never_mix_roles():
    protocols = {count: json.loads((BENCHMARKS / "protocols" / f"la_{count}.json").read_text()) for count in (4, 8, 55)}
    for count, protocol in protocols.items():
        assert len(protocol["labeled"]) == count
        everything = [case for cases in protocol.values() for case in cases]
        assert len(everything) == len(set(everything)) == 55 + 8 + 16
        assert protocol["val"] == protocols[8]["val"]
        assert protocol["test"] == protocols[8]["test"]
    assert set(protocols[4]["labeled"]) < set(protocols[8]["labeled"])


def write_rows(benchmark: Benchmark, run: Run, weights: list[str]) -> None:
    scores = {"case": "a", "dice": 0.9, "hd95_mm_max_directed": 3.0}
    benchmark._append([benchmark._row(run, name, "val", scores) for name in weights])


def test_what_is_in_the_table_is_not_run_again(benchmark):
    floor, semi = Run("floor", 8, 0), Run("nnUNetTrainerMeanTeacher", 8, 0)
    assert not benchmark.is_done(floor)
    write_rows(benchmark, floor, ["student"])
    write_rows(benchmark, semi, ["student"])
    assert benchmark.is_done(floor)
    assert not benchmark.is_done(semi)  # the teacher is not scored yet
    assert not benchmark.is_done(Run("floor", 8, 1))
    assert not benchmark.is_done(Run("floor", 4, 0))
    with benchmark.table.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["weights"] for row in rows] == ["student", "student"]
    benchmark.iterations = 400  # another budget is another row
    assert not benchmark.is_done(floor)


def test_the_ceiling_is_one_row_whatever_the_labels(benchmark):
    write_rows(benchmark, Run("ceiling", 8, 0), ["student"])
    assert benchmark.is_done(Run("ceiling", 4, 0))


@pytest.mark.parametrize("method", ["floor", "nnUNetTrainerDyCON:entropy_weight=0.0"])
def test_nnunet_finds_the_trainers_with_their_budget_and_settings(tiny, benchmark, method):
    assert "nnUNetTrainerDyCON" in TRAINERS
    run = Run(method, 8, 3)
    benchmark.work.mkdir()
    benchmark.declare([run])
    code = f"""
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from tests.trainers.training import make_trainer
trainer = make_trainer(recursive_find_trainer_class_by_name({benchmark.name(run)!r}))
print(type(trainer).__name__, trainer.num_epochs * trainer.num_iterations_per_epoch, trainer.output_folder)
print(getattr(trainer, "method_settings", None))
"""
    environment = os.environ | {
        "nnUNet_extTrainer": str(BENCHMARKS / "trainers"),
        "NNUNET_DYCON_BENCHMARK_RUNS": str(benchmark.work / "runs.json"),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=BENCHMARKS.parent
    )
    assert result.returncode == 0, result.stderr[-2000:]
    *_, first, second = result.stdout.splitlines()
    assert first.startswith(f"{benchmark.name(run)} 200 ")
    assert f"{benchmark.name(run)}__nnUNetPlans__3d_fullres" in first
    assert ("entropy_weight=0.0" in second) == (method != "floor")
