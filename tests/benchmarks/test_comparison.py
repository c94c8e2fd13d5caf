"""Tests of comparisons: labeled sets, missing runs, and trainers of the benchmarks."""

import copy
import csv
import json
import os
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import selection
from benchmarks.comparison import _FIRST_ROUND_ID, COLUMNS, Benchmark, Run, compare
from benchmarks.hippocampus import HIPPOCAMPUS
from benchmarks.hippocampus_sparse import ANNOTATIONS
from benchmarks.la import LEFT_ATRIUM
from benchmarks.phantom import LESION_RADII, PHANTOMS, SEED, SHAPE
from benchmarks.preparation import DRAWS, HERE, UPPER_BOUND, LabeledSet, Preparation, trainer_class
from benchmarks.trainers.nnunet_dycon_benchmark_trainers import RoundedProducts
from nnunet_dycon.demo.phantom import phantom
from nnunet_dycon.labeling.select import STRATEGIES
from tests.processes import run_python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(tmp_path) -> Benchmark:
    return Benchmark(
        Namespace(
            work=tmp_path / "work", data=tmp_path, table=tmp_path / "la.csv", spacing=2.5, features=[16, 32],
            iterations=200, device="cpu", sets=["val"], precision="float32", weights="all",
        ),
        LEFT_ATRIUM,
    )  # fmt: skip


def test_trainer_and_settings_are_parsed_from_the_method():
    run = Run('nnUNetTrainerDyCON:uncl_weight=0.1,fecl_form="paper"', LabeledSet(4), seed=0)
    assert run.trainer == "nnUNetTrainerDyCON"
    assert run.settings == {"uncl_weight": 0.1, "fecl_form": "paper"}
    assert (
        Run("lower_bound", LabeledSet(8), 0).trainer == Run(UPPER_BOUND, LabeledSet(55), 0).trainer == "nnUNetTrainer"
    )


@pytest.mark.parametrize("data_set", [LEFT_ATRIUM, HIPPOCAMPUS], ids=lambda data_set: data_set.name)
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_labeled_sets_are_nested_and_share_held_out_cases(benchmark, monkeypatch, data_set, draw):
    listed = json.loads((HERE / "protocols" / f"{data_set.table}.json").read_text())
    numbers = (*data_set.labels, data_set.training_cases)
    monkeypatch.setattr(benchmark, "data_set", data_set)
    splits = [benchmark.split(LabeledSet(labels, draw)) for labels in numbers]
    for labels, cases in zip(numbers, splits):
        assert len(cases["labeled"]) == labels
        assert {*cases["labeled"], *cases["unlabeled"]} == set(listed["training"])
        assert len(cases["labeled"]) + len(cases["unlabeled"]) == data_set.training_cases
        assert not {*listed["val"], *listed["test"]} & set(listed["training"])
        assert (cases["val"], cases["test"]) == (listed["val"], listed["test"])
        assert set(splits[0]["labeled"]) <= set(cases["labeled"])
    assert (splits[-1]["labeled"] == listed["training"]) == (draw == 0)


def test_data_sets_of_labeled_sets_have_unique_ids_that_nnunet_accepts(benchmark, monkeypatch):
    found = []
    for data_set in (LEFT_ATRIUM, PHANTOMS, HIPPOCAMPUS, *ANNOTATIONS.values()):
        monkeypatch.setattr(benchmark, "data_set", data_set)
        sets = [LabeledSet(labels, draw) for labels in data_set.labels for draw in DRAWS]
        found += [benchmark.dataset_id(labeled) for labeled in (*sets, data_set.all_labeled)]
    for strategy in STRATEGIES:
        monkeypatch.setattr(benchmark, "data_set", chosen := selection.data_set(strategy))
        found += [benchmark.dataset_id(LabeledSet(labels, draw)) for labels in chosen.labels for draw in DRAWS]
    assert len(set(found)) == len(found)
    assert max(found) < _FIRST_ROUND_ID
    monkeypatch.setattr(benchmark, "data_set", LEFT_ATRIUM)
    assert benchmark.dataset(LabeledSet(4, 1)) == "Dataset124_LA2018"


