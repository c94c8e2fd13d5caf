"""Tests of the Medical Segmentation Decathlon converter: 4D images, label values, test images, damaged copies."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion import msd
from nnunet_dycon.dataset_conversion.msd import plan
from nnunet_dycon.errors import UserError
from tests.dataset_conversion.sources import (
    DATA,
    array,
    convert,
    image,
    label,
    read_json,
    same_grid,
    stems,
    the_one_error,
    write,
)

BRAIN, HIPPOCAMPUS, PROSTATE = "Task01_BrainTumour", "Task04_Hippocampus", "Task05_Prostate"
TASKS = {  # folder -> name, channels, foreground
    BRAIN: ("BRATS", ("FLAIR", "T1w", "t1gd", "T2w"), ("edema", "non-enhancing tumor", "enhancing tumour")),
    HIPPOCAMPUS: ("Hippocampus", ("MRI",), ("Anterior", "Posterior")),
    PROSTATE: ("PROSTATE", ("T2", "ADC"), ("PZ", "TZ")),
}
DELETE = object()


def channel(number, index):
    """Return channel `index` of image `number`."""
    return image(number, scale=100 * (index + 1))


def volume(number, channels):
    images = [channel(number, index) for index in range(channels)]
    return images[0] if channels == 1 else sitk.JoinSeries(images)


def put_task(folder, task=HIPPOCAMPUS, training=("a", "b", "c"), test=("t",)):
    """Write a task like its unpacked archive, with an AppleDouble file next to each image, and return its folder."""
    name, channels, foreground = TASKS[task]
    root = folder / task
    for number, case in enumerate((*training, *test)):
        part = "Ts" if case in test else "Tr"
        write(root / f"images{part}" / f"{case}.nii.gz", volume(number, len(channels)))
        (root / f"images{part}" / f"._{case}.nii.gz").write_bytes(b"\0\5\26\7")
    for case in training:
        write(root / "labelsTr" / f"{case}.nii.gz", label(range(1, len(foreground) + 1)))
        (root / "labelsTr" / f"._{case}.nii.gz").write_bytes(b"\0\5\26\7")
    content = {
        "name": name,
        "reference": "a hospital",
        "licence": "CC-BY-SA 4.0",
        "modality": {str(index): channel for index, channel in enumerate(channels)},
        "labels": {str(value): label for value, label in enumerate(("background", *foreground))},
        "training": [
            {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in training[::-1]
        ],
        "test": [f"./imagesTs/{case}.nii.gz" for case in test],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def edit(root, **changes):
    """Change entries of dataset.json."""
    file = root / "dataset.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not DELETE}))


@pytest.fixture
def target(raw):
    return raw / "Dataset101_Hippocampus"


@pytest.mark.parametrize("task", TASKS)
def test_channels_labels_and_test_images(tmp_path, raw, capsys, task):
    name, channels, foreground = TASKS[task]
    assert convert("msd", put_task(tmp_path, task)) == 0
    target = raw / f"Dataset101_{name}"
    about = read_json(target, "dataset")
    assert about["channel_names"] == {str(index): channel for index, channel in enumerate(channels)}
    assert about["labels"] == {"background": 0} | {key: value for value, key in enumerate(foreground, 1)}
    assert (about["licence"], about["reference"]) == ("CC-BY-SA 4.0", "a hospital")
    assert sorted(path.name for path in (target / "imagesTr").iterdir()) == [
        f"{case}_{index:04d}.nii.gz" for case in "abc" for index in range(len(channels))
    ]
    for number, (case, folder) in enumerate(
        [("a", "imagesTr"), ("b", "imagesTr"), ("c", "imagesTr"), ("t", "imagesTs")]
    ):
        for index in range(len(channels)):
            written = target / folder / f"{case}_{index:04d}.nii.gz"
            np.testing.assert_array_equal(array(written), array(channel(number, index)))
            assert same_grid(written, image())
    written = target / "labelsTr" / "a.nii.gz"
    np.testing.assert_array_equal(array(written), array(label(range(1, len(foreground) + 1))))
    assert same_grid(written, image())
    assert stems(target / "labelsTr") == ["a", "b", "c"]
    assert stems(target / "imagesTs") == ["t"]
    assert not any((target / folder).exists() for folder in ("labelsTs", "imagesUn"))
    assert read_json(target, "conversion_report")["warnings"] == []
    assert (target / "conversion_overlay.png").is_file()
    printed = capsys.readouterr().out
    assert "imagesTs" in printed
    assert "labelsTs" not in printed


def test_4d_image_keeps_an_oblique_grid(tmp_path, raw):
    root = put_task(tmp_path, PROSTATE)
    turned = [channel(0, index) for index in range(2)]
    for each in (*turned, mask := label((1, 2))):
        each.SetDirection((0, -1, 0, 0, 0, -1, 1, 0, 0))
    write(root / "imagesTr" / "a.nii.gz", sitk.JoinSeries(turned))
    write(root / "labelsTr" / "a.nii.gz", mask)
    assert convert("msd", root) == 0
    for file in ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"):
        assert same_grid(raw / "Dataset101_PROSTATE" / file, mask)


def test_channel_name_ct_is_kept_without_spaces(tmp_path, target):
    root = put_task(tmp_path)
    edit(root, modality={"0": " CT "})
    assert convert("msd", root) == 0
    assert read_json(target, "dataset")["channel_names"] == {"0": "CT"}


@pytest.mark.parametrize(
    ("name", "folder"),
    [("BRATS", "BRATS"), ("Hepatic Vessel/2", "Hepatic_Vessel_2"), ("../up", "up"), ("a-b_1", "a-b_1")],
)
def test_name_becomes_a_folder_name(tmp_path, name, folder):
    root = put_task(tmp_path)
    edit(root, name=name)
    assert plan(root).data_set.name == folder


@pytest.mark.parametrize(
    ("labels", "names", "values"),
    [
        ({"0": "background", "1": "x", "2": "y"}, {"x": 1, "y": 2}, {1: 1, 2: 2}),
        ({"10": "y", "0": "background", "2": "x"}, {"x": 1, "y": 2}, {2: 1, 10: 2}),
        ({"1": "ignore", "2": "x"}, {"x": 1, "ignore": 2}, {2: 1, 1: 2}),
    ],
)
def test_label_values_become_consecutive(tmp_path, labels, names, values):
    root = put_task(tmp_path)
    edit(root, labels=labels)
    found = plan(root)
    assert found.data_set.labels == {"background": 0, **names}
    assert list(found.data_set.labels) == ["background", *names]
    assert found.data_set.label_values == {0: 0, **values}
    assert bool(found.notes) == any(old != new for old, new in values.items())


def test_renumbered_labels_are_written_and_reported(tmp_path, target, capsys):
    root = put_task(tmp_path, training=("a",))
    edit(root, labels={"0": "background", "2": "x", "7": "y"})
    write(root / "labelsTr" / "a.nii.gz", label((2, 7)))
    assert convert("msd", root) == 0
    native, written = array(label((2, 7))), array(target / "labelsTr" / "a.nii.gz")
    for old, new in ((0, 0), (2, 1), (7, 2)):
        assert (written[native == old] == new).all()
    assert "2 -> 1, 7 -> 2" in capsys.readouterr().out
    assert read_json(target, "conversion_report")["settings"]["label_values"] == {"0": 0, "2": 1, "7": 2}


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16])
def test_labels_of_other_data_types_are_converted(tmp_path, target, kind):
    root = put_task(tmp_path)
    stored = sitk.Cast(label((1, 2)), sitk.sitkFloat64) + (0 if kind is np.int16 else 1e-5)
    write(
        root / "labelsTr" / "a.nii.gz", sitk.Cast(stored, sitk.GetImageFromArray(np.zeros((1, 1), kind)).GetPixelID())
    )
    assert convert("msd", root) == 0
    np.testing.assert_array_equal(array(target / "labelsTr" / "a.nii.gz"), array(label((1, 2))))


def test_test_images_as_unlabeled_cases(tmp_path, target):
    assert convert("msd", put_task(tmp_path, test=("t", "u")), "--test_as_unlabeled") == 0
    assert (stems(target / "imagesTr"), stems(target / "imagesUn")) == (["a", "b", "c"], ["t", "u"])
    assert not (target / "imagesTs").exists()
    assert read_json(target, "conversion_report")["settings"]["test_as_unlabeled"] is True


def test_labels_of_test_images_are_used_only_for_test_cases(tmp_path):
    root = put_task(tmp_path)
    write(root / "labelsTs" / "t.nii.gz", label())
    assert [case.label for case in plan(root).test] == [root / "labelsTs" / "t.nii.gz"]
    assert {case.identifier: case.label for case in plan(root, test_as_unlabeled=True).training}["t"] is None


def test_labeled_cases_are_drawn_with_the_seed(tmp_path, raw):
    """dataset.json lists the cases in reverse: its order has no influence."""
    root = put_task(tmp_path)
    for seed in range(3):
        options = ("-d", 101 + seed, "--labeled", "34%", "--seed", seed)
        assert convert("msd", root, *options) == 0
        split = read_json(raw / f"Dataset{101 + seed}_Hippocampus", "ssl_split")
        expected = "abc"[np.random.default_rng(seed).permutation(3)[0]]
        assert (split["labeled"], split["seed"]) == ([expected], seed)
        assert sorted(split["unlabeled"]) == sorted({"a", "b", "c"} - {expected})
        assert split["test"] == ["t"]


def test_split_file_may_use_test_images(tmp_path, target, split_file):
    split = split_file({"labeled": ["a"], "unlabeled": ["t"], "val": ["b"]})
    assert convert("msd", put_task(tmp_path), "--split", split) == 0
    assert [stems(target / f"images{part}") for part in ("Tr", "Un", "Val")] == [["a"], ["t"], ["b"]]
    assert read_json(target, "conversion_report")["left_out"] == {"c": "in no list"}


def test_split_of_another_conversion_with_unlabeled_test_cases(tmp_path, target):
    root = put_task(tmp_path)
    assert convert("msd", root, "--labeled", 1) == 0
    again = target.with_name("Dataset102_Hippocampus")
    assert convert("msd", root, "-d", 102, "--split", target / "ssl_split.json") == 0
    assert stems(again / "imagesTs") == ["t"]
    assert read_json(again, "ssl_split")["sha256"] == read_json(target, "ssl_split")["sha256"]


def test_interrupted_conversion_resumes(tmp_path, raw, target, capsys):
    root = put_task(tmp_path, PROSTATE)
    sound = root / "imagesTr" / "b.nii.gz"
    content = sound.read_bytes()
    sound.write_bytes(content[:-20])
    assert convert("msd", root) == 1
    assert "imagesTr/b.nii.gz" in the_one_error(capsys)
    sound.write_bytes(content)
    assert convert("msd", root) == 0
    assert "3 of 4 cases of an interrupted conversion are kept" in capsys.readouterr().out
    assert stems(raw / "Dataset101_PROSTATE" / "labelsTr") == ["a", "b", "c"]


def test_other_label_values_restart_an_interrupted_conversion(tmp_path, target, capsys):
    """Both settings have the same names and new values."""
    root = put_task(tmp_path, training=("a", "b"))
    edit(root, labels={"0": "background", "1": "x", "2": "y", "3": "z"})
    (root / "labelsTr" / "b.nii.gz").write_bytes(b"")
    assert convert("msd", root) == 1
    edit(root, labels={"0": "background", "1": "x", "2": "y", "4": "z"})
    write(root / "labelsTr" / "b.nii.gz", label(4))
    assert convert("msd", root) == 0
    assert "interrupted" not in capsys.readouterr().out
    assert set(np.unique(array(target / "labelsTr" / "b.nii.gz"))) == {0, 3}


# Folders and the lists in dataset.json


@pytest.mark.parametrize("below", ["", "download", "a/b"])
def test_folder_above_a_single_task(tmp_path, below):
    root = put_task(tmp_path / "source" / below)
    (tmp_path / "source" / "__MACOSX" / HIPPOCAMPUS / "imagesTr").mkdir(parents=True)
    (tmp_path / "source" / "__MACOSX" / HIPPOCAMPUS / "imagesTr" / "._a.nii.gz").touch()
    (tmp_path / "source" / f"{HIPPOCAMPUS}.tar").touch()
    assert [case.images[0].parent.parent for case in plan(tmp_path / "source").training] == [root] * 3


def test_folders_behind_links(tmp_path):
    root = put_task(tmp_path / "elsewhere")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "link").symlink_to(root)
    (tmp_path / "source" / "same").symlink_to(root)
    assert len(plan(tmp_path / "source").training) == 3


def test_task_folder_that_contains_another_task(tmp_path):
    root = put_task(tmp_path)
    put_task(root / "backup", PROSTATE)
    assert plan(root).data_set.name == "Hippocampus"


def test_uncompressed_files(tmp_path):
    """Some copies are not compressed."""
    root = put_task(tmp_path, training=("a",))
    for folder in ("imagesTr", "labelsTr"):
        write(root / folder / "a.nii", sitk.ReadImage(str(root / folder / "a.nii.gz")))
        (root / folder / "a.nii.gz").unlink()
    (case,) = plan(root).training
    assert (case.images, case.label) == ((root / "imagesTr" / "a.nii",), root / "labelsTr" / "a.nii")
    assert plan(root).warnings == ()


def test_differences_from_the_lists_are_warnings(tmp_path, target, capsys):
    root = put_task(tmp_path, training=("a", "b", "c", "d"), test=("t", "u"))
    write(root / "imagesTr" / "new.nii.gz", image(9))
    write(root / "labelsTr" / "stray.nii.gz", label())
    (root / "labelsTr" / "d.nii.gz").unlink()
    (root / "imagesTr" / "c.nii.gz").unlink()
    (root / "imagesTs" / "u.nii.gz").unlink()
    assert convert("msd", root) == 0
    assert read_json(target, "conversion_report")["warnings"] == [
        "2 labels in labelsTr have no image and are not used: c, stray",
        "1 of 4 cases listed in dataset.json has no image in imagesTr: c",
        "1 of 4 images in imagesTr is not listed in dataset.json, but used: new",
        "1 of 2 cases listed in dataset.json has no image in imagesTs: u",
        "2 training cases have no label and are unlabeled: d, new",
    ]
    assert (stems(target / "labelsTr"), stems(target / "imagesUn")) == (["a", "b"], ["d", "new"])
    assert "warning: 1 of 2 cases listed in dataset.json" in capsys.readouterr().out


@pytest.mark.parametrize("lists", [{"training": DELETE, "test": DELETE}, {"training": None, "test": "none"}])
def test_without_lists_the_folders_decide(tmp_path, lists):
    root = put_task(tmp_path)
    edit(root, **lists)
    found = plan(root)
    assert [case.identifier for case in (*found.training, *found.test)] == ["a", "b", "c", "t"]
    assert found.warnings == ()


def test_entries_that_name_no_image_are_ignored(tmp_path):
    root = put_task(tmp_path, training=("a",), test=())
    edit(root, training=[{"image": "./imagesTr/a.nii.gz"}, {"label": "x"}, 3, "readme.txt"])
    assert plan(root).warnings == ()


# Invalid input


def rewritten(text):
    return lambda root: (root / "dataset.json").write_text(text)


def edited(**changes):
    return lambda root: edit(root, **changes)


def removed(*names):
    def remove(root):
        for name in names:
            shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return remove


def copied(file, to):
    return lambda root: shutil.copy(root / file, root / to)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (removed("dataset.json"), r"dataset\.json, which defines .*, does not exist; unpack the archive again"),
        (rewritten("{"), r"cannot read .*dataset\.json: .*; unpack the archive again"),
        (rewritten(""), r"cannot read .*dataset\.json: .*; unpack the archive again"),
        (rewritten("[]"), r"dataset\.json: expected a JSON object; unpack"),
        (edited(name=DELETE), r'dataset\.json: "name" is missing .*; add it'),
        (edited(name="?"), r'dataset\.json: "name" is missing or has no letters'),
        (edited(modality=DELETE), r'dataset\.json: "modality" is missing .* \{"0": "CT"\}; correct it'),
        (edited(modality={}), r'"modality" is missing or not in the form'),
        (edited(modality=["CT"]), r'"modality" is missing or not in the form'),
        (edited(modality={"0": 1}), r'"modality" is missing or not in the form'),
        (edited(modality={"0": " "}), r'"modality" is missing or not in the form'),
        (edited(modality={"first": "CT"}), r'"modality" is missing or not in the form'),
        (edited(modality={"1": "CT"}), r'the channels in "modality" must be numbered 0, 1, \.\.\. without gaps'),
        (
            edited(modality=DELETE, channel_names={"0": "CT"}, labels={"background": 0}),
            r'dataset\.json has "channel_names", so the data are already in nnU-Net\'s raw format; copy',
        ),
        (edited(labels=DELETE), r'dataset\.json: "labels" is missing .* \{"0": "background", "1": "tumor"\}; correct'),
        (edited(labels={"0": "background", "-1": "x"}), r'"labels" is missing or not in the form'),
        (edited(labels={"0": "background"}), r'"labels" must name at least one label other than background'),
        (edited(labels={"0": "background", "1": "x", "2": "x"}), r'"labels" must name .*, each once; correct it'),
        (edited(labels={"1": "background", "2": "x"}), r'"labels" must name .*, each once; correct it'),
        (removed("imagesTr"), r"no case found in .*; expected imagesTr/<case>\.nii\.gz, .* correct -i"),
        (removed("imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "imagesTr/c.nii.gz"), "no case found in"),
        (removed("labelsTr"), r"no image in .*imagesTr has a label of the same name in labelsTr; expected"),
        (copied("imagesTr/a.nii.gz", "imagesTs/a.nii.gz"), r"case a is in imagesTr and in imagesTs; delete one"),
        (copied("imagesTr/a.nii.gz", "imagesTr/a.nii"), r"a\.nii and .*a\.nii\.gz are both case a; delete one"),
        (copied("labelsTr/a.nii.gz", "labelsTr/a.NII"), r"a\.NII and .*a\.nii\.gz are both case a; delete one"),
    ],
)
def test_damaged_task_raises(tmp_path, damage, message):
    root = put_task(tmp_path)
    damage(root)
    with pytest.raises(UserError, match=message) as error:
        plan(root)
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value)


def test_folder_with_several_tasks_raises(tmp_path, raw, capsys):
    for task in TASKS:
        put_task(tmp_path / "msd", task)
    assert convert("msd", tmp_path / "msd") == 1
    error = the_one_error(capsys)
    assert f"msd contains 3 tasks: {', '.join(TASKS)}; name one of these folders with -i" in error
    assert not raw.exists()


@pytest.mark.parametrize("converter", ["msd", "la"])
def test_archive_as_source_raises(tmp_path, raw, capsys, converter):
    archive = tmp_path / f"{HIPPOCAMPUS}.tar"
    archive.touch()
    assert convert(converter, archive) == 1
    assert f"{archive} is a file, but -i takes a folder; unpack an archive first, with tar -xf" in the_one_error(capsys)


def test_folder_that_contains_only_the_archive_raises(tmp_path, raw, capsys):
    archive = tmp_path / f"{HIPPOCAMPUS}.tar"
    archive.touch()
    (tmp_path / f"._{HIPPOCAMPUS}.tar").touch()
    assert convert("msd", tmp_path) == 1
    assert f"unpack it: tar -xf {archive}" in the_one_error(capsys)


def test_missing_test_images_with_test_as_unlabeled_raise(tmp_path, raw, capsys):
    root = put_task(tmp_path, test=())
    assert convert("msd", root, "--test_as_unlabeled") == 2
    assert f"there is no image in {root / 'imagesTs'}; omit the option" in the_one_error(capsys)


BAD_FLOAT = label((1, 2), np.float32)
BAD_FLOAT[4, 2, 5] = 1.5


@pytest.mark.parametrize(
    ("file", "other", "message"),
    [
        ("imagesTr/a", volume(0, 3), "number of channels: 3 in the file, 2 in dataset.json (T2, ADC); correct"),
        ("imagesTr/a", volume(0, 1), "number of channels: 1 in the file, 2 in dataset.json (T2, ADC); correct"),
        ("imagesTs/t", volume(0, 1), "number of channels: 1 in the file, 2 in dataset.json (T2, ADC); correct"),
        ("imagesTr/a", image()[:, :, 3], "expected a 3D or 4D image with one value per voxel; repair it"),
        ("imagesTr/a", sitk.Compose(image(), image()), "expected a 3D or 4D image with one value per voxel; repair it"),
        ("labelsTr/a", volume(0, 2), "expected a 3D volume with one value per voxel"),
        ("labelsTr/a", label((1, 3)), "label values 0, 1, 3, but only 0, 1, 2 are known"),
        ("labelsTr/a", BAD_FLOAT, "label value 1.5 is not an integer; repair the file or move the case out"),
        ("labelsTr/a", label(origin=(1, 2, 4)), "differ in origin"),
    ],
)  # fmt: skip
def test_invalid_file_raises(tmp_path, raw, capsys, file, other, message):
    root = put_task(tmp_path, PROSTATE)
    write(root / f"{file}.nii.gz", other)
    assert convert("msd", root) == 1
    error = the_one_error(capsys)
    assert str(root / f"{file}.nii.gz") in error
    assert message in error


def test_labels_of_unlabeled_cases_are_never_opened(tmp_path, target):
    root = put_task(tmp_path)
    for case in "abc":
        if case != "abc"[np.random.default_rng(0).permutation(3)[0]]:
            (root / "labelsTr" / f"{case}.nii.gz").write_bytes(b"garbage")
    assert convert("msd", root, "--labeled", 1) == 0
    assert len(stems(target / "labelsTr")) == 1


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "hippocampus").is_dir(), reason="the data next to the repository are missing")
def test_real_hippocampus_task():
    found = plan(DATA / "hippocampus")
    assert (len(found.training), found.test, found.warnings, found.notes) == (200, (), (), ())
    case = found.training[0]
    (read,) = msd._read_images(case.images, None, channels=("MRI",))
    np.testing.assert_array_equal(array(read), array(case.images[0]))
    values = set(np.unique(array(msd._read_label(case.label, [read], None))))
    assert values == {0, 1, 2}


def test_files_and_folders_that_are_not_used_are_reported(tmp_path):
    root = put_task(tmp_path)
    (root / "imagesTr" / "d.nii.gz").mkdir()
    (root / "labelsTr" / "d.nrrd").touch()
    (root / "labelsTr" / ".d.nii.gz").touch()
    images, labels = plan(root).warnings
    assert images == f"1 entry of {root / 'imagesTr'} is not a NIfTI file and is not used: d.nii.gz"
    assert labels == f"1 entry of {root / 'labelsTr'} is not a NIfTI file and is not used: d.nrrd"
