"""Tests of the folder converter: patterns, formats, label values, and invalid files."""

import gzip
import io
import json
import locale
import os
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion import writer
from nnunet_dycon.dataset_conversion.folder import plan
from nnunet_dycon.errors import UserError
from tests.dataset_conversion.sources import (
    SHAPE,
    array,
    convert,
    image,
    label,
    read_json,
    same_grid,
    stems,
    the_one_error,
    write,
    write_dicom,
)


@pytest.fixture
def target(raw):
    return raw / "Dataset101_Own"


@pytest.fixture
def source(tmp_path):
    """Write cases a, b and c with two channels; a and b have a label."""
    folder = tmp_path / "scans"
    for number, case in enumerate("abc"):
        write(folder / "images" / f"{case}_t1.nii.gz", image(number))
        write(folder / "images" / f"{case}_t2.nii.gz", image(number, scale=10))
        if case != "c":
            write(folder / "masks" / f"{case}.nrrd", label())
    return folder


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


ENDINGS = (".nii", ".nii.gz", ".hdr", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".gipl.gz", ".vtk")
T1, T2 = "T1=images/{case}_t1.nii.gz", "T2=images/{case}_t2.nii.gz"
BOTH = ("--channel", T1, "--channel", T2, "--masks", "masks/{case}.nrrd")


def found(folder, pattern, masks=None):
    cases = plan(folder, channel=[f"CT={pattern}"], masks=masks).training
    return {case.identifier: case.images[0].relative_to(folder).as_posix() for case in cases}


@pytest.mark.parametrize(
    ("files", "pattern", "expected"),
    [
        (["a.nrrd", "b.nrrd", "c.mha", "d/e.nrrd"], "{case}.nrrd", {"a": "a.nrrd", "b": "b.nrrd"}),
        (["p1/ct.mha", "p2/ct.mha"], "{case}/ct.mha", {"p1": "p1/ct.mha", "p2": "p2/ct.mha"}),
        (["p1/p1_ct.mha", "p2/p3_ct.mha"], "{case}/{case}_ct.mha", {"p1": "p1/p1_ct.mha"}),
        (["s/a_v1_x.nii", "s/b_v22_x.nii"], "s/{case}_v*_x.nii", {"a": "s/a_v1_x.nii", "b": "s/b_v22_x.nii"}),
        (["a.mha", "x/y/b.mha"], "**/{case}.mha", {"a": "a.mha", "b": "x/y/b.mha"}),
        (["a/CT/1.dcm", "b/CT/1.dcm"], "{case}/CT/", {"a": "a/CT", "b": "b/CT"}),
        (["a.mha", "._a.mha"], "{case}.mha", {"a": "a.mha"}),
        (["a+b (1).mha"], "{case} (1).mha", {"a+b": "a+b (1).mha"}),
    ],
)
def test_patterns_match_files_and_folders(tmp_path, files, pattern, expected):
    touch(tmp_path, *files)
    assert found(tmp_path, pattern) == expected


def test_channels_labels_and_unlabeled_cases(source, target, capsys):
    assert convert("folder", source, *BOTH, "--foreground", "tumor=1") == 0
    assert (stems(target / "imagesTr"), stems(target / "labelsTr"), stems(target / "imagesUn")) == (
        ["a", "b"], ["a", "b"], ["c"],
    )  # fmt: skip
    about = read_json(target, "dataset")
    assert about["channel_names"] == {"0": "T1", "1": "T2"}
    assert about["labels"] == {"background": 0, "tumor": 1}
    for number, (case, folder) in enumerate([("a", "imagesTr"), ("b", "imagesTr"), ("c", "imagesUn")]):
        np.testing.assert_array_equal(array(target / folder / f"{case}_0000.nii.gz"), array(image(number)))
        np.testing.assert_array_equal(array(target / folder / f"{case}_0001.nii.gz"), array(image(number, scale=10)))
        assert same_grid(target / folder / f"{case}_0000.nii.gz", image())
    np.testing.assert_array_equal(array(target / "labelsTr" / "a.nii.gz"), array(label()))
    assert "nnUNetv2_plan_and_preprocess -d 101" in capsys.readouterr().out


