"""Tests of the left atrium converter through the command line: layouts, axes, spacing, errors.

Labels of unlabeled cases are never read.
"""

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.la import plan
from nnunet_dycon.dataset_conversion.protocols import published
from nnunet_dycon.errors import UserError
from tests.dataset_conversion.la_sources import SHAPE, convert, read, record, stems, volumes, write_nrrd

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(cases):
    return [case.identifier for case in cases]


def checksums(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Listing of cases


def test_plan_of_the_challenge_layout(tmp_path):
    training, testing = tmp_path / "Training Set", tmp_path / "Testing Set"
    touch(training / "B" / "lgemri.nrrd", training / "B" / "laendo.nrrd", training / "B" / "lawall.nrrd")
    touch(training / "A" / "lgemri.nrrd", training / "A" / "desktop.ini", tmp_path / "Unet.py")
    touch(testing / "T" / "lgemri.nrrd", testing / "T" / "laendo.nrrd")
    found = plan(tmp_path)
    assert names(found.training) == ["A", "B"]
    assert [case.label for case in found.training] == [None, training / "B" / "laendo.nrrd"]
    assert names(found.test) == ["T"]
    assert (found.ordered, found.warnings) == (False, ())
    alone = plan(training)
    assert (alone.training, alone.test) == (found.training, ())


@pytest.mark.parametrize("folder", ["2018LA_Seg_Training Set", "2018LA_Seg_TrainingSet", "LA_data"])
@pytest.mark.parametrize("inside", [False, True])
def test_plan_of_the_h5_layout_with_lists(tmp_path, folder, inside):
    for identifier in "ABCDE":
        touch(tmp_path / folder / identifier / "mri_norm2.h5")
    (tmp_path / "train.list").write_text("C\nA\n\nX\n")
    (tmp_path / "test.list").write_text("E\r\nY\r\n")
    found = plan(tmp_path / folder if inside else tmp_path)
    assert found.ordered
    assert (names(found.training), names(found.test), names(found.unlisted)) == (["C", "A"], ["E"], ["B", "D"])
    assert found.warnings == ("2 of the cases of train.list and test.list are absent and not used: X, Y",)


def test_plan_reports_folders_without_image(tmp_path):
    touch(tmp_path / "Training Set" / "A" / "lgemri.nrrd", tmp_path / "Training Set" / "B" / "desktop.ini")
    assert "1 folder in" in plan(tmp_path).warnings[0]
    assert plan(tmp_path).warnings[0].endswith(": B")


def test_case_in_two_folders_raises(tmp_path):
    touch(tmp_path / "Training Set" / "A" / "lgemri.nrrd", tmp_path / "Testing Set" / "A" / "lgemri.nrrd")
    with pytest.raises(UserError, match="case A is in Testing Set and in the training cases"):
        plan(tmp_path)
    touch(tmp_path / "LA_data" / "A" / "mri_norm2.h5")
    with pytest.raises(UserError, match="case A is in"):
        plan(tmp_path)


def test_case_in_both_lists_raises(tmp_path):
    touch(tmp_path / "LA_data" / "A" / "mri_norm2.h5")
    for name in ("train.list", "test.list"):
        (tmp_path / name).write_text("A\n")
    with pytest.raises(UserError, match=r"case A is in train\.list and in test\.list"):
        plan(tmp_path)


def test_empty_source_raises(tmp_path):
    with pytest.raises(UserError, match=r"expected 'Training Set/<id>/lgemri\.nrrd'"):
        plan(tmp_path)


# Conversion


def test_published_protocol(h5_source, target, capsys):
    protocol = published("la", "uamt")
    assert convert(h5_source([*protocol.train, *protocol.test[:2], "X"]), "--protocol", "uamt", "--labeled", "10%") == 0
    assert record(target)["labeled"] == list(protocol.train[:8])
    assert record(target)["unlabeled"] == list(protocol.train[8:])
    assert (record(target)["test"], record(target)["left_out"]) == (list(protocol.test[:2]), ["X"])
    printed = capsys.readouterr().out
    assert "0RZDK210BSMWAA6467LU (labeled from 4 labels on) and CMPXO4J23G58J53Q98SZ (unlabeled) are copies" in printed
    assert "18 of the 100 cases of protocol uamt are absent" in printed


@pytest.mark.parametrize(("fraction", "labels"), [("10%", 1), ("50%", 3), ("100%", 5), ("1%", 1)])
def test_labeled_fraction(nrrd_source, target, fraction, labels):
    assert convert(nrrd_source("ABCDEF", without_label="C"), "--labeled", fraction) == 0
    assert len(record(target)["labeled"]) == labels


def test_nrrd_voxels_labels_and_spacing(nrrd_source, target):
    assert convert(nrrd_source(["A"]), "--spacing", 1.25) == 0
    image, array = read(target / "imagesTr" / "A_0000.nii.gz")
    label, label_array = read(target / "labelsTr" / "A.nii.gz")
    expected_image, expected_label = volumes(0)
    assert array[1, 2, 3] == 250
    np.testing.assert_array_equal(array, expected_image)
    np.testing.assert_array_equal(label_array, expected_label)
    assert (image.GetPixelID(), label.GetPixelID()) == (sitk.sitkUInt8, sitk.sitkUInt8)
    for each in (image, label):
        assert (each.GetSize(), each.GetSpacing(), each.GetOrigin()) == (SHAPE, (1.25,) * 3, (0, 0, 0))
        assert each.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)


