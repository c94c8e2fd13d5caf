"""Tests of user errors that are raised in one line before a training starts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_dycon.data.labeled import make_split
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.nnUNetTrainerDyCONCoTraining import nnUNetTrainerDyCONCoTraining
from nnunet_dycon.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from nnunet_dycon.training.preflight import TrainingLock
from tests.processes import NNUNETV2_TRAIN, run_python
from tests.tiny import LABELED, few_labeled
from tests.trainers.training import METHODS, deterministic, draw_no_pictures, make_trainer, narrow


@pytest.mark.parametrize("name", METHODS)
def test_damaged_fingerprint_raises_before_training(base, name):
    """All other errors are tested in tests/training/test_preflight.py."""
    (base / "dataset_fingerprint.json").write_text("{")
    trainer = make_trainer(deterministic(trainer_class(name)), fold=0)
    with pytest.raises(SystemExit, match=r"dataset_fingerprint.json is damaged; run: nnUNetv2_plan_and_pr") as stopped:
        trainer.run_training()
    assert "\n" not in str(stopped.value)
    assert trainer.network is None
    assert not list(Path(trainer.output_folder).glob("*.pth"))


def test_read_only_results_folder_raises(tiny):
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    trainer.output_folder = "/proc"  # not even root can create a file here
    trainer._lock = TrainingLock(Path("/proc"), trainer.unlabeled_cases, print)
    with pytest.raises(
        SystemExit, match=r"/proc/.*lock cannot be written; change the owner or permissions of its folder"
    ):
        trainer.on_train_start()
    assert trainer.network is None


def test_results_folder_that_cannot_be_created_raises(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_results", "/proc/results")
    with pytest.raises(
        SystemExit, match=r"cannot create the output folder of this training; check nnUNet_results .*/proc/results"
    ):
        make_trainer(deterministic(nnUNetTrainerDyCON))


def test_fewer_than_five_labeled_cases_train_with_a_split_or_fold_all(base, raw, train, monkeypatch):
    draw_no_pictures(monkeypatch)
    few_labeled(base, raw)
    train(epochs=1, fold="all")
    (base / "splits_final.json").write_text(json.dumps([{"train": ["case_01"], "val": ["case_01"]}]))
    train(epochs=1, fold=0)


@pytest.mark.parametrize("name", METHODS)
def test_cascade_raises_at_construction(base, name):
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))
    with pytest.raises(NotImplementedError, match="cannot train 3d_cascade_fullres: in a cascade") as refused:
        make_trainer(trainer_class(name), configuration="3d_cascade_fullres")
    assert not (base.parents[1] / "nnUNet_results" / "Dataset901_Tiny").exists()
    assert refused.value.code.startswith("nnunet_dycon: error: ")  # the only line that Python prints


def test_cascade_ends_nnunetv2_train_with_one_line(base):
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))
    trainer = ("-tr", "nnUNetTrainerDyCON_smoke", "-device", "cpu")
    result = run_python(NNUNETV2_TRAIN, "901", "3d_cascade_fullres", "0", *trainer)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("nnunet_dycon: error: nnUNetTrainerDyCON_smoke cannot")


def test_old_nnunet_raises(tiny, monkeypatch):
    monkeypatch.setattr("nnunet_dycon.system.environment.metadata.version", lambda name: "2.7.0")
    with pytest.raises(SystemExit, match=r"nnunet_dycon: error: nnU-Net 2.7.0 is too old"):
        make_trainer(nnUNetTrainerDyCON)


def test_network_without_stages_raises(tiny):
    class nnUNetTrainerOther(nnUNetTrainerDyCON):
        enable_deep_supervision = False

        @staticmethod
        def build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
        ):
            return torch.nn.Conv3d(1, 3, 1)

    trainer = make_trainer(nnUNetTrainerOther)
    trainer.enable_deep_supervision = False
    with pytest.raises(NotImplementedError, match="but the network Conv3d has none"):
        trainer.initialize()


def with_primus(base: type[SemiSupervisedTrainer], deep_supervision: bool) -> type[SemiSupervisedTrainer]:
    class nnUNetTrainerPrimus(base):
        def __init__(
            self, plans, configuration, fold, dataset_json, device=torch.device("cuda")  # noqa: B008 (as in nnU-Net)
        ):  # fmt: skip
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.enable_deep_supervision = deep_supervision

        @staticmethod
        def build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
        ):
            patch_size = configuration_manager.patch_size
            return Primus(num_input_channels, 12, (8, 8, 8), num_output_channels, 1, 2, patch_size)

        def set_deep_supervision_enabled(self, enabled):  # as in nnU-Net's trainers of Primus
            pass

    return nnUNetTrainerPrimus


@pytest.mark.parametrize("base", [nnUNetTrainerDyCON, nnUNetTrainerDyCONCoTraining])
def test_primus_raises_for_methods_that_require_features(base, tiny):
    """All layers of nnU-Net's transformer have the same resolution, so it has no encoder with stages."""
    message = "but the network Primus has none; use nnU-Net's default or residual-encoder plans"
    with pytest.raises(NotImplementedError, match=message):
        make_trainer(with_primus(base, deep_supervision=False)).initialize()