def test_label_values_are_joined_and_renumbered(tmp_path, target):
    write(tmp_path / "s" / "images" / "a.mha", image())
    write(tmp_path / "s" / "a.mha", label((7, 2, 5, 255), np.int16))
    options = ("--channel", "CT=images/{case}.mha", "--masks", "{case}.mha")
    values = ("--foreground", "organ=5,2", "--foreground", "tumor=7", "--foreground", "background=255")
    assert convert("folder", tmp_path / "s", *options, *values) == 0
    written, native = array(target / "labelsTr" / "a.nii.gz"), array(label((7, 2, 5, 255), np.int16))
    for old, new in ((0, 0), (2, 1), (5, 1), (7, 2), (255, 0)):
        assert (written[native == old] == new).all()
    assert read_json(target, "dataset")["labels"] == {"background": 0, "organ": 1, "tumor": 2}


@pytest.mark.parametrize("ending", ENDINGS)
def test_formats_of_simpleitk_are_converted(tmp_path, target, ending):
    """Some formats do not store the origin; the grid is that read by SimpleITK."""
    before = locale.setlocale(locale.LC_ALL)
    for folder, volume in (("i", image()), ("m", label())):
        write(tmp_path / "s" / folder / f"a{ending}", volume)
    locale.setlocale(locale.LC_ALL, before)
    assert convert(
        "folder", tmp_path / "s", "--channel", f"MR=i/{{case}}{ending}", "--masks", f"m/{{case}}{ending}"
    ) == 0  # fmt: skip
    np.testing.assert_array_equal(array(target / "imagesTr" / "a_0000.nii.gz"), array(image()))
    np.testing.assert_array_equal(array(target / "labelsTr" / "a.nii.gz"), array(label()))
    assert locale.setlocale(locale.LC_ALL) == before


def test_draw_of_labels_and_split_file(source, target, split_file):
    assert convert("folder", source, *BOTH, "--labeled", "50%", "--seed", 3) == 0
    split = read_json(target, "ssl_split")
    assert (len(split["labeled"]), len(split["unlabeled"]), split["seed"]) == (1, 2, 3)
    split = split_file({"labeled": ["b"], "test": ["a"]})
    assert convert("folder", source, *BOTH, "--name", "Other", "-d", 102, "--split", split) == 0
    other = target.with_name("Dataset102_Other")
    assert (stems(other / "labelsTr"), stems(other / "labelsTs"), (other / "imagesUn").exists()) == (
        ["b"],
        ["a"],
        False,
    )


def test_case_names_may_contain_brackets(tmp_path, target):
    write(tmp_path / "s" / "a [1].mha", image())
    write(tmp_path / "s" / "m" / "a [1].mha", label())
    assert convert("folder", tmp_path / "s", "--channel", "CT={case}.mha", "--masks", "m/{case}.mha") == 0
    assert stems(target / "labelsTr") == ["a [1]"]


def test_labels_without_image_are_reported(source, target, capsys):
    write(source / "masks" / "z.nrrd", label())
    assert convert("folder", source, *BOTH) == 0
    assert "1 label has no image and is not used: z" in capsys.readouterr().out


# Invalid input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name each channel once"),
        (["--channel", T1, "--channel", T1], "name each channel once"),
        (["--channel", "images/{case}.nii.gz"], "expected NAME="),
        (["--channel", "T1=images/a.nii.gz"], "has no {case}"),
        (["--channel", T1, "--name", "my data"], "--name 'my data'"),
        (["--channel", T1, "--foreground", "tumor"], "expected NAME="),
        (["--channel", T1, "--foreground", "tumor=x"], "'x' is not an integer"),
        (["--channel", T1, "--foreground", "a=1", "--foreground", "b=1"], "value 1 is given to two labels"),
        (["--channel", T1, "--foreground", "a=1", "--foreground", "a=2"], "a is named twice"),
        (["--channel", T1, "--foreground", "background=1"], "at least one label"),
        (["--channel", T1, "--foreground", "ignore=9", "--foreground", "a=1"], 'give the label "ignore" last'),
    ],
)
def test_invalid_options_raise(source, raw, capsys, options, message):
    assert convert("folder", source, *options) == 2
    assert message in the_one_error(capsys)
    assert not raw.exists()


