"""Checks of one training with one fault each."""

import json
import shutil
from contextlib import closing
from math import prod
from pathlib import Path
from types import SimpleNamespace

import blosc2
import pytest

from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.doctor import training
from nnunet_dycon.doctor.findings import FAIL, NOTE, OK, WARNING
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.system.locks import Lock
from tests.tiny import UNLABELED, tiny_volume, write_volume

FOLDER = "nnUNetPlans_3d_fullres"


def change_plans(base: Path, **entries: object) -> None:
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"] |= entries
    file.write_text(json.dumps(plans))


def no_plans(base: Path) -> None:
    (base / "nnUNetPlans.json").unlink()


def useless_plans(base: Path) -> None:
    (base / "nnUNetPlans.json").write_text('{"configurations": {}}')


def not_preprocessed(base: Path) -> None:
    shutil.rmtree(base / FOLDER)


def nothing_preprocessed(base: Path) -> None:
    shutil.rmtree(base / FOLDER)
    (base / FOLDER).mkdir()


def half_preprocessed(base: Path) -> None:
    (base / FOLDER / "case_01.pkl").unlink()


def no_references(base: Path) -> None:
    shutil.rmtree(base / "gt_segmentations")


def no_fingerprint(base: Path) -> None:
    (base / "dataset_fingerprint.json").unlink()


def fingerprint_out_of_date(base: Path) -> None:
    for file in (base / FOLDER).glob("case_04*"):
        file.unlink()


def relabeled(base: Path) -> None:
    raw = base.parents[1] / "nnUNet_raw" / base.name
    shutil.copy(raw / "labelsTr" / "case_00.nii.gz", raw / "labelsTr" / "case_05.nii.gz")


def unlabeled_not_preprocessed(base: Path) -> None:
    shutil.rmtree(base / f"{FOLDER}_unlabeled")


def unlabeled_out_of_date(base: Path) -> None:
    change_plans(base, spacing=[2.0, 1.0, 1.0])


def labeled_and_unlabeled(base: Path) -> None:
    raw = base.parents[1] / "nnUNet_raw" / base.name
    for folder in (base / FOLDER, base / "gt_segmentations", raw / "imagesTr", raw / "labelsTr"):
        for file in folder.glob("case_00*"):
            file.rename(file.with_name(file.name.replace("case_00", UNLABELED[0])))


def interrupted(base: Path) -> None:
    (base / f"{FOLDER}_unlabeled.0123456789ab.partial").mkdir()


def splits(*folds: tuple[list[str], list[str]]):
    def write(base: Path) -> None:
        content = [{"train": train, "val": val} for train, val in folds]
        (base / "splits_final.json").write_text(json.dumps(content))

    return write


def regions(base: Path) -> None:
    file = base / "dataset.json"
    labels = {"background": 0, "both": [1, 2], "small": [2]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"labels": labels, "regions_class_order": [1, 2]}))


def trained(checkpoint: str):
    def write(base: Path) -> None:
        folder = (
            base.parents[1] / "nnUNet_results" / base.name / "nnUNetTrainerWeakToStrong__nnUNetPlans__3d_fullres/fold_0"
        )
        folder.mkdir(parents=True)
        (folder / checkpoint).touch()

    return write


THREE, TWO = ["case_00", "case_01", "case_02"], ["case_03", "case_04"]
# name: function that makes the fault, then check, status, message and remedy of its finding
FAULTS = {
    "no plans": (no_plans, "plans", FAIL, "nnUNetPlans.json does not exist", "nnUNetv2_plan_and_preprocess -d 901"),
    "useless plans": (useless_plans, "plans", FAIL, "has no configuration 3d_fullres", "plan again"),
    "not preprocessed": (not_preprocessed, "labeled", FAIL, "does not exist", "nnUNetv2_preprocess -d 901 -c 3d_full"),
    "nothing preprocessed": (nothing_preprocessed, "labeled", FAIL, "has no preprocessed cases", "nnUNetv2_prep"),
    "half": (half_preprocessed, "labeled", FAIL, "lacks files of case_01", "nnUNetv2_preprocess -d 901"),
    "no references": (no_references, "labeled", FAIL, "has no case_00, case_01, case_02 and 2 more", "nnUNet"),
    "no fingerprint": (no_fingerprint, "labeled", FAIL, "has no dataset_fingerprint.json",
                       "nnUNetv2_extract_fingerprint -d 901 --clean"),
    "fingerprint": (fingerprint_out_of_date, "labeled", FAIL, "(then 5 cases, now 4)", "-d 901 --clean"),
    "relabeled": (relabeled, "labeled", WARNING, "5 cases are preprocessed, but labelsTr has 6; in only one: c", "-d"),
    "unlabeled": (unlabeled_not_preprocessed, "unlabeled", NOTE, "4 unlabeled cases are not prep", "ss_unlabeled -d"),
    "out of date": (unlabeled_out_of_date, "unlabeled", FAIL, "is out of date: the plans", "first run: nnUNetv2_pre"),
    "both": (labeled_and_unlabeled, "unlabeled", FAIL, "1 case is both labeled and unlabeled", "remove it from"),
    "interrupted": (interrupted, "unlabeled", NOTE, "0123456789ab.partial is left from an interrupted", None),
    "split of others": (splits((THREE, ["gone"])), "split", FAIL, "fold 0 lists 1 case that is not", "fix it"),
    "split of unlabeled": (splits((UNLABELED, TWO)), "split", FAIL, "fold 0 lists 4 cases that are not", "fix it"),
    "split that overlaps": (splits((THREE, THREE + TWO)), "split", WARNING, "trains and validates on case_00", "if"),
    "split without fold": (splits(), "split", WARNING, "has no fold 0; nnU-Net would train on a random 80 %", "choose"),
    "split of some": (splits((THREE, TWO[:1])), "split", NOTE, "fold 0 does not use 1 labeled case: case_04", None),
    "trained": (trained("checkpoint_final.pth"), "results", NOTE, "contains a finished training; a new one", "add --c"),
    "interrupted training": (trained("checkpoint_latest.pth"), "results", NOTE, "0 contains a training", "add --c"),
}  # fmt: skip