@pytest.mark.parametrize("base", [nnUNetTrainerDyCON, nnUNetTrainerMeanTeacher])
def test_primus_raises_if_the_trainer_uses_deep_supervision(base, tiny):
    with pytest.raises(NotImplementedError, match="requires deep supervision, but the network Primus has none"):
        make_trainer(with_primus(base, deep_supervision=True)).initialize()


def test_primus_trains_with_methods_without_features_or_deep_supervision(base, monkeypatch):
    narrow(base)
    draw_no_pictures(monkeypatch)
    trainer = make_trainer(deterministic(with_primus(nnUNetTrainerMeanTeacher, deep_supervision=False), 1))
    trainer.run_training()
    assert trainer.method.teacher.updates == 3
    assert np.isfinite(trainer.curves["consistency"]).all()


@pytest.mark.parametrize("name", METHODS)
def test_plans_of_primus_raise(base, name):
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": f"{Primus.__module__}.Primus",
        "arch_kwargs": {"embed_dim": 12, "patch_embed_size": [8, 8, 8], "input_shape": [16, 16, 16]},
        "_kw_requires_import": [],
    }
    file.write_text(json.dumps(plans))
    has_own_network = name == "nnUNetTrainerDKUXNet"
    message = (
        "needs .* but the plans for .*Primus lack them"
        if has_own_network
        else "cannot train Primus: networks in the plans"
    )
    with pytest.raises(NotImplementedError, match=message) as refused:
        make_trainer(trainer_class(name)).run_training()
    assert refused.value.code.startswith("nnunet_dycon: error: ")


def test_second_training_of_a_fold_is_refused_and_changes_nothing(tiny, monkeypatch):
    draw_no_pictures(monkeypatch)
    first = make_trainer(deterministic(nnUNetTrainerMeanTeacher, 1))
    folder = Path(first.output_folder)
    second = make_trainer(deterministic(nnUNetTrainerMeanTeacher, 1))
    first.on_train_start()
    (folder / "checkpoint_latest.pth").touch()
    before = {file.name for file in folder.iterdir()}
    with pytest.raises(SystemExit, match=r"error: .*fold_all: a training of this fold is running \(host .*\); wait"):
        second.run_training()
    assert {file.name for file in folder.iterdir()} == before
    first._lock.close()
    (folder / "checkpoint_latest.pth").unlink()
    second.run_training()
    assert not list(tiny.rglob("*.lock"))


def test_training_that_was_overtaken_writes_no_checkpoint(tiny, monkeypatch):
    draw_no_pictures(monkeypatch)
    trainer = make_trainer(deterministic(nnUNetTrainerMeanTeacher, 1))
    (lock,) = (Path(trainer.output_folder) / name for name in ("nnunet_dycon_training.lock",))
    monkeypatch.setattr(
        trainer,
        "on_epoch_end",
        lambda: (
            lock.write_text('{"host": "node7", "token": "other"}'),
            trainer.save_checkpoint(str(lock.with_name("checkpoint_latest.pth"))),
        ),
    )
    with pytest.raises(SystemExit, match=r"another process \(host node7, .*\) has taken over a training of this fold"):
        trainer.run_training()
    assert not list(Path(trainer.output_folder).glob("*.pth"))
    assert lock.is_file()  # that of the other training


def test_training_without_write_access_to_the_preprocessed_folder_logs_that_it_is_not_locked(tiny, monkeypatch):
    draw_no_pictures(monkeypatch)
    trainer = make_trainer(deterministic(nnUNetTrainerMeanTeacher, 1))
    monkeypatch.setattr(trainer._lock._use, "acquire", lambda: (_ for _ in ()).throw(PermissionError("denied")))
    trainer.run_training()
    log = "".join(file.read_text() for file in Path(trainer.output_folder).glob("training_log*"))
    assert "cannot be written to (denied); do not run nnunet_dycon preprocess_unlabeled -d 901 -c 3d_fullres" in log


def test_split_is_that_of_nnunet(base):
    file = base / "splits_final.json"
    file.unlink(missing_ok=True)
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON), fold=0)
    trainer.dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    trainer.do_split()
    expected = file.read_text()
    file.unlink()
    make_split(base / "nnUNetPlans_3d_fullres", set(LABELED))
    assert file.read_text() == expected