def test_wrong_source_folder_raises(source, raw, capsys):
    assert convert("folder", source / "masks", *BOTH) == 1
    assert "no file in" in the_one_error(capsys)
    assert not raw.exists()


def test_missing_channel_raises_before_conversion(source, raw, capsys):
    (source / "images" / "b_t2.nii.gz").unlink()
    assert convert("folder", source, *BOTH) == 1
    error = the_one_error(capsys)
    assert "1 of 3 cases has no channel T2: b" in error
    assert "b_t1.nii.gz exists" in error
    assert not raw.exists()


def test_two_matching_files_raise(tmp_path):
    touch(tmp_path, "x/a.mha", "y/a.mha")
    with pytest.raises(UserError, match=r"x/a\.mha and .*y/a\.mha are both for case a"):
        found(tmp_path, "*/{case}.mha")


def test_file_that_matches_masks_is_not_used_as_an_image(tmp_path):
    """Otherwise the mask of case a would be the image of an unlabeled case a_seg."""
    touch(tmp_path, "a.mha", "a_seg.mha", "b.mha")
    plan_of_suffixes = plan(tmp_path, channel=["CT={case}.mha"], masks="{case}_seg.mha")
    images = {
        case.identifier: (case.images[0].name, case.label and case.label.name) for case in plan_of_suffixes.training
    }
    assert images == {"a": ("a.mha", "a_seg.mha"), "b": ("b.mha", None)}
    with pytest.raises(UserError, match=r"every file that matches {case}\.mha also matches --masks"):
        found(tmp_path, "{case}.mha", masks="{case}.mha")


@pytest.mark.parametrize(
    ("channel", "masks", "hint"),
    [
        ("images/{case}.mha", "labels/{case}.mha", r"pattern of the images, such as \{case\}_0000"),
        ("labels/{case}.mha", "images/{case}.mha", r"pattern of the labels, such as \{case\}_0000"),
        ("images/{case}.mha", "other/{case}.mha", r"change \{case\} in the patterns"),
    ],
)
def test_labels_of_other_names_are_an_error_with_a_hint(tmp_path, channel, masks, hint):
    touch(tmp_path, "images/a_0000.mha", "labels/a.mha", "other/x.mha")
    with pytest.raises(UserError, match=f"no label belongs to an image: .*{hint}"):
        found(tmp_path, channel, masks=masks)


def test_commands_for_volumes_of_one_slice_name_the_2d_configuration(tmp_path, target, capsys):
    for case in "ab":
        write(tmp_path / "scans" / f"{case}.nii.gz", flat(case))
    write(tmp_path / "scans" / "a_seg.nii.gz", with_grid_of(flat("a"), np.ones((1, 7, 6), np.uint8)))
    assert convert("folder", tmp_path / "scans", "--channel", "CT={case}.nii.gz", "--masks", "{case}_seg.nii.gz") == 0
    printed = capsys.readouterr().out
    assert "nnUNetv2_plan_and_preprocess -d 101 -c 2d " in printed
    assert "nnunet_dycon preprocess_unlabeled -d 101 -c 2d" in printed


def flat(case):
    voxels = np.random.default_rng(ord(case)).normal(size=(1, 7, 6)).astype(np.float32)
    return sitk.GetImageFromArray(voxels)


def ball(center: int) -> np.ndarray:
    mask = np.zeros(SHAPE[::-1], np.uint8)
    mask[center : center + 3, 2:5, 2:5] = 255
    return mask


@pytest.fixture
def organs(tmp_path):
    """Write cases a, b and c with a mask file per organ; b has no spleen, c no labels."""
    folder = tmp_path / "scans"
    for number, case in enumerate("abc"):
        write(folder / case / "ct.nii.gz", image(number))
    for case, organ, center in (("a", "liver", 1), ("a", "spleen", 3), ("b", "liver", 2)):
        write(folder / case / f"{organ}.nii.gz", with_grid_of(image(0), ball(center)))
    return folder


