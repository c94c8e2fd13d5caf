"""What a user may have got wrong is told in one line, before any work starts."""

import json
import shutil
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
from tests.tiny import UNLABELED
from tests.trainers.test_contract import SEMI_SUPERVISED
from tests.trainers.training import METHODS, deterministic, draw_no_pictures, make_trainer, narrow


def remove_unlabeled(base: Path, raw: Path) -> None:
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled")
    shutil.rmtree(raw / "imagesUn")


def rename_labeled_to_unlabeled(base: Path, raw: Path) -> None:
    """The images of an unlabeled case have been annotated since, but were not taken away from imagesUn."""
    for file in (base / "nnUNetPlans_3d_fullres").glob("case_00*"):
        file.rename(file.with_name(file.name.replace("case_00", UNLABELED[0])))


def few_labeled(base: Path, raw: Path) -> None:
    (base / "splits_final.json").unlink(missing_ok=True)
    for file in (base / "nnUNetPlans_3d_fullres").glob("case_00*"):
        file.unlink()
    forget_in_fingerprint(base)


def forget_in_fingerprint(base: Path) -> None:
    """As if it had been planned on one case less; all have the same shape."""
    file = base / "dataset_fingerprint.json"
    fingerprint = json.loads(file.read_text())
    fingerprint["shapes_after_crop"].pop()
    file.write_text(json.dumps(fingerprint))


def few_splits(base: Path, raw: Path) -> None:
    few_labeled(base, raw)
    (base / "splits_final.json").write_text("[]")


def lost_label(base: Path, raw: Path) -> None:
    """Planned on 5 cases; then one of them became unlabeled."""
    for file in (base / "nnUNetPlans_3d_fullres").glob("case_04*"):
        file.unlink()
    (base / "splits_final.json").write_text(json.dumps([{"train": ["case_00"], "val": ["case_01"]}]))


def other_plans(base: Path, raw: Path) -> None:
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    file.write_text(json.dumps(plans))


def not_preprocessed(base: Path, raw: Path) -> None:
    shutil.rmtree(base / "nnUNetPlans_3d_fullres")


def write_split(*folds: dict):
    return lambda base, raw: (base / "splits_final.json").write_text(json.dumps(folds))


def damage_split(base: Path, raw: Path) -> None:
    (base / "splits_final.json").write_text('[{"train": ["case_00"')


def damage_manifest(base: Path, raw: Path) -> None:
    (base / "nnUNetPlans_3d_fullres_unlabeled.json").write_text("{")


def bad_image(base: Path, raw: Path) -> None:
    """As it is met by a training that preprocesses the unlabeled images itself."""
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled")
    image = raw / "imagesUn" / "scan_01_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:3000])


