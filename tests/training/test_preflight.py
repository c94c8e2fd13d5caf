"""Tests of preflight checks: invalid data or settings raise a one-line error before a training starts."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.errors import UserError
from nnunet_dycon.system.locks import Lock
from nnunet_dycon.training import preflight
from nnunet_dycon.training.preflight import TrainingLock, check_cases, check_settings, describe_batch
from nnunet_dycon.training.settings import TrainingSettings
from tests.tiny import UNLABELED, few_labeled


def remove_unlabeled(base: Path, raw: Path) -> None:
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled")
    shutil.rmtree(raw / "imagesUn")


def rename_labeled_to_unlabeled(base: Path, raw: Path) -> None:
    """Simulate an unlabeled case that was annotated later but not removed from imagesUn."""
    for file in (base / "nnUNetPlans_3d_fullres").glob("case_00*"):
        file.rename(file.with_name(file.name.replace("case_00", UNLABELED[0])))


def few_splits(base: Path, raw: Path) -> None:
    few_labeled(base, raw)
    (base / "splits_final.json").write_text("[]")


def lost_label(base: Path, raw: Path) -> None:
    """Simulate a label that was removed after planning."""
    for file in (base / "nnUNetPlans_3d_fullres").glob("case_04*"):
        file.unlink()
    (base / "splits_final.json").write_text(json.dumps([{"train": ["case_00"], "val": ["case_01"]}]))


def other_plans(base: Path, raw: Path) -> None:
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["RescaleTo01Normalization"]
    file.write_text(json.dumps(plans))


def other_spacing(base: Path, raw: Path) -> None:
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
    (base / "nnUNetPlans_3d_fullres_unlabeled" / "manifest.json").write_text("{")


def change_manifest(base: Path, **entries: object) -> None:
    file = base / "nnUNetPlans_3d_fullres_unlabeled" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def bad_image(base: Path, raw: Path) -> None:
    """Truncate an unlabeled image that has not been preprocessed."""
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled")
    image = raw / "imagesUn" / "scan_01_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:3000])


FAULTS = {
    "no unlabeled cases": (remove_unlabeled, "no unlabeled cases: .*imagesUn"),
    "labeled and unlabeled": (
        rename_labeled_to_unlabeled,
        "1 case is both labeled and unlabeled: scan_00; either remove it from",
    ),
    "too few for a split": (few_labeled, "4 labeled cases are too few for nnU-Net's split into 5 folds, .*fold 'all'"),
    "fold not in the split": (few_splits, "fold 0 does not exist: 4 labeled cases are too few .*; train on all"),
    "fingerprint out of date": (
        lost_label,
        r"fingerprint.json was made \(then 5 cases, now 4\); run: .* -d 901 --clean",
    ),
    "out of date": (
        other_plans,
        "is out of date: the plans have changed; run: nnunet_dycon preprocess_unlabeled -d 901 -c 3d_full",
    ),
    "labeled cases of other plans": (
        other_spacing,
        "cases in .*nnUNetPlans_3d_fullres are out of date: their shapes .* by hand: nnUNetv2_preprocess -d 901",
    ),
    "split of absent cases": (
        write_split({"train": ["case_00", "gone"], "val": ["case_01"]}),
        r"splits_final.json: fold 0 lists 1 case that is not among the preprocessed labeled cases: gone",
    ),
    "split of unlabeled cases": (
        write_split({"train": ["case_00"], "val": ["scan_00"]}),
        r"fold 0 lists 1 case .*: scan_00; fix it, remove it .* \(do not list cases of imagesUn",
    ),
    "split without validation": (
        write_split({"train": ["case_00"], "val": []}),
        "splits_final.json has no cases to validate on in fold 0; fix it",
    ),
    "malformed split": (
        write_split({"train": ["case_00"], "val": [["case_01"]]}),
        "splits_final.json is not a list of splits .*; fix it, remove it",
    ),
    "damaged fingerprint": (
        lambda base, raw: (base / "dataset_fingerprint.json").write_text("{"),
        "dataset_fingerprint.json is damaged; run: nnUNetv2_plan_and_preprocess -d 901 --clean",
    ),
    "damaged labeled case": (
        lambda base, raw: (base / "nnUNetPlans_3d_fullres" / "case_00.b2nd").write_bytes(b""),
        "case case_00 in .*nnUNetPlans_3d_fullres is damaged; run: nnUNetv2_preprocess -d 901",
    ),
    "empty unlabeled case": (
        lambda base, raw: (base / "nnUNetPlans_3d_fullres_unlabeled" / "scan_01.b2nd").write_bytes(b""),
        "is out of date: scan_01.b2nd is missing or empty; run: nnunet_dycon preprocess_unlabeled -d 901",
    ),
    "manifest without files": (
        lambda base, raw: (base / "nnUNetPlans_3d_fullres_unlabeled" / "manifest.json").write_text(
            json.dumps(
                json.loads((base / "nnUNetPlans_3d_fullres_unlabeled" / "manifest.json").read_text()) | {"files": None}
            )
        ),
        "is out of date: manifest.json is damaged; run: nnunet_dycon preprocess_unlabeled -d 901",
    ),
    "damaged split": (damage_split, "splits_final.json is not a list of splits .*; fix it, remove it"),
    "damaged manifest": (
        damage_manifest,
        "is out of date: manifest.json is damaged; run: nnunet_dycon preprocess_unlabeled -d 901",
    ),
    "damaged unlabeled image": (
        bad_image,
        r"1 of 4 unlabeled cases cannot be used; repair or remove it: .*imagesUn/scan_01_0000.nii.gz \(Compressed",
    ),
    "not preprocessed": (not_preprocessed, "does not exist; run: nnUNetv2_preprocess -d 901"),
}


def check() -> None:
    unlabeled = UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans")
    check_cases(unlabeled.folder.with_name("nnUNetPlans_3d_fullres"), 0, unlabeled)


def test_valid_dataset_passes(base):
    check()


@pytest.mark.parametrize(("break_it", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_invalid_dataset_raises(base, raw, monkeypatch, break_it, message):
    monkeypatch.setattr(preflight, "default_num_processes", 1)
    break_it(base, raw)
    with pytest.raises(UserError, match=message) as fault:
        check()
    assert "\n" not in str(fault.value)
    assert not (break_it is bad_image and (base / "nnUNetPlans_3d_fullres_unlabeled").exists())


@dataclass(frozen=True)
class MethodSettings:
    temperature: float = 0.6
    mixing: str = "none"


@dataclass(frozen=True)
class Length:
    num_epochs: int = 1000


CURRENT = {"training_settings": Length(), "method_settings": MethodSettings()}
RECORDED = {"training_settings": {"num_epochs": 1000}, "method_settings": {"temperature": 0.6, "mixing": "none"}}


def changed(kind: str, **settings) -> dict:
    return {**RECORDED, kind: {**RECORDED[kind], **settings}}


def test_equal_settings_pass():
    lines = []
    check_settings(RECORDED, CURRENT, "fold_0", lines.append)
    assert not lines


@pytest.mark.parametrize(
    ("recorded", "current", "message"),
    [
        (
            changed("method_settings", temperature=0.1),
            CURRENT,
            r"temperature 0.1 \(now 0.6\); change them back to resume, or",
        ),
        (
            {**RECORDED, "method_settings": {"temperature": 0.6}},
            CURRENT,
            r"mixing None \(now none\); change them back to resume",
        ),
    ],
)
def test_changed_method_settings_raise(recorded, current, message):
    with pytest.raises(UserError, match=f"the checkpoint in fold_0 was trained with other settings: {message}"):
        check_settings(recorded, current, "fold_0", pytest.fail)


def test_changed_length_logs_a_warning():
    lines = []
    check_settings(changed("training_settings", num_epochs=2), CURRENT, "fold_0", lines.append)
    assert lines == ["WARNING: the resumed training had other settings: num_epochs 2 (now 1000); the new ones are used"]


def test_settings_that_are_newer_than_the_checkpoint_are_no_difference():
    settings = TrainingSettings()
    recorded = asdict(settings)
    for name in ("learning_rate_factor", "warmup", "frozen_encoder"):
        del recorded[name]
    check_settings({"training_settings": recorded}, {"training_settings": settings}, "fold_0", pytest.fail)


def test_log_line_on_the_batch_and_its_memory():
    trainer = SimpleNamespace(
        batch_size=2, unlabeled_batch_size=1, configuration_manager=SimpleNamespace(batch_size=4),
        activation_memory_factor=2.0, num_epochs=10, num_iterations_per_epoch=25,
        unlabeled_cases=SimpleNamespace(is_raw_reachable=lambda: False),
    )  # fmt: skip
    cases = {"labeled": ["a", "b", "c"], "unlabeled": ["d"], "sparse": []}
    line = describe_batch(trainer, SimpleNamespace(identifiers=cases))
    assert line.startswith(
        "3 labeled and 1 unlabeled cases. Each of the 250 steps trains on 2 labeled and 1 unlabeled patches: about 1.5 "
        "times the memory"
    )
    assert "-gpu_memory_target at 1/1.5 " in line
    assert "unlabeled_batch_size=1" in line
    line = describe_batch(trainer, SimpleNamespace(identifiers=cases | {"sparse": ["a", "c"]}))
    assert "cases. Sparsely annotated: 2 labeled; their images are also used as unlabeled ones. Each" in line
    assert "WARNING" not in line
    line = describe_batch(trainer, SimpleNamespace(identifiers=cases | {"unlabeled": [], "sparse": ["a"]}))
    assert "WARNING: imagesUn could not be searched" in line


def test_unfinished_checkpoint_of_a_killed_training_is_removed(tmp_path):
    """Its temporary name is not used again, so such files would fill the disk."""
    for name in (".checkpoint_latest.pth.0123abcd.partial", "checkpoint_latest.pth"):
        (tmp_path / name).touch()
    unlabeled = SimpleNamespace(use=lambda work: Lock(tmp_path / "use.lock", work))
    lock = TrainingLock(tmp_path, unlabeled, print)
    lock.acquire()
    lock.close()
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_latest.pth"]
