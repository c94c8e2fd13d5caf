"""Roles of cases, split files, folds, and the promises of the writer: nothing overwritten, nothing left half-way,
labels of unlabeled cases never opened."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.writer import (
    FOLDERS,
    Assignment,
    Case,
    DataSet,
    assign_by_count,
    assign_by_file,
    cross_validation,
    new_dataset_folder,
    split_record,
    write_dataset,
)
from nnunet_dycon.errors import UsageError, UserError


def case(identifier, label=True):
    return Case(identifier, (Path(identifier) / "image",), Path(identifier) / "label" if label else None)


CASES = [case(name) for name in "dacbe"]


def identifiers(assignment):
    return {role: "".join(assignment.identifiers(role)) for role in FOLDERS}


def test_count_takes_the_first_of_the_published_order():
    assignment = assign_by_count(CASES, 2, ordered=True, seed=0, test=[case("t")])
    assert identifiers(assignment) == {"labeled": "da", "unlabeled": "cbe", "val": "", "test": "t"}
    assert assignment.seed is None


def test_count_skips_cases_without_label():
    assignment = assign_by_count([case("a", label=False), case("b"), case("c")], 1, ordered=True, seed=0)
    assert identifiers(assignment)["labeled"] == "b"
    assert identifiers(assignment)["unlabeled"] == "ac"


def test_draw_depends_on_the_seed_alone_and_is_nested():
    def draw(cases, count, seed):
        return assign_by_count(cases, count, ordered=False, seed=seed).identifiers("labeled")

    many = [case(f"{number:02}") for number in range(20)]
    assert draw(many, 5, 0) == draw(many[::-1], 5, 0)
    assert draw(many, 5, 0) != draw(many, 5, 1)
    assert set(draw(many, 5, 0)) < set(draw(many, 6, 0))
    assert assign_by_count(many, 5, ordered=False, seed=3).seed == 3


def test_without_count_every_label_is_kept():
    assignment = assign_by_count([*CASES, case("x", label=False)], None, ordered=False, seed=0)
    assert identifiers(assignment) == {"labeled": "dacbe", "unlabeled": "x", "val": "", "test": ""}
    assert assignment.seed is None


def test_count_beyond_the_labels_names_both_numbers():
    with pytest.raises(UsageError, match=r"--labeled 6, but only 5 "):
        assign_by_count([*CASES, case("x", label=False)], 6, ordered=True, seed=0)


def test_no_label_at_all():
    with pytest.raises(UserError, match="no training case with a label"):
        assign_by_count([case("x", label=False)], None, ordered=True, seed=0)


def test_split_file(split_file):
    split = split_file({"protocol": "p", "labeled": ["c"], "unlabeled": ["a", "x"], "test": ["b"], "left_out": {}})
    assignment = assign_by_file([*CASES, case("x", label=False)], split)
    assert identifiers(assignment) == {"labeled": "c", "unlabeled": "ax", "val": "", "test": "b"}
    assert assignment.left_out == ("d", "e")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot read the split file .*split\.json"),
        ("[]", "expected a JSON object"),
        ({"unlabeled": ["a"]}, '"labeled" is missing or empty'),
        ({"labeled": []}, '"labeled" is missing or empty'),
        ({"labeled": "a"}, '"labeled" must be a list'),
        ({"labeled": ["a"], "val": [1]}, '"val" must be a list'),
        ({"labeled": ["a"], "test": ["zz"]}, r"split\.json: case zz \(test\) is not in the source"),
        ({"labeled": ["a", "a"]}, r"case a is listed twice \(in labeled\)"),
        ({"labeled": ["a"], "test": ["a"]}, r"case a is listed twice \(in labeled and test\)"),
        ({"labeled": ["x"]}, "case x is in labeled, but the source has no label"),
        ({"labeled": ["a"], "val": ["x"]}, "case x is in val, but the source has no label"),
        ({"labeled": ["a"], "test": ["x"]}, "case x is in test, but the source has no label"),
    ],
)
def test_split_file_errors(split_file, content, message):
    with pytest.raises(UserError, match=message) as error:
        assign_by_file([*CASES, case("x", label=False)], split_file(content))
    assert "\n" not in str(error.value)


def test_missing_split_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the split file .*nowhere\.json"):
        assign_by_file(CASES, tmp_path / "nowhere.json")


@pytest.mark.parametrize(("count", "folds"), [(2, 2), (3, 3), (5, 5), (7, 5)])
def test_every_labeled_case_is_validated_once(count, folds):
    names = [f"case{number}" for number in range(count)]
    splits = cross_validation(names[::-1])
    assert len(splits) == folds
    assert sorted(name for fold in splits for name in fold["val"]) == names
    assert all(sorted(fold["train"] + fold["val"]) == names and fold["train"] for fold in splits)
    assert splits == cross_validation(names)
    json.dumps(splits)


def test_single_labeled_case_is_trained_on_and_validated_on():
    assert cross_validation(["a"]) == [{"train": ["a"], "val": ["a"]}]


def test_record_hashes_the_lists_not_their_order():
    def record(*labeled):
        cases = {"labeled": tuple(map(case, labeled)), "unlabeled": (case("u"),), "val": (), "test": ()}
        return split_record(Assignment(cases, "rule", ("z",)))

    assert record("a", "b")["labeled"] == ["a", "b"]
    assert record("a", "b")["sha256"] == record("b", "a")["sha256"] != record("a")["sha256"]
    assert (record("a")["left_out"], record("a")["source"], record("a")["seed"]) == (["z"], "rule", None)


def test_raw_folder_must_be_set(monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(UsageError, match="nnUNet_raw is not set"):
        new_dataset_folder(1, "Name")


@pytest.mark.parametrize("dataset_id", [0, 1000])
def test_id_out_of_range(raw, dataset_id):
    with pytest.raises(UsageError, match="between 1 and 999"):
        new_dataset_folder(dataset_id, "Name")


def test_new_folder_makes_nothing(raw):
    assert new_dataset_folder(7, "Name") == raw / "Dataset007_Name"
    assert not raw.exists()


def test_existing_target(raw):
    (raw / "Dataset007_Name").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"Dataset007_Name already exists"):
        new_dataset_folder(7, "Name")


@pytest.mark.parametrize(
    ("variable", "taken"),
    [
        ("nnUNet_raw", "Dataset007_Other"),
        ("nnUNet_preprocessed", "Dataset007_Other"),
        ("nnUNet_preprocessed", "Dataset007_Name"),  # of an earlier conversion: may hold labels that are now hidden
        ("nnUNet_results", "Dataset007_Other"),
    ],
)
def test_taken_id(raw, tmp_path, monkeypatch, variable, taken):
    root = raw if variable == "nnUNet_raw" else tmp_path / variable
    monkeypatch.setenv(variable, str(root))
    (root / taken).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"ID 7 is taken by .*{taken}"):
        new_dataset_folder(7, "Name")


def test_id_of_other_data_sets_is_free(raw):
    (raw / "Dataset070_Other").mkdir(parents=True)
    assert new_dataset_folder(7, "Name").name == "Dataset007_Name"


def volume(value=1.0, size=(3, 4, 5), spacing=(1.0, 1.0, 2.0), origin=(1.0, 2.0, 3.0), kind=sitk.sitkFloat32):
    image = sitk.Image(size, kind) + value
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image


def two_channels(paths, second):
    return [volume(), second]


def data_set(second=None, label=None):
    return DataSet(
        name="Name",
        channel_names=("T1", "T2"),
        labels={"background": 0, "tumor": 1},
        label_values={0: 0, 4: 1},
        reference="https://example.org",
        license="CC0",
        read_images=partial(two_channels, second=second or volume(2.0)),
        read_label=lambda path: label or volume(4, kind=sitk.sitkInt16),
    )


def one_case():
    cases = {"labeled": (Case("a", (Path("one"), Path("two")), Path("label")),), "unlabeled": (), "val": (), "test": ()}
    return Assignment(cases, "rule")


def test_channels_label_values_and_geometry(raw, capsys):
    folder = write_dataset(data_set(), one_case(), raw / "Dataset007_Name", num_processes=1, notes=["a note"])
    first, second, label = (
        sitk.ReadImage(str(folder / name))
        for name in ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    )
    assert (first[0, 0, 0], second[0, 0, 0], label[0, 0, 0]) == (1, 2, 1)
    assert label.GetPixelID() == sitk.sitkUInt8
    assert label.GetSpacing() == first.GetSpacing() == (1, 1, 2)
    assert label.GetOrigin() == first.GetOrigin() == (1, 2, 3)
    about = json.loads((folder / "dataset.json").read_text())
    assert about["channel_names"] == {"0": "T1", "1": "T2"}
    assert (about["numTraining"], about["file_ending"], about["name"]) == (1, ".nii.gz", "Name")
    assert (about["reference"], about["licence"]) == ("https://example.org", "CC0")
    printed = capsys.readouterr().out
    assert "a is the only labeled case: fold 0 trains on it and validates on it, too" in printed
    assert "a note" in printed


NAN = volume()
NAN[0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"second": volume(size=(3, 4, 6))}, r"one and two differ in size: \(3, 4, 5\) and \(3, 4, 6\)"),
        ({"second": volume(spacing=(1, 1, 1))}, "one and two differ in spacing"),
        ({"second": NAN}, "two: the image has NaN"),
        ({"second": sitk.Image((3, 4), sitk.sitkUInt8)}, "two: expected a 3D volume"),
        ({"label": volume(4, size=(4, 4, 5))}, "one and label differ in size"),
        ({"label": volume(4, origin=(1, 2, 4))}, "one and label differ in origin"),
        ({"label": volume(3.5)}, r"label: label values 3\.5, but only 0, 4 are known"),
    ],
)
def test_bad_volumes_are_named_and_nothing_is_left(raw, wrong, message):
    with pytest.raises(UserError, match=message):
        write_dataset(data_set(**wrong), one_case(), raw / "Dataset007_Name", num_processes=1)
    assert list(raw.iterdir()) == []


def test_folder_of_another_run_is_left_alone(raw):
    (raw / ".Dataset007_Name.partial").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\.Dataset007_Name\.partial.*left of another run"):
        write_dataset(data_set(), one_case(), raw / "Dataset007_Name", num_processes=1)
    assert (raw / ".Dataset007_Name.partial").is_dir()


def test_interruption_leaves_nothing(raw):
    def interrupt(path):
        raise KeyboardInterrupt

    interrupted = DataSet("Name", ("T1",), {}, {}, "", "", lambda paths: [volume(), volume()], interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(interrupted, one_case(), raw / "Dataset007_Name", num_processes=1)
    assert list(raw.iterdir()) == []


def test_labels_are_whole_numbers_of_any_type(raw):
    folder = write_dataset(data_set(label=volume(4.0)), one_case(), raw / "Dataset007_Name", num_processes=1)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "a.nii.gz")))
    assert label.dtype == np.uint8
    assert (label == 1).all()