def write_rows(benchmark: Benchmark, run: Run, weights: list[str]) -> None:
    """Append a row for each of the weights to the CSV."""
    scores = {"case": "a", "label": "atrium", "dice": 0.9, "hd95_mm_max_directed": 3.0}
    benchmark._append([benchmark._row(run, name, "val", scores, "abc") for name in weights])


def test_scored_runs_are_not_repeated(benchmark):
    lower, semi = Run("lower_bound", LabeledSet(8), 0), Run("nnUNetTrainerMeanTeacher", LabeledSet(8), 0)
    assert benchmark.missing(lower) == [("val", "student")]
    write_rows(benchmark, lower, ["student"])
    write_rows(benchmark, semi, ["student"])
    assert not benchmark.missing(lower)
    assert benchmark.missing(semi) == [("val", "teacher")]
    assert benchmark.missing(Run("nnUNetTrainerDKUXNet", LabeledSet(8), 0)) == [("val", "student")]  # it has no teacher
    assert benchmark.missing(Run("lower_bound", LabeledSet(8), 1))
    assert benchmark.missing(Run("lower_bound", LabeledSet(4), 0))
    with benchmark.table.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["weights"] for row in rows] == ["student", "student"]
    benchmark.sets = ["val", "test"]  # val is already scored
    assert benchmark.missing(lower) == [("test", "student")]
    benchmark.sets = ["unlabeled"]  # the upper bound has none
    assert benchmark.missing(lower) == [("unlabeled", "student")]
    assert not benchmark.missing(Run(UPPER_BOUND, LabeledSet(55), 0))
    benchmark.sets = ["val", "test"]
    benchmark.precision = "bfloat16"  # the precision is part of the key
    assert ("val", "student") in benchmark.missing(lower)
    benchmark.precision, benchmark.iterations = "float32", 400  # and so is the number of iterations
    assert ("val", "student") in benchmark.missing(lower)
    benchmark.iterations, benchmark.sets = 200, ["val"]
    assert not benchmark.missing(lower)
    assert benchmark.missing(Run("lower_bound", LabeledSet(8, 1), 0))  # and the draw of labeled cases
    assert benchmark.missing(semi) == [("val", "teacher")]
    benchmark.student_only = True
    assert not benchmark.missing(semi)


def test_references_of_unlabeled_cases_are_outside_of_the_training_data(monkeypatch, tmp_path):
    few = replace(PHANTOMS, labels=(1,), training_cases=3)
    monkeypatch.setattr("benchmarks.phantom.HELD_OUT", {"val": 1, "test": 1})
    preparation = Preparation(Namespace(work=tmp_path, data=None, spacing=1.0, features=[], device="cpu"), few)
    few.write(preparation, LabeledSet(1))
    preparation.prepare_references([LabeledSet(1), LabeledSet(3)])
    raw = tmp_path / "nnUNet_raw" / "Dataset201_Phantom"
    unlabeled = {path.name.replace("_0000.", ".") for path in (raw / "imagesUn").iterdir()}
    references = preparation.references(LabeledSet(1), "unlabeled")
    assert {path.name for path in references.iterdir()} == unlabeled
    assert len(unlabeled) == 2
    assert raw not in references.parents
    assert not unlabeled & {path.name for path in (raw / "labelsTr").iterdir()}
    assert preparation.references(LabeledSet(1), "val") == raw / "labelsVal"