def with_grid_of(reference, voxels):
    converted = sitk.GetImageFromArray(voxels)
    converted.CopyInformation(reference)
    return converted


ORGANS = ("--channel", "CT={case}/ct.nii.gz", "--masks", "liver={case}/liver.nii.gz", "--masks")


def test_each_label_can_have_its_own_mask_file(organs, target, capsys):
    assert convert("folder", organs, *ORGANS, "spleen={case}/spleen.nii.gz") == 0
    assert read_json(target, "dataset")["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert stems(target / "labelsTr") == ["a", "b"]
    assert stems(target / "imagesUn") == ["c"]
    a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(target / "labelsTr" / f"{case}.nii.gz"))) for case in "ab")
    expected = np.where(ball(3) > 0, 2, np.where(ball(1) > 0, 1, 0))
    np.testing.assert_array_equal(a, expected)
    np.testing.assert_array_equal(b, (ball(2) > 0).astype(int))
    printed = capsys.readouterr().out
    assert "warning: 1 case with labels has no file of spleen, which is empty there: b" in printed
    overlap = np.count_nonzero((ball(1) > 0) & (ball(3) > 0))
    assert f"warning: case a: {overlap} voxels of {organs}/a/spleen.nii.gz are also in a mask before it" in printed


def test_case_is_converted_again_if_one_of_its_masks_has_changed(organs, target):
    (organs / "b" / "ct.nii.gz").write_bytes(b"damaged")
    assert convert("folder", organs, *ORGANS, "spleen={case}/spleen.nii.gz") == 1
    write(organs / "b" / "ct.nii.gz", image(1))
    write(organs / "a" / "spleen.nii.gz", with_grid_of(image(0), ball(2)))
    assert convert("folder", organs, *ORGANS, "spleen={case}/spleen.nii.gz") == 0
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(target / "labelsTr" / "a.nii.gz")))
    np.testing.assert_array_equal(written == 2, ball(2) > 0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (["{case}/liver.nii.gz", "spleen={case}/spleen.nii.gz"], "--masks {case}/liver.nii.gz has no name"),
        (["a={case}/liver.nii.gz", "a={case}/spleen.nii.gz"], "--masks: give each name only once"),
        (["ignore={case}/liver.nii.gz", "a={case}/spleen.nii.gz"], "--masks: give each name only once"),
        (["a={case}/liver.nii.gz", "--foreground", "a=1"], "--foreground cannot be combined with --masks"),
    ],
)
def test_invalid_names_of_masks_raise(organs, raw, capsys, masks, message):
    options = [text for entry in masks for text in (("--masks", entry) if "case" in entry else (entry,))]
    assert convert("folder", organs, "--channel", "CT={case}/ct.nii.gz", *options) == 2
    assert message in the_one_error(capsys)


def test_header_that_names_a_file_outside_of_the_source_raises(tmp_path, raw, capsys):
    for ending, written in ((".mhd", ".mhd"), (".mha", ".mhd"), (".nhdr", ".nhdr"), (".nrrd", ".nhdr")):
        folder = tmp_path / ending
        write(folder / "outside" / f"a{written}", image(0))
        (folder / "source").mkdir()
        header = (folder / "outside" / f"a{written}").read_text(encoding="latin-1")
        voxels = next((folder / "outside").glob("a.*raw*")).name
        (folder / "source" / f"a{ending}").write_text(header.replace(voxels, f"../outside/{voxels}"), "latin-1")
        assert convert("folder", folder / "source", "--channel", f"CT={{case}}{ending}") == 1
        assert f"names the file ../outside/{voxels}, which is outside of" in the_one_error(capsys)


def test_links_out_of_the_source_are_reported(source, target, capsys):
    outside = source.with_name("elsewhere.nrrd")
    (source / "masks" / "a.nrrd").rename(outside)
    (source / "masks" / "a.nrrd").symlink_to(outside)
    assert convert("folder", source, *BOTH) == 0
    assert (
        f"warning: 1 link leads out of {source}; its target is used: {source}/masks/a.nrrd" in capsys.readouterr().out
    )


