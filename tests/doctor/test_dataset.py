"""Checks of a raw data set with one fault each. All cases are preprocessed, so training needs few raw files."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.doctor.findings import FAIL, NOTE, OK, WARNING
from tests.tiny import tiny_volume, write_volume


def rewrite(file: Path, **entries: object) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def no_json(raw: Path) -> None:
    (raw / "dataset.json").unlink()


def damaged_json(raw: Path) -> None:
    (raw / "dataset.json").write_text("{")


def incomplete_json(raw: Path) -> None:
    rewrite(raw / "dataset.json", file_ending=None)


def other_number(raw: Path) -> None:
    rewrite(raw / "dataset.json", numTraining=7)


def misnamed(raw: Path) -> None:
    (raw / "imagesUn" / "scan_00_0000.nii.gz").rename(raw / "imagesUn" / "scan_00.nii.gz")


def misnamed_test(raw: Path) -> None:
    (raw / "imagesTs" / "test_00_0000.nii.gz").rename(raw / "imagesTs" / "test_00_0001.nii.gz")


def no_label(raw: Path) -> None:
    (raw / "labelsTr" / "case_01.nii.gz").unlink()


def no_image(raw: Path) -> None:
    (raw / "imagesTr" / "case_01_0000.nii.gz").unlink()


def no_unlabeled(raw: Path) -> None:
    shutil.rmtree(raw / "imagesUn")
    shutil.rmtree(raw.parents[1] / "nnUNet_preprocessed" / raw.name / "nnUNetPlans_3d_fullres_unlabeled")


def in_two_folders(raw: Path) -> None:
    shutil.copy(raw / "imagesTr" / "case_02_0000.nii.gz", raw / "imagesUn")


def held_out_and_unlabeled(raw: Path) -> None:
    shutil.copy(raw / "imagesUn" / "scan_02_0000.nii.gz", raw / "imagesTs")


def in_meters(raw: Path) -> None:
    for case in ("scan_00", "scan_01"):
        write_volume(tiny_volume(5)[0], raw / "imagesUn" / f"{case}_0000.nii.gz", spacing=(1e-3, 1e-3, 1e-3))


def held_out_in_cm(raw: Path) -> None:
    write_volume(tiny_volume(99)[0], raw / "imagesTs" / "test_00_0000.nii.gz", spacing=(0.1, 0.1, 0.1))


def four_dimensional(raw: Path) -> None:
    volume = sitk.JoinSeries([sitk.GetImageFromArray(tiny_volume(5)[0])] * 2)
    sitk.WriteImage(volume, str(raw / "imagesUn" / "scan_00_0000.nii.gz"))


def colored(raw: Path) -> None:
    volume = sitk.GetImageFromArray(tiny_volume(5)[0])
    sitk.WriteImage(sitk.Compose([volume] * 3), str(raw / "imagesUn" / "scan_00_0000.nii.gz"))


def not_an_image(raw: Path) -> None:
    (raw / "imagesTr" / "case_00_0000.nii.gz").write_text("no image")


def copied(raw: Path, source: str, target: str) -> None:
    """Write the same voxels under another name, with another type and header, without compression."""
    image = sitk.Cast(sitk.ReadImage(str(raw / source)), sitk.sitkFloat64)
    image.SetOrigin((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(raw / target), False)


def held_out_copy_of_labeled(raw: Path) -> None:
    copied(raw, "imagesTr/case_03_0000.nii.gz", "imagesTs/new_0000.nii.gz")


def held_out_copy_of_unlabeled(raw: Path) -> None:
    (raw / "imagesVal").mkdir()
    copied(raw, "imagesUn/scan_03_0000.nii.gz", "imagesVal/new_0000.nii.gz")


def unlabeled_copy_of_labeled(raw: Path) -> None:
    copied(raw, "imagesTr/case_03_0000.nii.gz", "imagesUn/new_0000.nii.gz")


# name: function that makes the fault, then check, status, message and remedy of its finding
FAULTS = {
    "no dataset.json": (no_json, "raw data", WARNING, "dataset.json cannot be read ([Errno 2]", "dataset_format.md"),
    "damaged dataset.json": (damaged_json, "raw data", WARNING, "dataset.json cannot be read (", "dataset_format.md"),
    "incomplete dataset.json": (incomplete_json, "raw data", WARNING, '"file_ending" is None', "dataset_format.md"),
    "numTraining": (other_number, "raw data", WARNING, "dataset.json is 7, but imagesTr has 5 cases", "correct"),
    "misnamed": (misnamed, "raw data", FAIL, "scan_00.nii.gz is not named CASE_XXXX", "rename it"),
    "misnamed test": (misnamed_test, "raw data", WARNING, "test case test_00 in", "add or remove files"),
    "no label": (no_label, "raw data", WARNING, "1 case of imagesTr has no label in labelsTr: case_01", "imagesUn"),
    "no image": (no_image, "raw data", WARNING, "1 label of labelsTr has no image in imagesTr: case_01", "remove"),
    "no unlabeled cases": (no_unlabeled, "raw data", FAIL, "no unlabeled cases", "put the unlabeled images there"),
    "two roles": (in_two_folders, "case names", FAIL, "1 case is in imagesTr and imagesUn: case_02", "from one of"),
    "two roles, held out": (held_out_and_unlabeled, "case names", WARNING, "imagesUn and imagesTs: scan_02", "from"),
    "m": (in_meters, "headers", FAIL, "scan_00_0000.nii.gz, scan_01_0000.nii.gz: its spacing, 0.001", "repair"),
    "cm, held out": (held_out_in_cm, "headers", WARNING, "imagesTs: test_00_0000.nii.gz: its spacing, 0.1", "repair"),
    "4D": (four_dimensional, "headers", FAIL, "scan_00_0000.nii.gz: 2 channels or time", "repair or remove"),
    "color": (colored, "headers", FAIL, "scan_00_0000.nii.gz: 3 values per voxel", "repair or remove"),
    "not an image": (not_an_image, "headers", WARNING, "case_00_0000.nii.gz: it is neither a gzip", "repair or remove"),
    "test = labeled": (
        held_out_copy_of_labeled, "duplicates", WARNING,
        "1 image is the same in imagesTr and imagesTs: case_03 = new", "scores on training images are not valid",
    ),
    "val = unlabeled": (
        held_out_copy_of_unlabeled, "duplicates", WARNING,
        "1 image is the same in imagesUn and imagesVal: scan_03 = new", "report with the scores",
    ),
    "unlabeled = labeled": (
        unlabeled_copy_of_labeled, "duplicates", WARNING,
        "1 image is the same in imagesTr and imagesUn: case_03 = new", "remove them from imagesUn",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("break_it", "check", "status", "message", "remedy"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_is_reported_with_its_remedy(raw, doctor, find, break_it, check, status, message, remedy):
    break_it(raw)
    code, findings = doctor("-d 901 -f 0")
    find(findings, check, status, message, remedy)
    assert not [finding for finding in findings if "the check itself failed" in finding.message]
    # A new image in imagesUn makes the preprocessed unlabeled cases out of date.
    assert code == (status == FAIL or break_it is unlabeled_copy_of_labeled)


def test_image_in_two_folders_under_one_name_is_reported_once(raw, doctor, find):
    in_two_folders(raw)
    find(doctor("-d 901")[1], "duplicates", OK, "no image is in two folders under different names")


def test_raw_faults_of_labeled_cases_fail_before_preprocessing(base, raw, doctor, find):
    shutil.rmtree(base)
    no_label(raw)
    not_an_image(raw)
    findings = doctor("-d 901")[1]
    find(findings, "raw data", FAIL, "1 case of imagesTr has no label in labelsTr: case_01")
    find(findings, "headers", FAIL, "case_00_0000.nii.gz: it is neither a gzip")


def test_label_files_are_checked_before_preprocessing(base, raw, doctor, find):
    shutil.rmtree(base)
    find(doctor("-d 901")[1], "labels", OK, "5 files have the labels of dataset.json")
    write_volume(np.full((24, 32, 40), 4, np.uint8), raw / "labelsTr" / "case_00.nii.gz")
    (raw / "labelsTr" / "case_01.nii.gz").write_text("no label")
    rewrite(raw / "dataset.json", labels={"background": 0, "large": 1, "small": 2, "tiny": 3})
    findings = doctor("-d 901")[1]
    find(findings, "labels", FAIL, "case_00.nii.gz: label values that dataset.json does not name: 4", "repair")
    find(findings, "labels", FAIL, "case_01.nii.gz: cannot be read", "repair")
    find(findings, "labels", WARNING, "no file of labelsTr has a voxel with the label 3", "cannot learn")


def test_labels_on_another_grid_than_their_images_are_reported(raw, doctor, find):
    label = sitk.ReadImage(str(raw / "labelsTr" / "case_00.nii.gz"))
    sitk.WriteImage(sitk.DICOMOrient(label, "RAS"), str(raw / "labelsTr" / "case_00.nii.gz"))
    write_volume(np.zeros((24, 32, 39), np.uint8), raw / "labelsTr" / "case_01.nii.gz")
    findings = doctor("-d 901")[1]
    find(findings, "labels", WARNING, "case_00.nii.gz: spacing, origin or directions of the label", "resample")
    find(findings, "labels", WARNING, "case_01.nii.gz: number of channels or size of the label", "resample")


def test_nan_in_labels_fails(base, raw, doctor, find):
    shutil.rmtree(base)
    nan = np.full((40, 32, 24), np.nan, np.float32)
    nibabel.save(nibabel.Nifti1Image(nan, np.diag([-1.0, -1, 1, 1])), raw / "labelsTr" / "case_00.nii.gz")
    find(doctor("-d 901")[1], "labels", FAIL, "case_00.nii.gz: cannot be read", "repair")


def test_preprocessed_cases_need_no_raw_data(raw, doctor, find, monkeypatch):
    shutil.rmtree(raw)
    code, findings = doctor("-d 901 -f 0")
    find(findings, "raw data", NOTE, f"{raw} does not exist; all cases are preprocessed")
    assert code == 0
    monkeypatch.delenv("nnUNet_raw")
    code, findings = doctor("-d Dataset901_Tiny -f 0")
    assert code == 0
    assert {"labeled", "unlabeled"} <= {finding.check for finding in findings if finding.status == OK}


@pytest.mark.parametrize("closed", ["", "imagesUn", "labelsTr"])
def test_folder_that_cannot_be_entered_is_named_and_not_needed(raw, doctor, find, monkeypatch, closed):
    def refusing(function):
        def enter(path, *arguments, **options):
            if path == raw / (closed or "dataset.json"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return enter

    name = "iterdir" if closed else "read_text"
    monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    code, findings = doctor("-d 901 -f 0")
    message = f"{raw / closed} cannot be entered" if closed else f"{raw}/dataset.json cannot be read"
    find(findings, "raw data", WARNING, message, "change its permissions")
    assert not [finding for finding in findings if "the check itself failed" in finding.message]
    assert code == 0


def test_missing_files_are_one_finding(raw, doctor, find):
    for file in (raw / "imagesTr").iterdir():
        file.unlink()
        file.symlink_to("gone")
    names = "case_00_0000.nii.gz, case_01_0000.nii.gz, case_02_0000.nii.gz and 2 more"
    message = f"{names}: cannot be read ([Errno 2] No such file or directory"
    find(doctor("-d 901")[1], "headers", WARNING, message)


def test_only_images_of_equal_size_are_read(raw, doctor, find):
    write_volume(tiny_volume(0, (20, 20, 20))[0], raw / "imagesTs" / "new_0000.nii.gz")
    find(doctor("-d 901")[1], "duplicates", OK, "(11 images of equal size were compared)")


def test_images_are_not_compared_if_this_is_skipped(raw, doctor):
    shutil.copy(raw / "imagesTr" / "case_00_0000.nii.gz", raw / "imagesTs" / "copy_0000.nii.gz")
    checks = {finding.check for finding in doctor("-d 901 --skip_duplicates")[1]}
    assert "headers" in checks
    assert "duplicates" not in checks


def test_at_most_three_cases_are_named(raw, doctor, find):
    for number in range(5):
        (raw / "labelsTr" / f"case_{number:02d}.nii.gz").unlink()
    message = "5 cases of imagesTr have no label in labelsTr: case_00, case_01, case_02 and 2 more"
    find(doctor("-d 901")[1], "raw data", WARNING, message)


def test_unknown_data_set_fails(tiny, doctor, find):
    code, findings = doctor("-d 902")
    find(findings, "data set", FAIL, "there is no data set 902 that nnU-Net can use", "correct the ID")
    assert code == 1
    find(doctor("-d Dataset_Tiny")[1], "data set", FAIL, "there is no data set Dataset_Tiny")