@pytest.mark.parametrize("annotation", ["sparse", "sparse_alone"])
def test_sparse_data_sets_are_made_from_the_complete_one(monkeypatch, tmp_path, annotation):
    commands = []

    def run(preparation, entry_point, command, *arguments):
        commands.append((command, arguments))
        target = arguments[arguments.index("-o" if command == "sparsify" else "-d") + 1]
        made = preparation.raw(LabeledSet(8))
        assert str(preparation.dataset_id(LabeledSet(8))) == target
        (made / "imagesUn").mkdir(parents=True)

    monkeypatch.setattr(Preparation, "command", run)
    chosen = ANNOTATIONS[annotation]
    about = Namespace(work=tmp_path, data=tmp_path, spacing=2.0, features=[16], device="cpu")
    preparation = Preparation(about, chosen)
    chosen.write(preparation, LabeledSet(8))
    assert [command for command, _ in commands] == ["convert", "sparsify"]
    assert commands[1][1][:2] == ("-d", "508")
    raw = preparation.raw(LabeledSet(8))
    assert raw.name == f"Dataset{608 if annotation == 'sparse' else 708}_Hippocampus_Every8"
    assert (raw / "imagesUn").is_dir() == (annotation == "sparse")
    assert preparation.plans == "nnUNetPlans_2mm_z1mm_16f"


def test_upper_bound_is_run_once_for_all_numbers_of_labels(monkeypatch, tmp_path):
    performed, prepared = [], []
    monkeypatch.setattr(Benchmark, "perform", lambda self, run: performed.append(run))
    monkeypatch.setattr(Benchmark, "prepare", lambda self, labels: prepared.extend(labels))
    arguments = [
        "--work",
        str(tmp_path),
        "--table",
        str(tmp_path / "phantom.csv"),
        "--methods",
        "upper_bound",
        "lower_bound",
    ]
    monkeypatch.setattr(sys, "argv", ["phantom", *arguments, "--labels", "4", "8"])
    compare(PHANTOMS, None)
    assert performed == [
        Run(UPPER_BOUND, PHANTOMS.all_labeled, 0),
        Run("lower_bound", LabeledSet(4), 0),
        Run("lower_bound", LabeledSet(8), 0),
    ]
    assert sorted(prepared) == [LabeledSet(4), LabeledSet(8), PHANTOMS.all_labeled]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nnUNetTrainerDyCONN", "unknown methods: nnUNetTrainerDyCONN"),
        ("nnUNetTrainerDyCON:gama=1", "nnUNetTrainerDyCON has no setting gama"),
        ("nnUNetTrainerDyCON:num_epochs=5", "nnUNetTrainerDyCON has no setting num_epochs"),
        ("lower_bound:gamma=1", "nnUNetTrainer has no setting gamma"),
        ("lower_bound+mae", "+mae needs a number of steps"),
        ("upper_bound+mae1000", "upper_bound has no unlabeled cases"),
        ("upper_bound+rounds1", "upper_bound has no unlabeled cases"),
        ("lower_bound+rounds0", "+rounds a number of rounds"),
        ("lower_bound+1000", "+mae needs a number of steps"),
    ],
)
def test_unknown_methods_and_settings_are_errors(monkeypatch, tmp_path, capsys, method, message):
    monkeypatch.setattr(sys, "argv", ["phantom", "--work", str(tmp_path), "--methods", method])
    with pytest.raises(SystemExit):
        compare(PHANTOMS, None)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_phantoms_are_equal_for_all_numbers_of_labels(monkeypatch, tmp_path):
    few = replace(PHANTOMS, labels=(1, 2), training_cases=3)
    preparation = Preparation(
        Namespace(work=tmp_path, spacing=few.spacing, features=list(few.features), device="cpu"), few
    )
    monkeypatch.setattr("benchmarks.phantom.HELD_OUT", {"val": 1, "test": 1})
    images = {}
    for labels in (1, 2, 3):
        few.write(preparation, LabeledSet(labels))
        folder = preparation.raw(LabeledSet(labels))
        assert len(list((folder / "labelsTr").iterdir())) == labels
        assert len(list(folder.glob("imagesUn/*"))) == 3 - labels
        images[labels] = {file.name: file.read_bytes() for file in folder.glob("images*/*")}
    assert len(images[1]) == 5
    assert images[1] == images[2] == images[3]