def test_sheared_nifti_gets_perpendicular_axes_with_a_warning(tmp_path, target, capsys):
    affine = np.array([[1, 0, 0.03, 5], [0, 1, 0, -3], [0, 0, 2, 1], [0, 0, 0, 1.0]])
    voxels = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    for folder, content in (("images", voxels), ("masks", (voxels > 0).astype(np.uint8))):
        stored = nibabel.Nifti1Image(content, affine)
        stored.set_sform(affine, 1)
        stored.set_qform(None, 0)
        (tmp_path / "scans" / folder).mkdir(parents=True)
        nibabel.save(stored, tmp_path / "scans" / folder / "a.nii.gz")
    options = ("--channel", "CT=images/{case}.nii.gz", "--masks", "masks/{case}.nii.gz")
    assert convert("folder", tmp_path / "scans", *options) == 0
    written = sitk.ReadImage(str(target / "imagesTr" / "a_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written).T, voxels)
    np.testing.assert_allclose(written.GetSpacing(), np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-6)
    center = (np.array(voxels.shape) - 1) / 2
    expected = (affine @ [*center, 1])[:3] * (-1, -1, 1)  # to the coordinates of ITK
    np.testing.assert_allclose(written.TransformContinuousIndexToPhysicalPoint(center.tolist()), expected, atol=1e-5)
    assert "images/a.nii.gz are not perpendicular; they are stored as perpendicular" in capsys.readouterr().out


def test_dicom_file_with_all_slices_is_converted(tmp_path, target):
    volume = sitk.Cast(image(0), sitk.sitkUInt8)
    volume.SetSpacing((1, 1, 2))
    volume.SetDirection(np.eye(3).ravel())
    (tmp_path / "scans" / "a" / "CT").mkdir(parents=True)
    sitk.WriteImage(volume, str(tmp_path / "scans" / "a" / "CT" / "scan.dcm"))
    stored = sitk.ReadImage(str(tmp_path / "scans" / "a/CT/scan.dcm"))
    write(tmp_path / "scans" / "a/seg.nii.gz", with_grid_of(stored, label_voxels(stored)))
    assert convert("folder", tmp_path / "scans", "--channel", "CT={case}/CT/", "--masks", "{case}/seg.nii.gz") == 0
    written = sitk.ReadImage(str(target / "imagesTr" / "a_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(stored))


def test_dicom_slice_beside_damaged_ones_raises(tmp_path, raw, capsys):
    folder = tmp_path / "scans" / "a"
    write_dicom(folder, sitk.Cast(image(0, spacing=(1, 1, 2)), sitk.sitkInt16))
    for file in sorted(folder.glob("*.dcm"))[1:]:
        file.write_bytes(b"damaged")
    write(tmp_path / "scans" / "a.nrrd", label())
    assert convert("folder", tmp_path / "scans", "--channel", "CT={case}/", "--masks", "{case}.nrrd") == 1
    assert f"cannot read {folder}/1-002.dcm as a slice of its series" in the_one_error(capsys)


def label_voxels(like):
    voxels = np.zeros(like.GetSize()[::-1], np.uint8)
    voxels[1:3, 1:3, 1:3] = 1
    return voxels


def cut(path, by):
    """Truncate a file by a number of bytes (0: to half): the content of a compressed file, or the voxel data."""
    path = path.with_suffix({".hdr": ".img", ".mhd": ".raw", ".nhdr": ".raw"}.get(path.suffix, path.suffix))
    if by and path.suffix == ".gz":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-by]))
        return
    content = path.read_bytes()
    path.write_bytes(content[: -by or len(content) // 2])


@pytest.mark.parametrize("by", [0, 1])  # 0: half
@pytest.mark.parametrize("ending", ENDINGS)
def test_truncated_file_raises(tmp_path, raw, capsys, ending, by):
    """SimpleITK would fill some formats with zeros or with arbitrary memory."""
    for folder, volume in (("i", image()), ("m", label())):
        write(tmp_path / "s" / folder / f"a{ending}", volume)
    cut(tmp_path / "s" / "i" / f"a{ending}", by)
    options = ("--channel", f"MR=i/{{case}}{ending}", "--masks", f"m/{{case}}{ending}")
    assert convert("folder", tmp_path / "s", *options) == 1
    assert f"i/a{ending}: " in the_one_error(capsys)
    assert list(raw.iterdir()) == []


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha"])
def test_nan_raises(source, raw, capsys, ending):
    bad = image()
    bad[1, 1, 1] = float("nan")
    write(source / f"a{ending}", bad)
    assert convert("folder", source, "--channel", f"T1={{case}}{ending}", *BOTH[4:]) == 1
    error = the_one_error(capsys)
    assert f"a{ending}" in error
    assert "NaN" in error


@pytest.mark.parametrize(
    ("ending", "message"), [(".tif", "TIFF has no spacing in mm"), (".vtk", "its voxels are stored as text")]
)
def test_unsupported_formats_raise(tmp_path, raw, capsys, ending, message):
    file = tmp_path / "i" / f"a{ending}"
    write(file, image())
    write(tmp_path / "m" / "a.mha", label())
    if ending == ".vtk":
        file.write_bytes(file.read_bytes().replace(b"BINARY", b"ASCII"))
    assert convert("folder", tmp_path, "--channel", f"CT=i/{{case}}{ending}", "--masks", "m/{case}.mha") == 1
    assert message in the_one_error(capsys)


def turned(volume):
    volume.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    return volume


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (turned(label()), "differ in direction: (1, 0, 0, 0, 1, 0, 0, 0, 1) and (-1, 0, 0, 0, -1, 0, 0, 0, 1)"),
        (label(origin=(1, 2, 3.5)), "differ in origin"),
        (label(spacing=(1, 1, 1)), "differ in spacing"),
        (label(shape=(6, 7, 9)), "differ in size"),
        (sitk.Flip(label(), [True, False, False]), "differ in"),
        (label(3), "masks/a.nrrd: label values 0, 3, but only 0, 1 are known"),
        (label(0.5, np.float32), "label values 0, 0.5, but only 0, 1 are known"),
        (sitk.Compose(label(), label()), "a.nrrd: expected a 3D volume with one value per voxel"),
        (label()[:, :, 3], "a.nrrd: expected a 3D volume with one value per voxel"),
    ],
)
def test_invalid_label_raises(source, target, capsys, other, message):
    write(source / "masks" / "a.nrrd", other)
    assert convert("folder", source, *BOTH) == 1
    assert message in the_one_error(capsys)
    assert not target.exists()


def test_channels_on_different_grids_raise(source, target, capsys):
    write(source / "images" / "b_t2.nii.gz", image(spacing=(1, 1.1, 2)))
    assert convert("folder", source, *BOTH) == 1
    error = the_one_error(capsys)
    assert "b_t1.nii.gz and " in error
    assert "b_t2.nii.gz differ in spacing: (1, 1, 2) and (1, 1.1, 2)" in error


def test_gzip_with_wrong_checksum_raises(source, target, capsys):
    file = source / "images" / "a_t1.nii.gz"
    content = bytearray(file.read_bytes())
    content[-8] ^= 1  # the checksum
    file.write_bytes(bytes(content))
    with pytest.raises(gzip.BadGzipFile):
        gzip.decompress(bytes(content))
    assert convert("folder", source, *BOTH) == 1
    assert "a_t1.nii.gz: CRC check failed" in the_one_error(capsys)


def store_uncompressed(file):
    file.write_bytes(gzip.decompress(file.read_bytes()))


def test_uncompressed_nifti_named_gz_is_converted(source, target):
    """SimpleITK and nnU-Net read such files."""
    for file in source.glob("images/*.nii.gz"):
        store_uncompressed(file)
    assert convert("folder", source, *BOTH) == 0
    assert stems(target / "imagesUn") == ["c"]


def test_truncated_uncompressed_nifti_raises(source, target, capsys):
    file = source / "images" / "c_t1.nii.gz"
    store_uncompressed(file)
    file.write_bytes(file.read_bytes()[:-20])
    assert convert("folder", source, *BOTH) == 1
    assert f"cannot read {file}" in the_one_error(capsys)


def test_broken_links_and_closed_folders_are_named(source, target, capsys):
    (source / "images" / "d_t1.nii.gz").symlink_to(source / "gone.nii.gz")
    (source / "masks" / "c.nrrd").symlink_to(source / "gone.nrrd")
    (source / "masks" / "d.nrrd").symlink_to("d.nrrd")  # to itself
    assert convert("folder", source, *BOTH) == 0
    printed = capsys.readouterr().out
    assert f"warning: 3 links lead to files that do not exist and are not used: {source}/images/d_t1.nii.gz" in printed
    report = read_json(target, "conversion_report")
    assert any("3 links" in warning for warning in report["warnings"])


def test_conversion_ends_after_the_case_in_which_another_process_takes_over(source, raw, capsys, monkeypatch):
    done = []

    def taken_over(data_set, folder, job):
        done.append(job)
        (raw / ".Dataset101.lock").write_text('{"token": "other", "host": "node7", "pid": 1}')

    monkeypatch.setattr(writer, "_write_case", taken_over)
    assert convert("folder", source, *BOTH) == 1
    assert "another process (host node7, process 1) has taken over the creation of dataset" in the_one_error(capsys)
    assert len(done) == 1


def test_name_in_another_encoding_is_printed_with_escapes(source, target, monkeypatch):
    os.symlink("gone", os.fsencode(source) + b"/M\xfcller.nii.gz")  # Latin-1
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8"))
    assert convert("folder", source, *BOTH) == 0
    sys.stdout.flush()
    assert rb"is not used: %s/M\udcfcller.nii.gz" % os.fsencode(source) in printed.getvalue()


def test_broken_links_are_named_with_the_error_that_they_cause(source, target, capsys):
    for file in source.glob("masks/*"):
        file.unlink()
        file.symlink_to(source / "gone" / file.name)
    assert convert("folder", source, *BOTH) == 1
    printed = capsys.readouterr()
    assert "warning: 2 links lead to files that do not exist" in printed.out
    assert "no file in" in printed.err


def test_warnings_of_the_plan_are_printed_with_an_error_in_the_assignment(source, target, capsys):
    write(source / "masks" / "z.nrrd", label())
    assert convert("folder", source, *BOTH, "--labeled", "5") == 2
    printed = capsys.readouterr()
    assert "warning: 1 label has no image and is not used: z" in printed.out
    assert "--labeled 5, but only 2 training cases have a label" in printed.err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_split_file_of_windows_programs_is_read(source, target, tmp_path, encoding):
    file = tmp_path / "split.json"
    file.write_text('{"labeled": ["a.nii.gz"],\r\n"unlabeled": ["b ", "c"]}', encoding=encoding)
    assert convert("folder", source, *BOTH, "--split", str(file)) == 0
    assert stems(target / "labelsTr") == ["a"]


def test_label_values_that_differ_from_integers_by_rounding_are_converted(source, target):
    values = sitk.Cast(label(), sitk.sitkFloat32) * 0.99995
    values.CopyInformation(label())
    write(source / "masks" / "a.nrrd", values)
    assert convert("folder", source, *BOTH) == 0
    assert array(target / "labelsTr" / "a.nii.gz").max() == 1


def test_unknown_label_values_are_printed_in_full(source, target, capsys):
    write(source / "masks" / "a.nrrd", sitk.Cast(label(), sitk.sitkFloat32) * 1.0025)
    assert convert("folder", source, *BOTH) == 1
    assert "label values 0, 1.0025, but only 0, 1 are known" in the_one_error(capsys)


def test_folders_that_cannot_be_used_are_named(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz/content", "p1/CT/1.dcm", "p2/CT/deeper/1.dcm")
    (warning,) = plan(tmp_path, channel=["CT=images/{case}.nii.gz"]).warnings
    assert warning.startswith("1 folder matches images/{case}.nii.gz and is not used")
    assert "b.nii.gz" in warning
    (warning,) = plan(tmp_path, channel=["CT={case}/CT/"]).warnings
    assert warning.startswith("1 folder matches {case}/CT/ and is not used, since the pattern requires files directly")
    assert "p2/CT" in warning
    with pytest.raises(UserError, match=r"1 folder matches p2/\{case\}/ and is not used"):
        plan(tmp_path, channel=["CT=p2/{case}/"])


def test_links_that_lead_to_themselves_are_reported(source, target, capsys):
    (source / "images" / "d_t1.nii.gz").symlink_to("d_t1.nii.gz")
    assert convert("folder", source, *BOTH) == 0
    assert "1 link leads to a file that does not exist and is not used" in capsys.readouterr().out


def test_complex_voxels_are_an_error(source, raw, capsys):
    voxels = np.ones(SHAPE, np.complex64)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), source / "images" / "a_t1.nii.gz")
    assert convert("folder", source, *BOTH) == 1
    assert "a_t1.nii.gz: its voxels are complex numbers" in the_one_error(capsys)


