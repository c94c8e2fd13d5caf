"""Tests of roles, split files, folds and the writer.

The writer overwrites nothing, leaves no incomplete dataset, never reads labels of unlabeled cases, and resumes an
interrupted conversion.
"""

import json
import resource
import signal
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.report import slices_of
from nnunet_dycon.dataset_conversion.roles import (
    FOLDERS,
    Assignment,
    Case,
    assign_by_count,
    assign_by_file,
    cross_validation,
    split_record,
)
from nnunet_dycon.dataset_conversion.writer import DataSet, new_dataset_folder, write_dataset
from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.system import pictures
from nnunet_dycon.system.locks import Lock
from nnunet_dycon.system.pictures import new_figure


def case(identifier, label=True):
    return Case(identifier, (Path(identifier) / "image",), Path(identifier) / "label" if label else None)


CASES = [case(name) for name in "dacbe"]


def identifiers(assignment):
    return {role: "".join(assignment.identifiers(role)) for role in FOLDERS}


def test_number_of_labels_keeps_the_first_cases_in_published_order():
    assignment = assign_by_count(CASES, 2, ordered=True, seed=0, test=[case("t")])
    assert identifiers(assignment) == {"labeled": "da", "unlabeled": "cbe", "val": "", "test": "t"}
    assert assignment.seed is None


def test_number_of_labels_skips_cases_without_label():
    assignment = assign_by_count([case("a", label=False), case("b"), case("c")], 1, ordered=True, seed=0)
    assert identifiers(assignment)["labeled"] == "b"
    assert identifiers(assignment)["unlabeled"] == "ac"


def test_draw_depends_only_on_the_seed_and_is_nested():
    def draw(cases, count, seed):
        return assign_by_count(cases, count, ordered=False, seed=seed).identifiers("labeled")

    many = [case(f"{number:02}") for number in range(20)]
    assert draw(many, 5, 0) == draw(many[::-1], 5, 0)
    assert draw(many, 5, 0) != draw(many, 5, 1)
    assert set(draw(many, 5, 0)) < set(draw(many, 6, 0))
    assert assign_by_count(many, 5, ordered=False, seed=3).seed == 3


def test_all_labels_are_kept_by_default():
    assignment = assign_by_count([*CASES, case("x", label=False)], None, ordered=False, seed=0)
    assert identifiers(assignment) == {"labeled": "dacbe", "unlabeled": "x", "val": "", "test": ""}
    assert assignment.seed is None


def test_more_labels_than_available_raise():
    with pytest.raises(UsageError, match=r"--labeled 6, but only 5 "):
        assign_by_count([*CASES, case("x", label=False)], 6, ordered=True, seed=0)


def test_source_without_labels_raises():
    with pytest.raises(UserError, match="no training case with a label"):
        assign_by_count([case("x", label=False)], None, ordered=True, seed=0)


def test_split_file_assigns_roles(split_file):
    origin = split_record(Assignment(dict.fromkeys(FOLDERS, ()), "rule"))
    split = split_file({**origin, "labeled": ["c"], "unlabeled": ["a", "x"], "test": ["b"]})
    assignment = assign_by_file([*CASES, case("x", label=False)], split)
    assert identifiers(assignment) == {"labeled": "c", "unlabeled": "ax", "val": "", "test": "b"}
    assert list(assignment.left_out) == ["d", "e"]


