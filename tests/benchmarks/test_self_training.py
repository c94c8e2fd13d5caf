"""Tests of comparisons with rounds of self-training."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.comparison import Benchmark, Run
from benchmarks.hippocampus import HIPPOCAMPUS
from benchmarks.preparation import LabeledSet, Preparation

CHAIN = Run("nnUNetTrainerWeakToStrong+rounds2:weight=1.0", LabeledSet(4), 3)


@pytest.fixture
def benchmark(tmp_path) -> Benchmark:
    return Benchmark(
        Namespace(
            work=tmp_path, data=tmp_path, table=tmp_path / "a.csv", spacing=2.0, features=[16, 32], iterations=200,
            device="cpu", sets=["val"], precision="float32", weights="student",
        ),
        HIPPOCAMPUS,
    )  # fmt: skip


@pytest.fixture
def commands(monkeypatch) -> list[tuple[str, ...]]:
    """Commands of the benchmark, which are recorded instead of run. A training only writes its checkpoint."""
    recorded = []

    def command(self: Benchmark, entry_point: str, *arguments: str, log: str) -> None:
        recorded.append((entry_point.rpartition(":")[2], *arguments))
        if "run_training" in entry_point:
            model = self.work / "nnUNet_results" / arguments[0] / f"{arguments[4]}__{self.plans}__3d_fullres"
            (model / "fold_all").mkdir(parents=True)
            (model / "fold_all" / "checkpoint_final.pth").touch()
        elif arguments[0] == "pseudo_label":
            number = arguments[arguments.index("-o") + 1]
            (self.work / "nnUNet_preprocessed" / f"Dataset{number}_Hippocampus_PseudoLabels").mkdir(
                parents=True, exist_ok=True
            )

    monkeypatch.setattr(Preparation, "command", command)
    monkeypatch.setattr(Benchmark, "trained_by", lambda self, run, folder: "abc")
    return recorded


def test_rounds_are_parsed_from_the_method(benchmark):
    assert (CHAIN.rounds, CHAIN.pretraining_steps, CHAIN.trainer) == (2, 0, "nnUNetTrainerWeakToStrong")
    assert CHAIN.after_rounds(1).method == "nnUNetTrainerWeakToStrong+rounds1:weight=1.0"
    assert CHAIN.after_rounds(0) == Run("nnUNetTrainerWeakToStrong:weight=1.0", LabeledSet(4), 3)
    assert len({benchmark.name(CHAIN.after_rounds(rounds)) for rounds in range(3)}) == 1
    assert Run("lower_bound+mae10", LabeledSet(4), 0).rounds == 0


def test_each_round_trains_on_the_predictions_of_the_one_before(benchmark, commands):
    model = benchmark.trained(CHAIN)
    trained = [arguments[1] for arguments in commands if arguments[0] == "run_training_entry"]
    rounds = [f"Dataset{number}_Hippocampus_PseudoLabels" for number in (900, 901)]
    assert trained == ["Dataset304_Hippocampus", *rounds]
    assert model.parent.name == rounds[-1]
    first, second = [arguments for arguments in commands if "pseudo_label" in arguments]
    assert Path(first[first.index("-m") + 1]).parent.name == "Dataset304_Hippocampus"
    assert Path(second[second.index("-m") + 1]).parent.name == rounds[0]
    assert "--previous" not in first
    assert second[second.index("--previous") + 1] == rounds[0]
    assert all(arguments[arguments.index("-d") + 1] == "304" for arguments in (first, second))
    names = [arguments[0] for arguments in commands]
    preprocessing = ["extract_fingerprint_entry", "preprocess_entry"]
    assert names == ["run_training_entry", *["main", *preprocessing, "run_training_entry"] * 2]


def test_models_of_all_rounds_are_scored_on_the_original_data_set(benchmark, commands, monkeypatch):
    scored = []

    def evaluate(references, predictions, num_processes):
        scored.append((references, predictions))
        case = {"case": "a", "label": "x", "dice": 0.5, "hd95_mm_max_directed": 1.0}
        return Namespace(as_json=lambda: {"cases": [case]})

    monkeypatch.setattr("benchmarks.comparison.evaluate_folder", evaluate)
    benchmark.perform(CHAIN)
    predicted = commands[-1]
    raw = benchmark.work / "nnUNet_raw" / "Dataset304_Hippocampus"
    assert predicted[predicted.index("-d") + 1] == "Dataset901_Hippocampus_PseudoLabels"
    assert predicted[predicted.index("-i") + 1] == str(raw / "imagesVal")
    assert scored[0][0] == raw / "labelsVal"
    assert CHAIN.method in benchmark.table.read_text()


def test_finished_trainings_are_not_repeated_and_other_chains_have_other_data_sets(benchmark, commands):
    benchmark.trained(CHAIN)
    commands.clear()
    assert benchmark.trained(CHAIN.after_rounds(1)).parent.name == "Dataset900_Hippocampus_PseudoLabels"
    assert not commands
    other = Run("lower_bound+rounds1", LabeledSet(4), 3)
    assert benchmark.trained(other).parent.name == "Dataset902_Hippocampus_PseudoLabels"
    assert len(json.loads((benchmark.work / "rounds.json").read_text())) == 3
