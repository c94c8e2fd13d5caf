"""Tests of lengths of trainers, such as _12epochs and _smoke, and of the look-up of trainers by name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from nnunetv2.evaluation.find_best_configuration import find_best_configuration

from nnunet_dycon import trainers
from nnunet_dycon.errors import UnknownTrainer
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.trainers import registered_name, trainer_class
from tests.tiny import set_environment
from tests.trainers.training import make_trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_length_in_the_name_changes_only_the_length(tiny, name):
    base, short, smoke = (trainer_class(name + ending) for ending in ("", "_12epochs", "_smoke"))
    assert short is trainer_class(f"{name}_12epochs") is getattr(trainers, f"{name}_12epochs")
    assert (short.__name__, short.__module__) == (f"{name}_12epochs", "nnunet_dycon.trainers")
    assert pickle.loads(pickle.dumps(short)) is short
    assert issubclass(short, base)
    for trainer, epochs, iterations in ((base, 1000, 250), (short, 12, 250), (smoke, 2, 5)):
        made = make_trainer(trainer)
        assert (made.num_epochs, made.num_iterations_per_epoch) == (epochs, iterations)
        assert f"{trainer.__name__}__nnUNetPlans__3d_fullres" in made.output_folder
        assert getattr(trainer, "method_settings", None) == getattr(base, "method_settings", None)


@pytest.mark.parametrize(
    ("name", "registered"),
    [
        ("nnUNetTrainerDyCON", "nnUNetTrainerDyCON"),
        ("nnUNetTrainerDyCON_adapted_smoke", "nnUNetTrainerDyCON_adapted"),
        ("nnUNetTrainerUXNet_2000epochs", "nnUNetTrainerUXNet"),
        ("nnUNetTrainerDyCON_finetune", "nnUNetTrainerDyCON"),
        ("nnUNetTrainerDyCON_adapted_finetune_smoke", "nnUNetTrainerDyCON_adapted"),
        ("nnUNetTrainerDyCON_mine", None),
        ("nnUNetTrainer_finetune", None),
        ("nnUNetTrainerDyCON_5epochs_finetune", None),
        ("nnUNetTrainerDyCON_finetune_finetune", None),
        ("nnUNetTrainerMine_50epochs", None),
        ("nnUNetTrainer_5epochs", None),
        ("nnUNetTrainerSecondNetwork_5epochs", None),
        ("nnUNetTrainerDyCON_5epochs_smoke", None),
        ("nnUNetTrainerDyCON_-5epochs", None),
        ("nnUNetTrainerDyCON_epochs", None),
    ],
)
def test_registered_name_without_length(name, registered):
    assert registered_name(name) == registered
    if registered is None:
        with pytest.raises(UnknownTrainer, match=f"no trainer is called {name}"):
            trainer_class(name)


@pytest.mark.parametrize("name", ["nnUNetTrainerDyCON_smoke", "nnUNetTrainerDyCON_adapted"])
def test_published_dycon_logs_its_caveat_when_training_starts(tiny, capsys, name):
    trainer = make_trainer(trainer_class(name))
    trainer.on_train_start()
    is_published = name != "nnUNetTrainerDyCON_adapted"
    log = Path(trainer.log_file).read_text()
    for text in (log, capsys.readouterr().out):
        assert (TRAINERS["nnUNetTrainerDyCON"].caveat in text) == is_published


@pytest.mark.slow
def test_find_best_configuration_accepts_names_with_a_length(trained_tiny, tmp_path, monkeypatch):
    root = tmp_path / "tiny"
    shutil.copytree(trained_tiny, root)
    set_environment(monkeypatch, root)
    model = {"plans": "nnUNetPlans", "configuration": "3d_fullres", "trainer": "nnUNetTrainerDyCON_smoke"}
    find_best_configuration(901, (model,), allow_ensembling=False, num_processes=1, folds=(0,))
    written = root / "nnUNet_results" / "Dataset901_Tiny" / "inference_information.json"
    best = json.loads(written.read_text())["best_model_or_ensemble"]["selected_model_or_models"]
    assert [chosen["trainer"] for chosen in best] == ["nnUNetTrainerDyCON_smoke"]
