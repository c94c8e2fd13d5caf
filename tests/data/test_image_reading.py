"""Tests of file names of cases and of grids, for all readers of nnU-Net."""

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io

from nnunet_dycon.data.image_reading import (
    coincide,
    hash_voxels,
    image_files,
    is_turned,
    read_grid,
    read_voxels,
    reader_class,
    reoriented,
    reoriented_grid,
    unused_files,
    write_like,
)
from nnunet_dycon.errors import UserError

RNG = np.random.default_rng(0)
VOXELS = RNG.normal(size=(4, 5, 6)).astype(np.float32)  # (Z, Y, X)
SHEARED = np.array([[1, 0, 0.03, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])


def oblique(axes: str = "RAS") -> sitk.Image:
    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing((0.5, 0.7, 2.0))
    image.SetOrigin((3.0, -4.0, 5.0))
    tilt = np.reshape(sitk.Euler3DTransform((0, 0, 0), 0.1, 0.05, -0.08).GetMatrix(), (3, 3))
    direction = np.reshape(sitk.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(axes), (3, 3))
    image.SetDirection((tilt @ direction).ravel())
    return image


def dataset(ending: str, *channels: str, **more) -> dict:
    return {"channel_names": {str(n): name for n, name in enumerate(channels)}, "file_ending": ending, **more}


def names(cases: dict[str, list[Path]]) -> dict[str, list[str]]:
    return {case: [file.name for file in files] for case, files in cases.items()}


def test_a_case_has_one_file_per_channel(tmp_path):
    for channel in (0, 1):
        (tmp_path / f"a_000{channel}.nii.gz").touch()
    found = image_files(tmp_path, dataset(".nii.gz", "T1", "T2"), "unlabeled")
    assert names(found) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}


def test_color_images_and_4d_images_have_all_channels_in_one_file(tmp_path):
    (tmp_path / "png").mkdir()
    for case in "ab":
        io.imsave(tmp_path / "png" / f"{case}_0000.png", np.zeros((8, 8, 3), np.uint8), check_contrast=False)
    found = image_files(tmp_path / "png", dataset(".png", "R", "G", "B"), "unlabeled")
    assert names(found) == {"a": ["a_0000.png"], "b": ["b_0000.png"]}

    (tmp_path / "nifti").mkdir()
    sitk.WriteImage(sitk.JoinSeries([oblique(), oblique()]), str(tmp_path / "nifti" / "a_0000.nii.gz"))
    found = image_files(tmp_path / "nifti", dataset(".nii.gz", "T1", "T2"), "unlabeled")
    assert names(found) == {"a": ["a_0000.nii.gz"]}


@pytest.mark.parametrize("channels", [["0000"], ["0001"], ["0000", "0001", "0002"], ["0000", "0002"]])
def test_missing_and_additional_files_are_errors(tmp_path, channels):
    for channel in channels:
        sitk.WriteImage(oblique(), str(tmp_path / f"a_{channel}.nii.gz"))
    with pytest.raises(UserError, match=r"unlabeled case a in .* has the files .*dataset.json require 0000, 0001; add"):
        image_files(tmp_path, dataset(".nii.gz", "T1", "T2"), "unlabeled")


def test_files_for_each_channel_of_color_images_are_errors(tmp_path):
    for case, channel in (("a", 0), ("b", 0), ("b", 1)):
        file = tmp_path / f"{case}_000{channel}.png"
        io.imsave(file, np.zeros((8, 8, 3), np.uint8), check_contrast=False)
    with pytest.raises(UserError, match=r"unlabeled case b .* has the files 0000, 0001, but .* require 0000; add"):
        image_files(tmp_path, dataset(".png", "R", "G", "B"), "unlabeled")


def test_files_with_another_ending_are_listed(tmp_path):
    for name in ("a_0000.nii.gz", "b_0000.nii", "notes.txt", ".DS_Store"):
        (tmp_path / name).touch()
    assert [file.name for file in unused_files(tmp_path, ".nii.gz")] == ["b_0000.nii", "notes.txt"]
    assert unused_files(tmp_path / "absent", ".nii.gz") == []
    (tmp_path / "tif").mkdir()
    (tmp_path / "tif" / "a.json").touch()
    assert unused_files(tmp_path / "tif", ".tif") == []


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
def test_simpleitk_and_nibabel_give_the_same_grid_and_voxels(tmp_path, axes):
    file = tmp_path / "a_0000.nii.gz"
    sitk.WriteImage(oblique(axes), str(file))
    grids = [read_grid(file, reader) for reader in (SimpleITKIO, NibabelIO)]
    np.testing.assert_allclose(grids[0].affine, grids[1].affine, atol=1e-5)
    np.testing.assert_allclose(grids[0].spacing, grids[1].spacing, rtol=1e-6)
    assert grids[0].shape == grids[1].shape == (4, 5, 6)
    assert coincide(*grids)
    for reader in (SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient):
        np.testing.assert_array_equal(read_voxels(file, reader)[0][0], VOXELS)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
def test_reorientation_equals_that_of_nnunets_readers(tmp_path, axes):
    file = tmp_path / "a_0000.nii.gz"
    sitk.WriteImage(oblique(axes), str(file))
    grid = read_grid(file, SimpleITKIO)
    for reader in (SimpleITKIOWithReorient, NibabelIOWithReorient):
        expected, properties = reader().read_images([str(file)])
        np.testing.assert_array_equal(reoriented(VOXELS, grid.affine), expected[0])
        turned = reoriented_grid(grid, np.eye(4))
        assert turned.shape == expected.shape[1:]
        np.testing.assert_allclose(turned.spacing, properties["spacing"], rtol=1e-6)
        back = reoriented(expected[0], turned.affine, grid.affine)
        np.testing.assert_array_equal(back, VOXELS)