def test_lesions_of_the_phantoms_are_small():
    fractions = [phantom(np.random.default_rng([SEED, n]), SHAPE, LESION_RADII)[1].mean() for n in range(20)]
    assert min(fractions) > 0
    assert sum(fractions) / len(fractions) < 0.01


def test_teacher_or_second_network_is_scored_if_it_exists():
    assert list(Run("lower_bound", LabeledSet(8), 0).weights) == ["student"]
    assert list(Run("nnUNetTrainerDyCON", LabeledSet(8), 0).weights) == ["student", "teacher"]
    assert Run("nnUNetTrainerUGPL", LabeledSet(8), 0).weights == {
        "student": "checkpoint_final.pth",
        "second": "checkpoint_final_second.pth",
    }


def test_trainer_names_are_unique_for_each_run(benchmark):
    methods = ("lower_bound", "lower_bound+mae1000", "nnUNetTrainerDyCON", "nnUNetTrainerDyCON+mae1000",
               "nnUNetTrainerDyCON+mae2000", "nnUNetTrainerDyCON:gamma=-1", "nnUNetTrainerDyCON:gamma=1",
               'nnUNetTrainerDyCON:fecl_form="paper"')  # fmt: skip
    runs = [Run(method, LabeledSet(8), seed) for method in methods for seed in (0, 1)]
    names = [benchmark.name(run) for run in runs]
    assert len(set(names)) == len(runs)
    assert all(name.isidentifier() and "__" not in name for name in names)
    benchmark.work.mkdir()
    for run in runs:  # earlier entries are kept
        benchmark.declare([run])
    assert list(json.loads((benchmark.work / "runs.json").read_text())) == names


def test_plans_of_different_networks_have_different_names(benchmark, tmp_path):
    settings = {"work": tmp_path, "data": tmp_path, "spacing": 2.5, "device": "cpu"}
    names = [
        Preparation(Namespace(features=features, **settings), LEFT_ATRIUM).plans
        for features in ([16, 32], [16, 32, 64], [])
    ]
    assert names == ["nnUNetPlans_2p5mm_16_32f", "nnUNetPlans_2p5mm_16_32_64f", "nnUNetPlans_2p5mm"]


def test_model_with_other_settings_is_not_scored(benchmark, tmp_path):
    run = Run("nnUNetTrainerDyCON:gamma=1.0", LabeledSet(8), 0)
    settings = {"method_settings": asdict(trainer_class("nnUNetTrainerDyCON").method_settings) | {"gamma": 1.0}}
    (tmp_path / "benchmark.json").write_text(json.dumps({"commit": "abc", "settings": settings}))
    assert benchmark.trained_by(run, tmp_path) == "abc"
    settings["method_settings"]["uncl_weight"] = 0.125
    (tmp_path / "benchmark.json").write_text(json.dumps({"commit": "abc", "settings": settings}))
    with pytest.raises(SystemExit, match="was trained with other settings of nnUNetTrainerDyCON; delete it"):
        benchmark.trained_by(run, tmp_path)


def test_model_from_before_the_settings_of_the_schedule_is_scored(benchmark, tmp_path):
    run = Run("nnUNetTrainerDyCON", LabeledSet(8), 0)
    settings = asdict(trainer_class("nnUNetTrainerDyCON").training_settings)
    for name in ("learning_rate_factor", "warmup", "frozen_encoder"):
        del settings[name]
    (tmp_path / "benchmark.json").write_text(json.dumps({"commit": "a", "settings": {"training_settings": settings}}))
    assert benchmark.trained_by(run, tmp_path) == "a"
    with pytest.raises(SystemExit, match="was trained with other settings"):
        benchmark.trained_by(Run("nnUNetTrainerDyCON:warmup=0.05", LabeledSet(8), 0), tmp_path)