def test_h5_axes_and_type(h5_source, target, capsys):
    assert convert(h5_source(["A"])) == 0
    image, array = read(target / "imagesTr" / "A_0000.nii.gz")
    assert array[1, 2, 3] == np.float32(1.5)
    np.testing.assert_array_equal(array, volumes(0)[0].astype(np.float32) / 100 - 1)
    np.testing.assert_array_equal(read(target / "labelsTr" / "A.nii.gz")[1], volumes(0)[1])
    assert (image.GetPixelID(), image.GetSize(), image.GetSpacing()) == (sitk.sitkFloat32, SHAPE, (0.625,) * 3)
    assert "spacing of 0.625 mm" in capsys.readouterr().out


def test_label_value_1_is_accepted(nrrd_source, target):
    source = nrrd_source(["A"])
    write_nrrd(source / "Training Set" / "A" / "laendo.nrrd", volumes(0)[1])
    assert convert(source) == 0
    np.testing.assert_array_equal(read(target / "labelsTr" / "A.nii.gz")[1], volumes(0)[1])


def test_published_order_and_summary(h5_source, target, capsys):
    source = h5_source("ABCDE")
    (source / "train.list").write_text("D\nB\nA\n")
    (source / "test.list").write_text("E\n")
    assert convert(source, "--labeled", 2) == 0
    assert stems(target / "imagesTr") == stems(target / "labelsTr") == ["B", "D"]
    assert stems(target / "imagesUn") == ["A"]
    assert stems(target / "imagesTs") == stems(target / "labelsTs") == ["E"]
    assert not (target / "imagesVal").exists()
    assert json.loads((target / "dataset.json").read_text())["numTraining"] == 2
    assert len(json.loads((target / "splits_final.json").read_text())) == 2
    assert (record(target)["labeled"], record(target)["left_out"]) == (["D", "B"], ["C"])
    printed = capsys.readouterr().out
    assert "nnUNetv2_plan_and_preprocess -d 101 -c 3d_fullres --verify_dataset_integrity" in printed
    assert "nnunet_dycon preprocess_unlabeled -d 101 -c 3d_fullres" in printed


def test_all_labels_are_kept_by_default(nrrd_source, target, capsys):
    source = nrrd_source("ABC", without_label="B")
    nrrd_source("T", folder="Testing Set", without_label="T")
    assert convert(source) == 0
    assert {role: record(target)[role] for role in ("labeled", "unlabeled", "test")} == {
        "labeled": ["A", "C"],
        "unlabeled": ["B"],
        "test": ["T"],
    }
    assert not (target / "labelsTs").exists()