def test_turned_grids_are_recognized_by_their_position(tmp_path):
    a, b, c = (tmp_path / f"{name}.nii.gz" for name in "abc")
    sitk.WriteImage(oblique(), str(a))
    sitk.WriteImage(sitk.DICOMOrient(oblique(), "PIR"), str(b))
    sitk.WriteImage(oblique("PIR"), str(c))  # the same voxels, but with other directions
    first, second, third = (read_grid(file, SimpleITKIO) for file in (a, b, c))
    assert is_turned(second, first)
    assert not is_turned(first, first)
    assert not is_turned(third, first)
    np.testing.assert_array_equal(reoriented(read_voxels(b, SimpleITKIO)[0][0], second.affine, first.affine), VOXELS)


def test_sheared_images_are_read_and_written_with_nibabel(tmp_path):
    file = tmp_path / "a_0000.nii.gz"
    image = nibabel.Nifti1Image(VOXELS.T, SHEARED)
    image.set_sform(SHEARED, 1)
    image.set_qform(None, 0)
    nibabel.save(image, file)
    reader = reader_class(dataset(".nii.gz", "CT"), file)
    assert reader is NibabelIO
    voxels, grid = read_voxels(file, reader)
    np.testing.assert_array_equal(voxels[0], VOXELS)
    np.testing.assert_allclose(grid.affine, SHEARED, atol=1e-6)
    write_like(VOXELS + 1, file, tmp_path / "map.nii.gz", reader)
    np.testing.assert_array_equal(read_voxels(tmp_path / "map.nii.gz", reader)[0][0], VOXELS + 1)
    np.testing.assert_allclose(read_grid(tmp_path / "map.nii.gz", reader).affine, SHEARED, atol=1e-6)


def test_reader_of_the_plans_has_priority(tmp_path):
    file = tmp_path / "a_0000.nii.gz"
    sitk.WriteImage(oblique(), str(file))
    named = dataset(".nii.gz", "CT", overwrite_image_reader_writer="NibabelIO")
    assert reader_class(dataset(".nii.gz", "CT"), file) is SimpleITKIO
    assert reader_class(named, file) is NibabelIO
    plans = {"image_reader_writer": "SimpleITKIOWithReorient"}
    assert reader_class(named, file, plans) is SimpleITKIOWithReorient
    file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a_0000.nii.gz: none of nnU-Net's readers can read it"):
        reader_class(dataset(".nii.gz", "CT"), file)


def test_2d_images_and_tiff_volumes_have_the_spacing_of_nnunets_readers(tmp_path):
    sitk.WriteImage(oblique()[:, :, 0], str(tmp_path / "a_0000.nii.gz"))
    grid = read_grid(tmp_path / "a_0000.nii.gz", SimpleITKIO)
    assert grid.is_2d
    expected = SimpleITKIO().read_images([str(tmp_path / "a_0000.nii.gz")])[1]["spacing"]
    np.testing.assert_allclose(grid.spacing, expected)

    tifffile.imwrite(tmp_path / "b_0000.tif", np.zeros((9, 8, 7), np.uint8), photometric="minisblack")
    (tmp_path / "b.json").write_text(json.dumps({"spacing": [2.0, 0.5, 0.5]}))
    reader = reader_class(dataset(".tif", "light"), tmp_path / "b_0000.tif")
    assert reader is Tiff3DIO
    grid = read_grid(tmp_path / "b_0000.tif", reader)
    assert (grid.shape, grid.spacing, grid.is_2d) == ((9, 8, 7), (2.0, 0.5, 0.5), False)


def test_vectors_are_an_error(tmp_path):
    vectors = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.float32), isVector=True)
    sitk.WriteImage(vectors, str(tmp_path / "a_0000.nii.gz"))
    with pytest.raises(ValueError, match="3 values per voxel"):
        read_grid(tmp_path / "a_0000.nii.gz", SimpleITKIO)


def test_hash_depends_only_on_the_voxels(tmp_path):
    sitk.WriteImage(oblique(), str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS.astype(np.float64)), str(tmp_path / "b.nii.gz"))
    (tmp_path / "c.nii.gz").write_bytes(b"no image")
    first, second, third = (hash_voxels(tmp_path / f"{name}.nii.gz", SimpleITKIO) for name in "abc")
    assert first == second is not None
    assert third is None


def test_one_damaged_image_does_not_change_the_number_of_files_per_case(tmp_path):
    (tmp_path / "a_0000.png").write_bytes(b"damaged")
    io.imsave(tmp_path / "b_0000.png", np.zeros((8, 8, 3), np.uint8), check_contrast=False)
    assert list(image_files(tmp_path, dataset(".png", "R", "G", "B"), "unlabeled")) == ["a", "b"]


def test_wrong_number_of_channels_in_a_file_is_an_error(tmp_path):
    io.imsave(tmp_path / "a_0000.png", np.zeros((8, 8, 4), np.uint8), check_contrast=False)
    with pytest.raises(UserError, match=r"case a .* has 4 channels, but dataset.json names 3; convert"):
        image_files(tmp_path, dataset(".png", "R", "G", "B"), "unlabeled")


def test_names_that_cannot_be_printed_are_an_error(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff_0000.nii.gz")).touch()
    with pytest.raises(UserError, match="which cannot be printed; rename it"):
        image_files(tmp_path, dataset(".nii.gz", "MR"), "unlabeled")


def test_truncated_images_have_no_hash(tmp_path):
    file = tmp_path / "a.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(file))
    assert hash_voxels(file, SimpleITKIO) is not None
    file.write_bytes(file.read_bytes()[:-20])
    assert hash_voxels(file, SimpleITKIO) is None