def test_split_file_may_list_test_cases_without_label(split_file):
    cases = [*CASES, case("x", label=False), case("y", label=False)]
    assignment = assign_by_file(cases, split_file({"labeled": ["a"], "test": ["x", "b"]}), held_out=["x"])
    assert identifiers(assignment)["test"] == "xb"
    for role, identifier in (("test", "y"), ("val", "x"), ("labeled", "x")):
        content = {"labeled": ["a"]} | {role: [identifier]}
        with pytest.raises(UserError, match=f"case {identifier} is in {role}, but the source has no label"):
            assign_by_file(cases, split_file(content), held_out=["x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot read the split file .*split\.json"),
        ("[]", "expected a JSON object"),
        ({"unlabeled": ["a"]}, '"labeled" is missing or empty'),
        ({"labeled": []}, '"labeled" is missing or empty'),
        ({"labeled": ["a"], "tests": ["b"], "Val": []}, r"split\.json: unknown lists Val, tests; expected labeled"),
        ({"labeled": "a"}, '"labeled" must be a list'),
        ({"labeled": ["a"], "val": [[1]]}, '"val" must be a list'),
        ({"labeled": ["a"], "test": ["zz"]}, r"split\.json: case zz \(test\) is not in the source"),
        ({"labeled": ["a", "a"]}, r"case a is listed twice \(in labeled\)"),
        ({"labeled": ["a"], "test": ["a"]}, r"case a is listed twice \(in labeled and test\)"),
        ({"labeled": ["x"]}, "case x is in labeled, but the source has no label"),
        ({"labeled": ["a"], "val": ["x"]}, "case x is in val, but the source has no label"),
        ({"labeled": ["a"], "test": ["x"]}, "case x is in test, but the source has no label"),
    ],
)
def test_invalid_split_file_raises(split_file, content, message):
    with pytest.raises(UserError, match=message) as error:
        assign_by_file([*CASES, case("x", label=False)], split_file(content))
    assert "\n" not in str(error.value)


def test_missing_split_file_raises(tmp_path):
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


def test_single_labeled_case_is_used_for_training_and_validation():
    assert cross_validation(["a"]) == [{"train": ["a"], "val": ["a"]}]


def test_hash_of_the_split_does_not_depend_on_the_order():
    def record(*labeled):
        cases = {"labeled": tuple(map(case, labeled)), "unlabeled": (case("u"),), "val": (), "test": ()}
        return split_record(Assignment(cases, "rule", {"z": "why"}))

    assert record("a", "b")["labeled"] == ["a", "b"]
    assert record("a", "b")["sha256"] == record("b", "a")["sha256"] != record("a")["sha256"]
    assert (record("a")["left_out"], record("a")["source"], record("a")["seed"]) == (["z"], "rule", None)


def test_raw_folder_must_be_set(monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(UsageError, match="nnUNet_raw is not set"):
        new_dataset_folder(1, "Name")


@pytest.mark.parametrize("dataset_id", [0, 1000])
def test_dataset_id_out_of_range_raises(raw, dataset_id):
    with pytest.raises(UsageError, match="between 1 and 999"):
        new_dataset_folder(dataset_id, "Name")


def test_new_dataset_folder_is_not_created(raw):
    assert new_dataset_folder(7, "Name") == raw / "Dataset007_Name"
    assert not raw.exists()


def test_existing_dataset_folder_raises(raw):
    (raw / "Dataset007_Name").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"Dataset007_Name already exists"):
        new_dataset_folder(7, "Name")


@pytest.mark.parametrize(
    ("variable", "taken"),
    [
        ("nnUNet_raw", "Dataset007_Other"),
        ("nnUNet_preprocessed", "Dataset007_Other"),
        ("nnUNet_preprocessed", "Dataset007_Name"),  # may contain labels that are now held back
        ("nnUNet_results", "Dataset007_Other"),
    ],
)
def test_used_dataset_id_raises(raw, tmp_path, monkeypatch, variable, taken):
    root = raw if variable == "nnUNet_raw" else tmp_path / variable
    monkeypatch.setenv(variable, str(root))
    (root / taken).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"ID 7 is taken by .*{taken}"):
        new_dataset_folder(7, "Name")


def test_similar_dataset_id_is_not_used(raw):
    (raw / "Dataset070_Other").mkdir(parents=True)
    assert new_dataset_folder(7, "Name").name == "Dataset007_Name"


def volume(value=1.0, size=(3, 4, 5), spacing=(1.0, 1.0, 2.0), origin=(1.0, 2.0, 3.0), kind=sitk.sitkFloat32):
    """Return a volume with one value except for 0 in the last voxel."""
    image = sitk.Image(size, kind) + value
    image[size[0] - 1, size[1] - 1, size[2] - 1] = 0
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image


def two_channels(paths, report, second):
    report.facts["second"] = second[0, 0, 0]
    return [volume(), second]


def label_of_four(path, images, report):
    report.warnings.append("looks odd")
    return volume(4, kind=sitk.sitkInt16)