def test_seed_of_the_draw_is_recorded(nrrd_source, target):
    assert convert(nrrd_source("ABCDEF"), "--labeled", 2, "--seed", 5) == 0
    assert record(target)["seed"] == 5
    assert len(record(target)["labeled"]) == 2


def test_labels_of_unlabeled_cases_are_never_opened(nrrd_source, tmp_path, monkeypatch, target):
    source = nrrd_source("ABC")
    (source / "train.list").write_text("A\nB\nC\n")
    assert convert(source, "--labeled", 1) == 0
    (source / "Training Set" / "B" / "laendo.nrrd").write_bytes(b"garbage")
    (source / "Training Set" / "C" / "laendo.nrrd").write_bytes(b"")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "poisoned"))
    assert convert(source, "--labeled", 1) == 0
    assert checksums(tmp_path / "poisoned" / target.name) == checksums(target)
    assert stems(target / "labelsTr") == ["A"]
    assert [path.name for path in target.rglob("*B*")] == ["B_0000.nii.gz"]


def test_labels_of_unlabeled_cases_in_h5_are_not_required(h5_source, target):
    source = h5_source("AB")
    (source / "train.list").write_text("A\nB\n")
    with h5py.File(source / "2018LA_Seg_Training Set" / "B" / "mri_norm2.h5", "a") as file:
        del file["label"]
    assert convert(source, "--labeled", 1) == 0
    assert convert(source, "--spacing", 1, "-d", 102) == 1  # all cases labeled: now the label is required


def test_two_processes_write_the_same_bytes(nrrd_source, tmp_path, monkeypatch, target):
    source = nrrd_source("ABC")
    assert convert(source, "--labeled", 2) == 0
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "again"))
    assert convert(source, "--labeled", 2, processes=2) == 0
    assert checksums(tmp_path / "again" / target.name) == checksums(target)


# Invalid input


@pytest.mark.parametrize("processes", [1, 2])
def test_failed_conversion_keeps_finished_cases_and_resumes(nrrd_source, target, raw, capsys, processes):
    source = nrrd_source("ABC")
    (source / "Training Set" / "C" / "lgemri.nrrd").write_bytes(b"garbage")
    assert convert(source, processes=processes) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet_dycon: error:")]
    assert len(errors) == 1
    assert "cannot read" in errors[0]
    assert "C/lgemri.nrrd" in errors[0]
    assert [path.name for path in raw.iterdir()] == [f".{target.name}.partial"]
    write_nrrd(source / "Training Set" / "C" / "lgemri.nrrd", volumes(2)[0])
    assert convert(source, processes=processes) == 0
    assert "2 of 3 cases of an interrupted conversion are kept" in capsys.readouterr().out
    assert stems(target / "imagesTr") == ["A", "B", "C"]


def test_all_invalid_cases_are_reported_at_once(nrrd_source, raw, capsys):
    source = nrrd_source("ABC")
    for name in "AC":
        (source / "Training Set" / name / "lgemri.nrrd").write_bytes(b"garbage")
    assert convert(source) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 3 cases cannot be converted" in error
    assert "A/lgemri.nrrd" in error
    assert "C/lgemri.nrrd" in error


def test_every_invalid_case_is_named(nrrd_source, raw, capsys):
    source = nrrd_source("ABCDEFGH")
    for name in "BCDEFGH":
        (source / "Training Set" / name / "lgemri.nrrd").write_bytes(b"garbage")
    assert convert(source) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "7 of 8 cases cannot be converted" in error
    assert error.count("cannot read") == 5
    assert error.endswith("; also G, H")


def test_unknown_label_value_raises(nrrd_source, raw, capsys):
    source = nrrd_source("A")
    write_nrrd(source / "Training Set" / "A" / "laendo.nrrd", volumes(0)[1] * 7)
    assert convert(source) == 1
    assert "A/laendo.nrrd: label values 0, 7, but only 0, 1, 255 are known" in capsys.readouterr().err


