"""Tests of `nnunet_dycon sparsify`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from scipy.ndimage import label as connected_regions
from skimage.io import imsave
from skimage.morphology import skeletonize

from nnunet_dycon.cli import main
from nnunet_dycon.dataset_conversion import sparsify as module
from nnunet_dycon.dataset_conversion.sparsify import Scribbles, Slices
from nnunet_dycon.system.locks import Lock
from tests.tiny import LABELED, TEST, UNLABELED, tiny_volume, write_raw_dataset

IGNORE = 3


@pytest.fixture
def source(raw) -> Path:
    folder = raw / "Dataset901_Tiny"
    write_raw_dataset(folder)
    return folder


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def sparsify(*options: str, source: int = 901, target: int = 902) -> int:
    return main(["sparsify", "-d", str(source), "-o", str(target), "-np", "1", *options])


@pytest.mark.parametrize(
    ("size", "every", "annotated"), [(10, 4, [2, 6]), (16, 8, [4, 12]), (3, 8, [1]), (1, 8, [0]), (2, 1, [0, 1])]
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_nth_slice_is_annotated_and_at_least_one(size, every, annotated, axis):
    shape = [5, 5, 5]
    shape[axis] = size
    mask = np.moveaxis(Slices(every, axis)(np.zeros(shape), "a"), axis, 0)
    assert np.flatnonzero(mask.all((1, 2))).tolist() == np.flatnonzero(mask.any((1, 2))).tolist() == annotated


def test_each_region_of_a_slice_has_half_of_its_skeleton():
    _, labels = tiny_volume(0)
    labels[12, 2:9, 2:6] = 1  # a second region of the same label
    mask = Scribbles()(labels, "a")
    regions = 0
    for plane, drawn in zip(labels, mask):
        for value in np.unique(plane):
            found, number = connected_regions(plane == value, np.ones((3, 3)))
            regions += number
            for region in range(1, number + 1):
                scribble, skeleton = drawn & (found == region), skeletonize(plane == value) & (found == region)
                assert not (scribble & ~skeleton).any()
                assert scribble.sum() == max(1, skeleton.sum() // 2)
    assert regions > len(labels)
    assert mask.mean() < 0.1


def test_scribbles_depend_only_on_seed_and_case():
    _, labels = tiny_volume(0)
    first = Scribbles(1)(labels, "a")
    np.testing.assert_array_equal(Scribbles(1)(labels, "a"), first)
    assert (Scribbles(2)(labels, "a") != first).any()
    assert (Scribbles(1)(labels, "b") != first).any()


@pytest.mark.parametrize(
    ("options", "name", "rule"),
    [
        (["--every", "8"], "Every8", {"rule": "slices", "every": 8, "axis": 0}),
        (["--every", "4", "--axis", "2"], "Every4Axis2", {"rule": "slices", "every": 4, "axis": 2}),
        (["--scribbles", "--seed", "7"], "Scribbles7", {"rule": "scribbles", "seed": 7}),
    ],
)
def test_annotated_voxels_keep_their_label_and_the_others_are_ignored(source, capsys, options, name, rule):
    assert sparsify(*options) == 0
    target = source.with_name(f"Dataset902_Tiny_{name}")
    about = json.loads((target / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "large": 1, "small": 2, "ignore": IGNORE}
    assert about["sparse_annotation"] == {"of": "Dataset901_Tiny"} | rule
    annotated = []
    for case in LABELED:
        full, sparse = (read(folder / "labelsTr" / f"{case}.nii.gz") for folder in (source, target))
        assert (sparse == IGNORE).any()
        np.testing.assert_array_equal(sparse[sparse != IGNORE], full[sparse != IGNORE])
        annotated.append((sparse != IGNORE).mean())
    assert f"annotated share of all voxels: {np.mean(annotated):.2g} (background " in capsys.readouterr().out


def test_other_files_are_linked_and_the_source_is_unchanged(source):
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    link = source / "imagesUn" / f"{UNLABELED[0]}_0000.nii.gz"
    link.rename(source.parent / "elsewhere.nii.gz")
    link.symlink_to(os.path.relpath(source.parent / "elsewhere.nii.gz", link.parent))
    (source / "splits_final.json").write_text("[]")
    assert sparsify("--every", "8") == 0
    target = source.with_name("Dataset902_Tiny_Every8")
    for file, content in before.items():
        assert file.read_bytes() == content
        copied = target / file.relative_to(source)
        if file.parent.name != "labelsTr" and file.name != "dataset.json":
            assert copied.read_bytes() == content
            assert not copied.is_symlink()
    assert (target / "splits_final.json").is_file()
    assert sorted(folder.name for folder in target.iterdir() if folder.is_dir()) == [
        "imagesTr", "imagesTs", "imagesUn", "labelsTr", "labelsTs",
    ]  # fmt: skip
    assert len(list((target / "imagesTs").iterdir())) == len(TEST)


def test_regions_get_the_next_value_as_ignore_label(source):
    about = json.loads((source / "dataset.json").read_text())
    about |= {"labels": {"background": 0, "both": [1, 2], "small": 2}, "regions_class_order": [1, 2]}
    (source / "dataset.json").write_text(json.dumps(about))
    assert sparsify("--every", "8") == 0
    written = json.loads((source.with_name("Dataset902_Tiny_Every8") / "dataset.json").read_text())
    assert list(written["labels"].items())[-1] == ("ignore", IGNORE)


def test_2d_images(raw, capsys):
    folder = raw / "Dataset903_Photos"
    label = np.zeros((16, 24), np.uint8)
    label[4:12, 6:18] = 1
    for name, array in (("imagesTr/a_0000.png", label * 100), ("labelsTr/a.png", label)):
        (folder / name).parent.mkdir(parents=True)
        imsave(folder / name, array, check_contrast=False)
    about = {"channel_names": {"0": "gray"}, "labels": {"background": 0, "cell": 1}, "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps(about | {"file_ending": ".png"}))
    assert sparsify("--scribbles", source=903) == 0
    sparse = NaturalImage2DIO().read_seg(str(raw / "Dataset902_Photos_Scribbles" / "labelsTr" / "a.png"))[0][0, 0]
    assert set(np.unique(sparse)) == {0, 1, 2}
    assert (sparse == 2).mean() > 0.8


def test_a_label_without_annotated_voxels_is_a_warning(source, capsys):
    for case in LABELED:  # the first annotated slice is 4
        file = source / "labelsTr" / f"{case}.nii.gz"
        labels = read(file)
        labels[labels == 2] = 0
        labels[0, 0, 0] = 2
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(file))
    assert sparsify("--every", "8") == 0
    assert "warning: no voxel of small is annotated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--every", "8", "--seed", "1"], "--seed is for --scribbles; remove it"),
        (["--scribbles", "--axis", "1"], "--axis is for --every; remove it"),
    ],
)
def test_options_of_the_other_rule_are_refused(source, capsys, options, message):
    assert sparsify(*options) == 2
    assert message in capsys.readouterr().err


def break_label(source: Path) -> None:
    (source / "labelsTr" / "case_01.nii.gz").write_bytes(b"no image")


def unknown_label(source: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 4, 4), 7, np.uint8)), str(source / "labelsTr/case_01.nii.gz"))


def add_ignore_label(source: Path) -> None:
    about = json.loads((source / "dataset.json").read_text())
    about["labels"]["ignore"] = IGNORE
    (source / "dataset.json").write_text(json.dumps(about))


def remove_labels(source: Path) -> None:
    for file in (source / "labelsTr").iterdir():
        file.unlink()


def use_new_id(source: Path) -> None:
    (source.parent / "Dataset902_Other").mkdir()


def break_link(source: Path) -> None:
    (source / "imagesTr" / "case_00_0000.nii.gz").unlink()
    (source / "imagesTr" / "case_00_0000.nii.gz").symlink_to("nowhere")


def test_no_annotation_is_removed_from_single_slices(source, capsys):
    assert sparsify("--every", "1") == 0
    assert "warning: all voxels are annotated" in capsys.readouterr().out


def test_full_disk_and_missing_permission_are_one_line(source, capsys, monkeypatch):
    def fail(file):
        raise EOFError("the file is empty")

    with monkeypatch.context() as patch:
        patch.setattr(module, "require_whole", fail)
        assert sparsify("--every", "8") == 1
    assert "the file is empty; free disk space" in capsys.readouterr().err
    monkeypatch.setattr(Lock, "acquire", lambda self: Path("/proc/x").touch())
    assert sparsify("--every", "8") == 1
    assert "cannot write into nnUNet_raw" in capsys.readouterr().err
    assert [folder.name for folder in source.parent.iterdir()] == [source.name]


def test_a_second_copy_to_the_same_id_waits_for_no_name(source, capsys):
    lock = Lock(source.parent / ".Dataset902.lock", "the creation of dataset ID 902")
    lock.acquire()
    assert sparsify("--scribbles") == 1
    assert "the creation of dataset ID 902" in capsys.readouterr().err
    lock.close()


def test_negative_seed_is_refused(source, capsys):
    with pytest.raises(SystemExit):
        sparsify("--scribbles", "--seed", "-1")
    assert "at least 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_label, "labelsTr/case_01.nii.gz cannot be read"),
        (unknown_label, "case_01.nii.gz has label values that dataset.json does not name: 7"),
        (add_ignore_label, "has an ignore label already"),
        (remove_labels, "has no file *.nii.gz"),
        (use_new_id, "choose another with -o or delete it"),
        (break_link, "case_00_0000.nii.gz is a broken link"),
    ],
)
def test_faults_are_named_and_leave_nothing_behind(source, capsys, fault, message):
    fault(source)
    before = sorted(source.parent.rglob("*"))
    assert sparsify("--every", "8") in (1, 2)
    assert message in capsys.readouterr().err
    assert sorted(source.parent.rglob("*")) == before