@pytest.mark.parametrize(("break_it", "check", "status", "message", "remedy"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_is_reported_with_its_remedy(base, doctor, find, break_it, check, status, message, remedy):
    break_it(base)
    code, findings = doctor("-d 901 -f 0")
    find(findings, check, status, message, remedy)
    assert code == (status == FAIL)
    others = [finding for finding in findings if finding.check not in (check, "raw data")]
    assert WARNING not in {finding.status for finding in others}
    assert not [finding for finding in findings if "the check itself failed" in finding.message]


def test_fault_that_several_checks_find_is_reported_once(base, doctor):
    not_preprocessed(base)
    messages = [finding.message for finding in doctor("-d 901 -f 0")[1]]
    assert len([message for message in messages if message.endswith(f"{FOLDER} does not exist")]) == 1


@pytest.mark.parametrize("name", [name for name, trainer in TRAINERS.items() if not trainer.is_supervised])
def test_every_trainer_can_be_checked(base, doctor, name):
    code, findings = doctor(f"-d 901 -f 0 -tr {name}")
    assert {finding.status for finding in findings} == {OK, NOTE}
    assert {"disk", "GPU memory"} <= {finding.check for finding in findings}
    assert code == 0


def test_a_supervised_trainer_needs_no_unlabeled_cases(base, doctor, find):
    for folder in base.glob("*_unlabeled*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    code, findings = doctor("-d 901 -f 0 -tr nnUNetTrainerUXNet")
    assert code == 0
    assert "unlabeled" not in {finding.check for finding in findings}
    find(findings, "labeled", OK, "5 cases in")


def test_regions_are_supported(base, doctor, find):
    regions(base)
    code, findings = doctor("-d 901 -f 0")
    find(findings, "trainer", OK, "nnUNetTrainerWeakToStrong can train 3d_fullres")
    assert code == 0


def test_memory_estimate_includes_both_views_of_a_patch(base, doctor, find):
    find(doctor("-d 901 -f 0 -tr nnUNetTrainerDKUXNet")[1], "GPU memory", NOTE, "about 9 times the memory")


def test_cascade_is_not_supported(base, doctor, find):
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))
    code, findings = doctor("-d 901 -c 3d_cascade_fullres -f 0")
    find(findings, "trainer", FAIL, "nnUNetTrainerWeakToStrong cannot train 3d_cascade_fullres")
    assert code == 1


def few(base: Path) -> None:
    """Reduce the labeled cases to 4, also in the fingerprint."""
    fingerprint_out_of_date(base)
    file = base / "dataset_fingerprint.json"
    fingerprint = json.loads(file.read_text())
    for entry in ("shapes_after_crop", "spacings"):
        fingerprint[entry].pop()
    file.write_text(json.dumps(fingerprint))


@pytest.mark.parametrize(
    ("fold", "status", "message"),
    [
        ("-f 0", FAIL, "4 labeled cases are too few for nnU-Net's split into 5 folds"),
        ("", NOTE, "4 labeled cases are too few for nnU-Net's split into 5 folds"),
        ("-f all", OK, "fold all trains and validates on all 4 cases"),
    ],
)
def test_four_labeled_cases_allow_only_fold_all(base, doctor, find, fold, status, message):
    few(base)
    code, findings = doctor(f"-d 901 {fold}")
    find(findings, "split", status, message, None if status == OK else "'all'")
    assert code == (status == FAIL)


def test_fold_beyond_nnunets_split_is_a_warning(base, doctor, find):
    (base / "splits_final.json").unlink(missing_ok=True)
    code, findings = doctor("-d 901 -f 5")
    find(findings, "split", WARNING, "fold 5 on a random 80 % of the cases", "folds 0 to 4")
    assert code == 0


def test_without_a_fold_every_fold_is_checked(base, doctor, find):
    splits((THREE, TWO), (TWO, ["gone"]))(base)
    find(doctor("-d 901")[1], "split", FAIL, "fold 1 lists")
    assert doctor("-d 901 -f 0")[0] == 0


def test_preprocessing_in_another_process_is_reported(base, doctor, find):
    unlabeled_not_preprocessed(base)
    interrupted(base)
    lock = Lock(base / f"{FOLDER}_unlabeled.lock", "preprocessing")
    lock.acquire()
    with closing(lock):
        code, findings = doctor("-d 901 -f 0")
    find(findings, "unlabeled", NOTE, "another process is preprocessing the unlabeled cases now")
    assert not [finding for finding in findings if "interrupted" in finding.message]
    assert code == 0


def test_unwritable_results_folder_fails(base, doctor, find):
    folder = base.parents[1] / "nnUNet_results" / base.name
    folder.touch()
    code, findings = doctor("-d 901 -f 0")
    find(findings, "results", FAIL, f"{folder} cannot be written to", "change")
    assert code == 1


def test_full_disk_fails(base, doctor, find, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=10**5))
    unlabeled_not_preprocessed(base)
    code, findings = doctor("-d 901 -f 0")
    find(findings, "disk", FAIL, "MB for checkpoints; 0 MB are free", "free disk space")
    find(findings, "disk", WARNING, "MB for unlabeled cases, at most; 0 MB are free", "free disk space")
    assert code == 1