_STEP = """
import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from tests.trainers.training import make_trainer

trainer = make_trainer(recursive_find_trainer_class_by_name(name))
print(type(trainer).__name__, trainer.num_epochs * trainer.num_iterations_per_epoch, trainer.output_folder)
trainer.on_train_start()
trainer.on_train_epoch_start()
networks = [trainer.network, *getattr(trainer, "method", trainer.network).children()]
dtypes = set()


def look(module, inputs, output):
    rounded = torch.equal(output.float(), output.bfloat16().float())  # natively and emulated
    dtypes.add("bfloat16" if rounded else str(output.dtype).removeprefix("torch."))


for module in [module for network in networks for module in network.modules()]:
    if isinstance(module, (torch.nn.Conv3d, torch.nn.Linear)):
        module.register_forward_hook(look)
assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
assert {parameter.dtype for parameter in trainer.network.parameters()} == {torch.float32}
returned = trainer.network(torch.zeros(1, 1, *trainer.configuration_manager.patch_size))
assert {level.dtype for level in returned} == {torch.float32}
print(*dtypes)
"""


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("lower_bound", "float32"),
        pytest.param("lower_bound", "bfloat16", marks=pytest.mark.slow),
        ("nnUNetTrainerDyCON:entropy_weight=0.25", "float32"),
        pytest.param("nnUNetTrainerDyCON:entropy_weight=0.25", "bfloat16", marks=pytest.mark.slow),
        ("nnUNetTrainerUGPL", "bfloat16"),
    ],
)
def test_nnunet_finds_trainers_with_their_iterations_and_settings(tiny, benchmark, method, precision):
    run = Run(method, LabeledSet(8), 3)
    benchmark.precision = precision
    benchmark.work.mkdir()
    benchmark.declare([run])
    code = f"name = {benchmark.name(run)!r}\n{_STEP}"
    environment = os.environ | {
        "nnUNet_extTrainer": str(BENCHMARKS / "trainers"),
        "NNUNET_DYCON_BENCHMARK_RUNS": str(benchmark.work / "runs.json"),
    }
    result = run_python(code, cwd=BENCHMARKS.parent, environment=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{benchmark.name(run)} 200 ")]
    assert result.stdout.splitlines()[-1] == precision
    folder = Path(line.split()[-1])
    assert f"{benchmark.name(run)}__nnUNetPlans__3d_fullres" in str(folder)
    record = json.loads((folder / "benchmark.json").read_text())
    assert record["run"] == benchmark.declaration(run)
    assert (
        record["settings"] == {}
        if method == "lower_bound"
        else record["settings"]["method_settings"].items() >= (run.settings.items())
    )
    assert record["commit"]


@pytest.mark.parametrize(
    "layer", [torch.nn.Conv3d(2, 8, 3), torch.nn.ConvTranspose3d(2, 8, 2, 2), torch.nn.Linear(6, 7)]
)
def test_rounded_products_equal_bfloat16(layer):
    """The reference is float64 with rounded inputs; sums in float32 are sometimes rounded in the other direction."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.detach().bfloat16().double()

    torch.manual_seed(0)
    images = torch.randn(2, 2, 6, 6, 6, requires_grad=True)
    exact = copy.deepcopy(layer).double()
    exact.load_state_dict({name: rounded(values) for name, values in layer.state_dict().items()})
    exact_images = rounded(images).requires_grad_()
    with RoundedProducts():
        output = layer(images)
    expected = exact(exact_images)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected.backward(rounded(gradient))
    pairs = [(output, expected), (images.grad, exact_images.grad)]
    pairs += [(ours.grad, its.grad) for ours, its in zip(layer.parameters(), exact.parameters())]
    for ours, its in pairs:
        same = ours.double() == rounded(its)
        assert same.double().mean() > 0.97
        torch.testing.assert_close(ours.double(), its.detach(), rtol=2**-7, atol=1e-5)
    assert not torch.equal(layer(images), output)