def data_set(second=None, label=None, **others):
    given = {
        "name": "Name",
        "channel_names": ("T1", "T2"),
        "labels": {"background": 0, "tumor": 1},
        "label_values": {0: 0, 4: 1},
        "reference": "https://example.org",
        "license": "CC0",
        "read_images": partial(two_channels, second=second or volume(2.0)),
        "read_label": (lambda path, images, report: label) if label else label_of_four,
    }
    return DataSet(**given | others)


@pytest.fixture
def write(raw, tmp_path, monkeypatch):
    """Return a function that writes one labeled case with two channels; its files are named one, two and label."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "label"):
        Path(name).touch()
    one_case = (Case("a", (Path("one"), Path("two")), Path("label"), {"grade": "high"}),)
    assignment = Assignment({"labeled": one_case, "unlabeled": (), "val": (), "test": ()}, "rule")

    def call(data_set, **options):
        target = raw / "Dataset007_Name"
        return write_dataset(data_set, assignment, target, source=tmp_path, num_processes=1, **options)

    return call


def test_channels_label_values_and_geometry(write, capsys):
    folder = write(data_set(), notes=["a note"], warnings=["a warning"])
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
    assert "a is the only labeled case: fold 0 uses it for training and validation" in printed
    assert "a note" in printed
    assert "warning: a warning" in printed
    assert "warning: case a: looks odd" in printed


NAN = volume()
NAN[0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"second": volume(size=(3, 4, 6))}, r"one and two differ in size: \(3, 4, 5\) and \(3, 4, 6\)"),
        ({"second": volume(spacing=(1, 1, 1))}, "one and two differ in spacing"),
        ({"second": NAN}, "two: the image has NaN"),
        ({"label": volume(4, size=(4, 4, 5))}, "one and label differ in size"),
        ({"label": volume(4, origin=(1, 2, 4))}, "one and label differ in origin"),
        ({"second": volume(0)}, "two: all voxels have the same value"),
        ({"label": volume(3.5)}, r"label: label values 0, 3\.5, but only 0, 4 are known"),
    ],
)
def test_invalid_volumes_raise_and_leave_no_files(raw, write, wrong, message):
    with pytest.raises(UserError, match=message):
        write(data_set(**wrong))
    assert list(raw.iterdir()) == []


def interrupt(paths, report):
    raise KeyboardInterrupt


def test_interruption_before_the_first_case_leaves_no_files(raw, write):
    with pytest.raises(KeyboardInterrupt):
        write(data_set(read_images=interrupt))
    assert list(raw.iterdir()) == []


def test_labels_of_integer_values_may_have_any_data_type(write):
    folder = write(data_set(label=volume(4.0)))
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "a.nii.gz")))
    assert label.dtype == np.uint8
    assert (label == 1).sum() == label.size - 1


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("Float64", "Float32"), ("Int32", "Float32"), ("UInt16", "UInt16"), ("Int16", "Int16"), ("UInt8", "UInt8")],
)
def test_other_data_types_are_converted_to_float32(write, kind, kept):
    folder = write(data_set(second=volume(2, kind=getattr(sitk, f"sitk{kind}"))))
    written = sitk.ReadImage(str(folder / "imagesTr" / "a_0001.nii.gz"))
    assert (written.GetPixelID(), written[0, 0, 0]) == (getattr(sitk, f"sitk{kept}"), 2)


def test_second_channel_has_exactly_the_grid_of_the_first(write):
    folder = write(data_set(second=volume(2.0, origin=(1.0004, 2.0, 3.0))))
    assert sitk.ReadImage(str(folder / "imagesTr" / "a_0001.nii.gz")).GetOrigin() == (1, 2, 3)


def test_regions_are_written_to_dataset_json(write):
    labels = {"background": 0, "whole": (1, 2), "core": 2}
    folder = write(data_set(labels=labels, label_values={0: 0, 4: 2}, regions_class_order=(1, 2)))
    about = json.loads((folder / "dataset.json").read_text())
    assert (about["labels"], about["regions_class_order"]) == ({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


# Report, overlay and file content


def test_conversion_report(write, tmp_path):
    folder = write(data_set(settings={"spacing": 2}), warnings=["a warning"])
    report = json.loads((folder / "conversion_report.json").read_text())
    assert (report["data_set"], report["source"], report["settings"]) == ("Name", str(tmp_path), {"spacing": 2})
    assert report["warnings"] == ["a warning", "case a: looks odd"]
    assert set(report["versions"]) == {"nnunet-dycon", "python", "nnunetv2", "SimpleITK", "numpy"}
    case = report["cases"]["a"]
    assert (case["role"], case["images"], case["label"]) == ("labeled", ["one", "two"], "label")
    assert (case["size"], case["spacing_mm"], case["origin_mm"]) == ([3, 4, 5], [1, 1, 2], [1, 2, 3])
    assert case["label_voxels"] == {"0": 1, "1": 59}
    assert case["intensity_under_label"] == [{"1": {"mean": 1, "std": 0}}, {"1": {"mean": 2, "std": 0}}]
    assert (case["second"], case["grade"], case["warnings"]) == (2, "high", ["looks odd"])


def test_empty_label_is_kept_and_reported(write):
    report = json.loads((write(data_set(label=volume(0))) / "conversion_report.json").read_text())
    assert report["empty_labels"] == ["a"]
    assert report["cases"]["a"]["label_voxels"] == {"0": 60}
    assert report["warnings"] == ["1 case has an empty label and is kept: a"]


def test_overlay_shows_the_slice_with_most_foreground(write):
    label = volume(0, kind=sitk.sitkUInt8)
    label[1, 2, 3] = 4
    folder = write(data_set(label=label))
    assert (folder / "conversion_overlay.png").read_bytes().startswith(b"\x89PNG")
    images, index, shown, aspect = slices_of(folder, "a")
    assert (index, aspect, len(images)) == (3, 1, 2)
    assert np.argwhere(shown).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("labels", "legend"),
    [
        ({"background": 0, "tumor": 1, "cyst": 2}, ["tumor", "cyst"]),
        ({"background": 0, "whole": (1, 2), "core": 2}, ["whole", "core"]),
        ({"background": 0, "tumor": 1}, ["tumor", "value 2"]),
    ],
)
def test_overlay_names_channels_and_labels(write, monkeypatch, labels, legend):
    figures = []
    monkeypatch.setattr(pictures, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[0])
    label = volume(4)
    label[0, 0, 0] = 5
    write(data_set(label=label, labels=labels, label_values={0: 0, 4: 1, 5: 2}, regions_class_order=(1, 2)))
    assert [axes.get_title() for axes in figures[0].axes] == ["T1", "T1", "T2"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == legend


def test_overlay_has_the_radiological_orientation(write):
    """Columns go from the patient's right to left, rows from anterior to posterior."""
    flipped = volume(1.0)
    flipped.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    label = sitk.Cast(flipped, sitk.sitkUInt8) * 0
    label[0, 0, 0] = 4
    folder = write(data_set(read_images=lambda paths, report: [flipped, flipped], label=label))
    assert np.argwhere(slices_of(folder, "a")[2]).tolist() == [[3, 2]]