def test_different_sizes_of_image_and_label_raise(nrrd_source, raw, capsys):
    source = nrrd_source("A")
    write_nrrd(source / "Training Set" / "A" / "laendo.nrrd", np.zeros((3, 4, 6), np.uint8))
    assert convert(source) == 1
    error = capsys.readouterr().err
    assert "A/lgemri.nrrd and " in error
    assert "A/laendo.nrrd differ in size: (3, 4, 5) and (3, 4, 6)" in error


@pytest.mark.parametrize("spacing", ["0", "-1", "nan", "inf"])
def test_invalid_spacing_raises(nrrd_source, raw, capsys, spacing):
    assert convert(nrrd_source("A"), f"--spacing={spacing}") == 2
    assert "--spacing must be a positive number of mm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labeled", "message"),
    [
        ("x", "must be a number of cases such as 8, or a percentage above 0%"),
        ("0", "must be a number of cases such as 8, or a percentage above 0%"),
        ("0.8", "must be a number of cases such as 8, or a percentage above 0%"),
        ("1_0", "must be a number of cases such as 8, or a percentage above 0%"),
        ("x%", "must be a number of cases such as 8, or a percentage above 0% and up to 100% such as 80%, got x%"),
        ("nan%", "must be a number of cases such as 8, or a percentage above 0%"),
        ("101%", "must be a number of cases such as 8, or a percentage above 0%"),
    ],
)
def test_invalid_number_of_labels_raises(tmp_path, capsys, labeled, message):
    with pytest.raises(SystemExit, match="2"):
        convert(tmp_path, "--labeled", labeled)
    assert f"argument --labeled: {message}" in capsys.readouterr().err


def test_usage_errors_are_raised_before_conversion(nrrd_source, raw, tmp_path, monkeypatch, capsys):
    assert convert(tmp_path / "nowhere") == 1
    source = nrrd_source("AB")
    assert convert(source, "--labeled", 3) == 2
    assert "--labeled 3, but only 2 training cases have a label" in capsys.readouterr().err
    assert not raw.exists()
    assert convert(source) == 0
    assert convert(source) == 2
    assert "already exists" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_raw")
    assert convert(source) == 2


# Real data


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "la_h5").is_dir(), reason="the real data next to the repository are missing")
def test_real_h5(target, capsys):
    assert convert(DATA / "la_h5", "--labeled", 1) == 0
    assert "78 of the cases of train.list and test.list are absent" in capsys.readouterr().out
    (labeled,), (unlabeled,) = record(target)["labeled"], record(target)["unlabeled"]
    for identifier, folder in ((labeled, "imagesTr"), (unlabeled, "imagesUn")):
        with h5py.File(DATA / "la_h5" / "2018LA_Seg_Training Set" / identifier / "mri_norm2.h5") as file:
            np.testing.assert_array_equal(read(target / folder / f"{identifier}_0000.nii.gz")[1], file["image"][()])


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "la_125mm").is_dir(), reason="the real data next to the repository are missing")
def test_real_nrrd(target, split_file):
    labeled, unlabeled = "06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU"
    split = split_file({"labeled": [labeled], "unlabeled": [unlabeled]})
    assert convert(DATA / "la_125mm", "--spacing", 1.25, "--split", split) == 0
    case = DATA / "la_125mm" / "Training Set" / labeled
    image, array = read(target / "imagesTr" / f"{labeled}_0000.nii.gz")
    np.testing.assert_array_equal(array, read(case / "lgemri.nrrd")[1])
    np.testing.assert_array_equal(
        read(target / "labelsTr" / f"{labeled}.nii.gz")[1] * np.uint8(255), read(case / "laendo.nrrd")[1]
    )
    assert image.GetSpacing() == (1.25,) * 3
    assert len(record(target)["left_out"]) == 78