SERIES = ("--channel", "CT={case}/CT/", "--masks", "{case}/seg.nii.gz")


@pytest.fixture
def series(tmp_path):
    """Write a labeled case a and an unlabeled case b as DICOM series, with the files b/CT/s1.ima to s6.ima."""
    scan = sitk.Cast(image(0, scale=1000), sitk.sitkInt16)
    write_dicom(tmp_path / "scans" / "a" / "CT", scan)
    write(tmp_path / "scans" / "a" / "seg.nii.gz", label())
    scan = sitk.Cast(image(1, scale=1000), sitk.sitkInt16)
    write_dicom(tmp_path / "scans" / "b" / "CT", scan, "s{}.ima.dcm", "1.2.4")
    for file in (tmp_path / "scans" / "b" / "CT").iterdir():
        file.rename(file.with_suffix(""))
    return tmp_path / "scans"


def test_files_outside_of_the_dicom_series_are_reported(series, target, capsys):
    (series / "a" / "CT" / "._1-001.dcm").write_bytes(b"resource fork")
    last = max((series / "b" / "CT").iterdir())
    last.write_bytes(last.read_bytes()[:300])
    assert convert("folder", series, *SERIES) == 0
    assert f"is not part of its DICOM series and not used: {last.name}" in capsys.readouterr().out