def test_gzip_header_has_no_timestamp(write):
    for file in write(data_set()).rglob("*.nii.gz"):
        assert file.read_bytes()[4:8] == bytes(4), file


# An interrupted conversion


def two_cases(paths, report):
    if paths[0].read_text() == "stop":
        raise KeyboardInterrupt
    if paths[0].read_text() == "noise":
        return [sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(40, 40, 40)))]
    with Path("reads.log").open("a") as file:
        file.write(paths[0].name)
    return [volume(float(paths[0].read_text()))]


@pytest.fixture
def write_two(raw, tmp_path, monkeypatch):
    """Return a function that writes cases a and b after an interruption at b.

    Their files contain the value of their voxels; reads.log lists which of them were read. The label of b does not
    exist, which must not matter as long as b is unlabeled.
    """
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("1")
    Path("b").write_text("stop")
    Path("label_a").touch()
    cases = tuple(Case(name, (Path(name),), Path(f"label_{name}")) for name in "ab")

    def call(labeled=1, **others):
        roles = {"labeled": cases[:labeled], "unlabeled": cases[labeled:], "val": (), "test": ()}
        settings = {"channel_names": ("T1",), "read_images": two_cases, **others}
        write_dataset(
            data_set(**settings), Assignment(roles, "rule"), raw / "Dataset007_Name", source=tmp_path, num_processes=1
        )
        return raw / "Dataset007_Name"

    with pytest.raises(KeyboardInterrupt):
        call()
    assert [path.name for path in raw.iterdir()] == [".Dataset007_Name.partial"]
    Path("b").write_text("2")
    return call