FAULTS = {
    "no unlabeled cases": (remove_unlabeled, "no unlabeled cases: .*imagesUn"),
    "labeled and unlabeled": (rename_labeled_to_unlabeled, "1 cases are both labeled and unlabeled, scan_00 the first"),
    "too few for a split": (few_labeled, "4 labeled cases are too few for nnU-Net's split into 5 folds, .*fold 'all'"),
    "fold not in the split": (few_splits, "4 labeled cases are too few .*: fold 0 does not exist; train on all"),
    "stale fingerprint": (lost_label, "fingerprint.json was made from 5 cases, which are not the 4 .* -d 901 --clean"),
    "stale": (
        other_plans,
        "is stale: the plans have changed; run: nnunet_dycon preprocess_unlabeled -d 901 -c 3d_full",
    ),
    "split of absent cases": (
        write_split({"train": ["case_00", "gone"], "val": ["case_01"]}),
        r"splits_final.json names 1 cases in fold 0 that are not among the labeled, preprocessed ones, gone the first",
    ),
    "split of unlabeled cases": (
        write_split({"train": ["case_00"], "val": ["scan_00"]}),
        r"names 1 cases in fold 0 .*, scan_00 the first \(cases of imagesUn do not belong there.*; mend it, or remove",
    ),
    "split without validation": (
        write_split({"train": ["case_00"], "val": []}),
        "splits_final.json has no cases to validate on in fold 0; mend it",
    ),
    "malformed split": (
        write_split({"train": ["case_00"], "val": [["case_01"]]}),
        "splits_final.json is no list of splits, .*; mend it, or remove it",
    ),
    "damaged fingerprint": (
        lambda base, raw: (base / "dataset_fingerprint.json").write_text("{"),
        "dataset_fingerprint.json is damaged; run: nnUNetv2_plan_and_preprocess -d 901 --clean",
    ),
    "damaged labeled case": (
        lambda base, raw: (base / "nnUNetPlans_3d_fullres" / "case_00.pkl").write_bytes(b""),
        "case_00.pkl is damaged; run: nnUNetv2_preprocess -d 901",
    ),
    "empty unlabeled case": (
        lambda base, raw: (base / "nnUNetPlans_3d_fullres_unlabeled" / "scan_01.b2nd").write_bytes(b""),
        "is stale: scan_01.b2nd is missing or empty; run: nnunet_dycon preprocess_unlabeled -d 901",
    ),
    "manifest without files": (
        lambda base, raw: (base / "nnUNetPlans_3d_fullres_unlabeled.json").write_text(
            json.dumps(json.loads((base / "nnUNetPlans_3d_fullres_unlabeled.json").read_text()) | {"files": None})
        ),
        "is stale: nnUNetPlans_3d_fullres_unlabeled.json is damaged; run: nnunet_dycon preprocess_unlabeled -d 901",
    ),
    "damaged split": (damage_split, "splits_final.json is no list of splits, .*; mend it, or remove it"),
    "damaged manifest": (
        damage_manifest,
        "is stale: nnUNetPlans_3d_fullres_unlabeled.json is damaged; run: nnunet_dycon preprocess_unlabeled -d 901",
    ),
    "damaged unlabeled image": (
        bad_image,
        r"1 of 4 unlabeled cases cannot be used; repair or remove them: .*imagesUn/scan_01_0000.nii.gz \(Compressed",
    ),
    "not preprocessed": (not_preprocessed, "does not exist; run: nnUNetv2_preprocess -d 901"),
}


@pytest.mark.parametrize(("break_it", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_end_every_training_in_one_line(base, raw, break_it, message):
    break_it(base, raw)
    for name in METHODS:
        trainer = make_trainer(deterministic(trainer_class(name)), fold=0)
        with pytest.raises(SystemExit, match=message) as stopped:
            trainer.run_training()
        assert "\n" not in str(stopped.value)
        assert trainer.network is None  # nothing was begun
        assert not list(Path(trainer.output_folder).glob("*.pth"))
        assert not (break_it is bad_image and (base / "nnUNetPlans_3d_fullres_unlabeled").exists())


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


def test_few_labeled_cases_with_a_split_or_fold_all_do_train(base, raw, train):
    few_labeled(base, raw)
    train(epochs=1, fold="all")
    (base / "splits_final.json").write_text(json.dumps([{"train": ["case_01"], "val": ["case_01"]}]))
    train(epochs=1, fold=0)


@pytest.mark.parametrize("name", SEMI_SUPERVISED)
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
    monkeypatch.setattr("nnunet_dycon.environment.metadata.version", lambda name: "2.7.0")
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


@pytest.mark.parametrize("name", SEMI_SUPERVISED)
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


def test_the_start_tells_batch_memory_steps_and_remedy(tiny, train):
    log = next(Path(train(epochs=1).output_folder).glob("training_log*")).read_text()
    assert "5 labeled and 4 unlabeled cases. Each of the 3 steps trains on 2 labeled and 2 unlabeled patches" in log
    assert "-gpu_memory_target" in log
    assert "unlabeled_batch_size=1" in log
