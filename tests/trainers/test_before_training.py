"""Mistakes of a user are named in one line, before a training starts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus

from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.nnUNetTrainerDyCONCoTraining import nnUNetTrainerDyCONCoTraining
from nnunet_dycon.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from tests.tiny import few_labeled
from tests.trainers.training import METHODS, deterministic, draw_no_pictures, make_trainer, narrow


@pytest.mark.parametrize("name", METHODS)
def test_a_fault_ends_every_training_in_one_line_before_it_starts(base, name):
    """All faults are in tests/training/test_preflight.py."""
    (base / "dataset_fingerprint.json").write_text("{")
    trainer = make_trainer(deterministic(trainer_class(name)), fold=0)
    with pytest.raises(SystemExit, match=r"dataset_fingerprint.json is damaged; run: nnUNetv2_plan_and_pr") as stopped:
        trainer.run_training()
    assert "\n" not in str(stopped.value)
    assert trainer.network is None
    assert not list(Path(trainer.output_folder).glob("*.pth"))


def test_a_results_folder_that_cannot_be_written_to(tiny):
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    trainer.output_folder = "/proc"  # where not even root can make a file
    with pytest.raises(SystemExit, match=r"error: /proc cannot be written to \(.*\); change its owner or permissions"):
        trainer.on_train_start()
    assert trainer.network is None


def test_a_results_folder_that_cannot_be_made(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_results", "/proc/results")
    with pytest.raises(
        SystemExit, match=r"cannot make the folder of this training; check nnUNet_results .*/proc/results"
    ):
        make_trainer(deterministic(nnUNetTrainerDyCON))


def test_few_labeled_cases_with_a_split_or_fold_all_do_train(base, raw, train, monkeypatch):
    draw_no_pictures(monkeypatch)
    few_labeled(base, raw)
    train(epochs=1, fold="all")
    (base / "splits_final.json").write_text(json.dumps([{"train": ["case_01"], "val": ["case_01"]}]))
    train(epochs=1, fold=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_cascade_is_refused_at_construction(base, name):
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))
    with pytest.raises(NotImplementedError, match="cannot train 3d_cascade_fullres: in a cascade") as refused:
        make_trainer(trainer_class(name), configuration="3d_cascade_fullres")
    assert not (base.parents[1] / "nnUNet_results" / "Dataset901_Tiny").exists()
    assert refused.value.code.startswith("nnunet_dycon: error: ")  # what Python prints of it, and nothing else


def test_a_cascade_is_one_line_for_a_user(base):
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))
    command = [Path(sys.executable).with_name("nnUNetv2_train"), "901", "3d_cascade_fullres", "0"]
    command += ["-tr", "nnUNetTrainerDyCON_smoke", "-device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("nnunet_dycon: error: nnUNetTrainerDyCON_smoke cannot")


def test_an_old_nnunet_is_refused_in_one_line(tiny, monkeypatch):
    monkeypatch.setattr("nnunet_dycon.system.environment.metadata.version", lambda name: "2.7.0")
    with pytest.raises(SystemExit, match=r"nnunet_dycon: error: nnU-Net 2.7.0 is too old"):
        make_trainer(nnUNetTrainerDyCON)


def test_a_network_without_stages_is_refused_with_the_reason(tiny):
    class nnUNetTrainerOther(nnUNetTrainerDyCON):
        enable_deep_supervision = False

        @staticmethod
        def build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
        ):
            return torch.nn.Conv3d(1, 3, 1)

    trainer = make_trainer(nnUNetTrainerOther)
    trainer.enable_deep_supervision = False
    with pytest.raises(NotImplementedError, match="to tap features from; Conv3d has none"):
        trainer.initialize()


def with_primus(base: type[SemiSupervisedTrainer], deep_supervision: bool) -> type[SemiSupervisedTrainer]:
    class nnUNetTrainerPrimus(base):
        def __init__(
            self, plans, configuration, fold, dataset_json, device=torch.device("cuda")  # noqa: B008 (as nnU-Net)
        ):  # fmt: skip
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.enable_deep_supervision = deep_supervision

        @staticmethod
        def build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
        ):
            patch_size = configuration_manager.patch_size
            return Primus(num_input_channels, 12, (8, 8, 8), num_output_channels, 1, 2, patch_size)

        def set_deep_supervision_enabled(self, enabled):  # as nnU-Net's trainers of Primus have it
            pass

    return nnUNetTrainerPrimus


@pytest.mark.parametrize("base", [nnUNetTrainerDyCON, nnUNetTrainerDyCONCoTraining])
def test_primus_has_no_stage_to_tap(base, tiny):
    """nnU-Net's transformer: patches are embedded at once, and every layer has the same resolution."""
    message = "to tap features from; Primus has none. Use nnU-Net's default or residual-encoder plans"
    with pytest.raises(NotImplementedError, match=message):
        make_trainer(with_primus(base, deep_supervision=False)).initialize()


@pytest.mark.parametrize("base", [nnUNetTrainerDyCON, nnUNetTrainerMeanTeacher])
def test_primus_has_no_deep_supervision(base, tiny):
    with pytest.raises(NotImplementedError, match="cannot train Primus with deep supervision, which it does not have"):
        make_trainer(with_primus(base, deep_supervision=True)).initialize()


def test_where_nothing_is_tapped_primus_does_train(base, monkeypatch):
    narrow(base)
    draw_no_pictures(monkeypatch)
    trainer = make_trainer(deterministic(with_primus(nnUNetTrainerMeanTeacher, deep_supervision=False), 1))
    trainer.run_training()
    assert trainer.method.teacher.updates == 3
    assert np.isfinite(trainer.curves["consistency"]).all()


@pytest.mark.parametrize("name", METHODS)
def test_plans_of_primus_are_refused_in_one_line(base, name):
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": f"{Primus.__module__}.Primus",
        "arch_kwargs": {"embed_dim": 12, "patch_embed_size": [8, 8, 8], "input_shape": [16, 16, 16]},
        "_kw_requires_import": [],
    }
    file.write_text(json.dumps(plans))
    own = name == "nnUNetTrainerDKUXNet"  # which is built when training begins
    message = "needs plans with .* which those for .*Primus have not" if own else "cannot train Primus: it has no deep"
    with pytest.raises(NotImplementedError, match=message) as refused:
        make_trainer(trainer_class(name)).run_training()
    assert refused.value.code.startswith("nnunet_dycon: error: ")