@pytest.mark.parametrize(
    ("reason", "expected"), [(OSError("busy"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_dataset_is_kept_if_the_final_rename_fails(write_two, raw, monkeypatch, reason, expected):
    def fail(*arguments):
        raise reason

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(expected):
            write_two()
    write_two()
    assert reads() == "ab"
    assert [path.name for path in raw.iterdir()] == ["Dataset007_Name"]


def reads():
    return Path("reads.log").read_text()


def test_interrupted_conversion_resumes(write_two, raw, capsys):
    folder = write_two()
    assert reads() == "ab"
    assert "1 of 2 cases of an interrupted conversion are kept" in capsys.readouterr().out
    assert sorted(json.loads((folder / "conversion_report.json").read_text())["cases"]) == ["a", "b"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "conversion_overlay.png", "conversion_report.json", "dataset.json", "imagesTr", "imagesUn", "labelsTr",
        "splits_final.json", "ssl_split.json",
    ]  # fmt: skip
    assert list(raw.iterdir()) == [folder]


def test_case_that_changed_since_the_interruption_is_read_again(write_two):
    Path("a").write_text("3.5")
    folder = write_two()
    assert reads() == "aab"
    assert sitk.ReadImage(str(folder / "imagesTr" / "a_0000.nii.gz"))[0, 0, 0] == 3.5


@pytest.mark.parametrize("other", [{"labeled": 2}, {"settings": {"spacing": 3}}])
def test_other_roles_or_settings_restart_the_conversion(write_two, other):
    """Otherwise a label that is now held back would remain in the folder."""
    Path("label_b").touch()
    write_two(**other)
    assert reads() == "aab"


def test_labels_of_an_interrupted_conversion_are_removed_for_another_split(write_two, raw):
    assert list(raw.rglob("labelsTr/a.nii.gz"))
    Path("a").rename("c")
    with pytest.raises(UserError, match="case a cannot be read"):
        write_two(labeled=2)
    assert not list(raw.rglob("labelsTr/a.nii.gz"))


def test_second_conversion_into_the_same_folder_raises(write_two, raw):
    lock = Lock(raw / ".Dataset007.lock", "the creation of dataset ID 7")
    lock.acquire()
    with closing(lock), pytest.raises(UserError, match="the creation of dataset ID 7 is running"):
        write_two()
    assert (raw / ".Dataset007_Name.partial" / "imagesTr" / "a_0000.nii.gz").is_file()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "A"), "the case names a and A differ only in upper and lower case"),
        (("a", "b\nc"), r"the case name 'b\\nc' has characters that cannot be used in file names"),
        (("a", "b" * 230), "bytes too long for a file name; rename the files"),
        (("a", "ä" * 120), "bytes too long for a file name"),
    ],
)
def test_names_that_a_file_system_cannot_keep_raise_before_work(raw, names, message):
    cases = tuple(Case(name, (Path("one"), Path("two")), Path("label")) for name in names)
    assignment = Assignment({"labeled": cases, "unlabeled": (), "val": (), "test": ()}, "all")
    with pytest.raises(UserError, match=message):
        write_dataset(data_set(), assignment, raw / "Dataset007_Name", source=raw, num_processes=1)
    assert not raw.exists() or not any(raw.iterdir())


@contextmanager
def files_of_at_most(size):
    """Limit the file size, to simulate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_full_disk_at_the_start_raises(raw, write):
    with (
        files_of_at_most(10),
        pytest.raises(UserError, match=r"cannot write into nnUNet_raw: .*; change its permissions or free disk"),
    ):
        write(data_set())
    assert list(raw.iterdir()) == []


def test_full_disk_raises_and_finished_cases_are_kept(write_two, raw):
    """SimpleITK does not detect a full disk."""
    Path("b").write_text("noise")
    message = r"cannot write .*b_0000\.nii\.gz: .*; check the free disk space"
    with files_of_at_most(50_000), pytest.raises(UserError, match=message):
        write_two()
    assert [path.name for path in raw.iterdir()] == [".Dataset007_Name.partial"]
    Path("b").write_text("2")
    write_two()
    assert reads() == "ab"
