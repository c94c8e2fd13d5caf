"""Tests of the comparison of strategies for selecting the cases to label."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import selection
from benchmarks.comparison import Benchmark
from benchmarks.preparation import HERE, Preparation

TRAINING = json.loads((HERE / "protocols" / "hippocampus.json").read_text())["training"]


def option(arguments: tuple[str, ...], name: str) -> str:
    return arguments[arguments.index(name) + 1]


@pytest.fixture
def selections() -> list[tuple[str, str]]:
    """Strategy and seed of each call of `nnunet_dycon select`."""
    return []


@pytest.fixture
def performed(monkeypatch, selections) -> list[tuple[str, int, list[str]]]:
    """Trainings: name of the data set, seed and labeled cases. Nothing is trained or predicted.

    Instead of `nnunet_dycon select`, the last unlabeled cases are selected, in the order of their names.
    """
    trainings = []

    def prepare(self, labeled_sets):
        for labeled in labeled_sets:
            folder = self.raw(labeled) / "imagesUn"
            folder.mkdir(parents=True, exist_ok=True)
            for case in self.split(labeled)["unlabeled"]:
                (folder / f"{case}_0000.nii.gz").touch()

    def predict(self, dataset, trainer, images, output, *options):
        output.mkdir(parents=True)
        for image in images.iterdir():
            (output / image.name.replace("_0000", "")).touch()

    def select(self, entry_point, *arguments, log):
        selections.append((option(arguments, "--strategy"), option(arguments, "--seed")))
        predicted = sorted(file.name.partition(".")[0] for file in Path(option(arguments, "-i")).iterdir())
        unlabeled = self.work / "nnUNet_raw" / option(arguments, "-d") / "imagesUn"
        assert predicted == sorted(file.name.removesuffix("_0000.nii.gz") for file in unlabeled.iterdir())
        Path(option(arguments, "-o")).mkdir()
        with (Path(option(arguments, "-o")) / "selected.csv").open("w", newline="") as table:
            chosen = predicted[-int(option(arguments, "-n")) :]
            csv.writer(table).writerows([["rank", "case"], *enumerate(chosen)])

    def perform(self, run):
        trainings.append((self.dataset(run.labeled), run.seed, self.split(run.labeled)["labeled"]))

    def trained(self, run):
        return self.work / "models" / self.dataset(run.labeled) / self.name(run)

    for name, function in {"prepare": prepare, "predict": predict, "perform": perform, "trained": trained}.items():
        monkeypatch.setattr(Benchmark, name, function)
    monkeypatch.setattr(Preparation, "command", select)
    return trainings


def run(tmp_path: Path, *arguments: str) -> None:
    selection.main(["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--results", str(tmp_path), *arguments])


def test_selected_cases_are_added_to_the_labeled_ones(performed, tmp_path):
    run(tmp_path, "--strategies", "diverse", "--seeds", "0", "1")
    chosen = sorted(TRAINING[4:])[::-1]
    assert [(dataset, seed) for dataset, seed, _ in performed] == [
        (f"Dataset{number}_Hippocampus_diverse", seed) for number in (812, 816) for seed in (0, 1)
    ]
    for _, _, labeled in performed:
        assert labeled[:4] == TRAINING[:4]
        assert sorted(labeled[4:]) == sorted(chosen[: len(labeled) - 4])
    assert [len(labeled) for *_, labeled in performed] == [8, 8, 12, 12]


def test_by_uncertainty_each_training_selects_for_itself(performed, tmp_path):
    run(tmp_path, "--strategies", "uncertainty", "--seeds", "0", "1")
    numbers = [(811, 0), (815, 0), (831, 1), (835, 1)]
    assert [(dataset, seed) for dataset, seed, _ in performed] == [
        (f"Dataset{n}_Hippocampus_uncertainty", s) for n, s in numbers
    ]
    predicting = sorted(model.parent.name for model in (tmp_path / "work" / "models").glob("*/*"))
    assert predicting == [*["Dataset304_Hippocampus"] * 2, *(f"Dataset{n}_Hippocampus_uncertainty" for n in (811, 831))]


def test_random_sets_are_trained_with_all_seeds(performed, selections, tmp_path):
    run(tmp_path, "--strategies", "random", "--seeds", "0", "1", "--random_seeds", "3", "4")
    assert [(dataset, seed) for dataset, seed, _ in performed] == [
        (f"Dataset{number}_Hippocampus_random", seed) for number in (873, 877, 893, 897) for seed in (0, 1)
    ]
    assert selections == [("random", "3"), ("random", "3"), ("random", "4"), ("random", "4")]