def test_damaged_slices_with_upper_case_ending_are_an_error(series, raw, capsys):
    (series / "b" / "CT" / "x.DCM").write_bytes(b"damaged")
    assert convert("folder", series, *SERIES) == 1
    assert "x.DCM as a slice of its series" in the_one_error(capsys)


def test_single_dicom_slice_is_reported(series, target, capsys):
    for file in sorted((series / "b" / "CT").iterdir())[1:]:
        file.unlink()
    assert convert("folder", series, *SERIES) == 0
    assert "has a single DICOM slice: the others may be missing" in capsys.readouterr().out


def test_dicom_slices_of_different_size_are_an_error(series, raw, capsys):
    other = sitk.Image((4, 7, 1), sitk.sitkInt16)
    other.SetOrigin((1, 2, 40))
    write_dicom(series / "b" / "CT", other, "other.dcm", "1.2.4")
    assert convert("folder", series, *SERIES) == 1
    assert "pixels; remove the one that is not part of the series" in the_one_error(capsys)


@pytest.mark.parametrize("entry", ["a_0000.nii.gz", "images/a.nii.gz", "a.NII.GZ", "C:\\images\\a_0000.nii.gz", "a"])
def test_split_files_may_contain_file_names(source, target, tmp_path, entry):
    (tmp_path / "split.json").write_text(json.dumps({"labeled": [entry], "unlabeled": ["c"]}))
    assert convert("folder", source, *BOTH, "--split", tmp_path / "split.json") == 0
    assert read_json(target, "ssl_split")["labeled"] == ["a"]