def unlabeled_cases() -> UnlabeledCases:
    return UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans")


def test_size_of_unlabeled_cases_equals_their_arrays(base):
    assert training._unlabeled_bytes(unlabeled_cases()) == sum(
        4 * prod(blosc2.open(str(base / f"{FOLDER}_unlabeled" / f"{case}.b2nd")).shape) for case in UNLABELED
    )


@pytest.mark.parametrize(
    ("spacing", "transpose", "ratio"),
    [
        ([2.0, 1.0, 1.0], [0, 1, 2], 3 / 2),
        ([0.5, 0.5, 2.0], [2, 1, 0], 3 * 2),
        ([2.0, 4.0], [0, 1, 2], 1 / 8),
        ([2.0, 4.0], [2, 1, 0], 3 / 8),
    ],
)
def test_size_of_unlabeled_cases_depends_on_the_spacing(base, raw, spacing, transpose, ratio):
    """Slices are 3 mm thick. In 2D, the first of the transposed axes is not resampled."""
    for case in UNLABELED:
        write_volume(tiny_volume(0)[0], raw / "imagesUn" / f"{case}_0000.nii.gz", spacing=(1.0, 1.0, 3.0))
    change_plans(base, spacing=spacing)
    plans = json.loads((base / "nnUNetPlans.json").read_text())
    (base / "nnUNetPlans.json").write_text(json.dumps(plans | {"transpose_forward": transpose}))
    assert training._unlabeled_bytes(unlabeled_cases()) == pytest.approx(4 * 4 * 24 * 32 * 40 * ratio)


def large(base: Path) -> None:
    """Change the plans to those of nnU-Net for large images and 8 GB."""
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": [128, 128, 128], "batch_size": 2}
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": 6,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "kernel_sizes": [[3, 3, 3]] * 6,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
        "n_conv_per_stage": [2] * 6,
        "n_conv_per_stage_decoder": [2] * 5,
    }
    file.write_text(json.dumps(plans))


def test_gpu_memory_is_compared_with_the_estimate(base, doctor, find, pretend_a_gpu):
    """Twice the patches need twice the planned memory, which is a little less than 8 GB."""
    large(base)
    note = find(doctor("-d 901 -f 0")[1], "GPU memory", NOTE, "2 labeled and 2 unlabeled patches")
    gigabytes = float(note.message.split()[1])
    assert 12 <= gigabytes <= 16
    pretend_a_gpu(gigabytes + 1)
    find(doctor("-d 901 -f 0")[1], "GPU memory", OK, f"the GPU has {gigabytes + 1:.0f}")
    pretend_a_gpu(gigabytes - 1)
    code, findings = doctor("-d 901 -f 0")
    find(
        findings,
        "GPU memory",
        WARNING,
        f"the GPU has {gigabytes - 1:.0f}",
        "-gpu_memory_target 6 -overwrite_plans_name",
    )
    assert code == 0


def test_two_networks_need_twice_the_memory_and_disk_space(base, doctor, find):
    large(base)
    one, two = (
        find(doctor(f"-d 901 -f 0 -tr {trainer}")[1], "GPU memory", NOTE, "2 labeled and 2 unlabeled patches")
        for trainer in ("nnUNetTrainerDyCON", "nnUNetTrainerUGPL")
    )
    # nnU-Net plans its residual encoder U-Net for the same memory.
    assert 1.8 <= float(two.message.split()[1]) / float(one.message.split()[1]) <= 2.3
    networks = training.build_students(training.find_trainer("nnUNetTrainerUGPL"), unlabeled_cases())
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    room = training.check_disk(training.find_trainer("nnUNetTrainerUGPL"), unlabeled_cases())
    assert next(room).message.startswith(f"{4 * 2 * sum(sizes) * 4 / 1e9:.1f} GB for checkpoints")
