"""Tests of the ISLES 2022 converter: layouts, grids, resampled FLAIR, units of ADC, data types, empty masks."""

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.isles22 import plan
from nnunet_dycon.dataset_conversion.protocols import published
from nnunet_dycon.errors import UserError
from tests.dataset_conversion.sources import (
    DATA,
    array,
    convert,
    label,
    read_json,
    same_grid,
    stems,
    the_one_error,
    write,
)

SHAPE = (12, 14, 10)
GRID = {"spacing": (2, 2, 2), "origin": (-10, 5, 3)}
NAMES = {  # layout -> paths of a case
    "release": {"dwi": "ISLES-2022/{}/ses-0001/dwi/{}_ses-0001_dwi.nii.gz",
                "adc": "ISLES-2022/{}/ses-0001/dwi/{}_ses-0001_adc.nii.gz",
                "flair": "ISLES-2022/{}/ses-0001/anat/{}_ses-0001_FLAIR.nii.gz",
                "msk": "ISLES-2022/derivatives/{}/ses-0001/{}_ses-0001_msk.nii.gz"},
    "challenge": {"dwi": "rawdata/{}/ses-0001/{}_ses-0001_dwi.nii.gz",
                  "adc": "rawdata/{}/ses-0001/{}_ses-0001_ADC.nii.gz",
                  "flair": "rawdata/{}/ses-0001/{}_ses-0001_flair.nii.gz",
                  "msk": "derivatives/{}/ses-0001/{}_ses-0001_msk.nii.gz"},
}  # fmt: skip


def path(root, case, kind, layout="challenge"):
    return root / NAMES[layout][kind].format(case, case)


def case(number):
    return f"sub-strokecase{number:04d}"


@pytest.fixture
def target(raw):
    return raw / "Dataset101_ISLES2022"


def head(brightness, shape=SHAPE, spacing=GRID["spacing"], origin=GRID["origin"], noise=0.0):
    """Return a bright ball on a dark background, at the same position in mm on every grid, float64."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm(indices * spacing + origin - np.array([1.0, 18.0, 12.0]), axis=-1)
    values = np.where(distance < 8, brightness, 0.0) + noise
    volume = sitk.GetImageFromArray(values.T)
    volume.SetSpacing(spacing)
    volume.SetOrigin(origin)
    return volume


def put_case(root, number, layout="challenge", mask=1, **others):
    """Write DWI and ADC on one grid in float64, FLAIR on another, the mask in uint16; no mask if it is None."""
    volumes = {
        "dwi": head(1000, noise=-5),
        "adc": head(0.8),
        "flair": head(500, shape=(40, 40, 5), spacing=(0.6, 0.7, 5), origin=(-11, 4, 1)),
        "msk": None if mask is None else label(mask, np.uint16, shape=SHAPE, **GRID),
        **others,
    }
    for kind, volume in volumes.items():
        if volume is not None:
            write(path(root, case(number), kind, layout), volume)


def touch_case(root, number, layout="challenge", kinds=("dwi", "adc", "flair", "msk")):
    for kind in kinds:
        file = path(root, case(number), kind, layout)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.parametrize(
    ("layout", "root"),
    [("release", ""), ("release", "ISLES-2022"), ("challenge", ""), ("challenge", "rawdata")],
)
def test_plan_finds_images_and_masks_from_each_root(tmp_path, layout, root):
    for number in (9, 2):
        touch_case(tmp_path, number, layout)
    touch_case(tmp_path, 5, layout, ("dwi", "adc"))
    found = plan(tmp_path / root)
    assert [each.identifier for each in found.training] == [case(2), case(5), case(9)]
    first, second, _ = found.training
    assert first.images == tuple(path(tmp_path, case(2), kind, layout) for kind in ("dwi", "adc"))
    assert (first.label, second.label) == (path(tmp_path, case(2), "msk", layout), None)


def test_plan_for_a_protocol_uses_dwi_only(tmp_path):
    touch_case(tmp_path, 1)
    assert plan(tmp_path, protocol=published("isles22", "dycon")).data_set.channel_names == ("DWI",)
    assert plan(tmp_path).data_set.channel_names == ("DWI", "ADC")
    assert plan(tmp_path, modalities="dwi,FLAIR").data_set.channel_names == ("DWI", "FLAIR")


def test_plan_raises_for_ambiguous_or_missing_files(tmp_path):
    with pytest.raises(
        UserError, match=r"no case found in .*; expected files such as 'sub-strokecase0001_ses-0001_dwi"
    ):
        plan(tmp_path)
    touch_case(tmp_path, 1, kinds=("dwi", "msk"))
    with pytest.raises(UserError, match=r"rawdata/.*/ses-0001: sub-strokecase0001 has no adc"):
        plan(tmp_path)
    touch_case(tmp_path, 1, "release", kinds=("dwi",))
    with pytest.raises(UserError, match=r"dwi\.nii\.gz and .* are both dwi of sub-strokecase0001"):
        plan(tmp_path)


def test_masks_without_images_are_reported(tmp_path):
    touch_case(tmp_path, 1)
    touch_case(tmp_path, 2, kinds=("msk",))
    assert plan(tmp_path).warnings == (f"1 mask has no images and is not used: {case(2)}",)


@pytest.mark.parametrize(
    "options", [("--modalities", "adc"), ("--modalities", "adc,dwi"), ("--modalities", "dwi", "--harmonize_adc")]
)
def test_invalid_modalities_raise(tmp_path, raw, capsys, options):
    touch_case(tmp_path, 1)
    assert convert("isles22", tmp_path, *options) == 2
    assert "--modalities" in the_one_error(capsys)


@pytest.mark.parametrize("layout", ["release", "challenge"])
def test_data_types_grids_and_labels_are_written(tmp_path, target, capsys, layout):
    put_case(tmp_path, 9, layout)
    put_case(tmp_path, 1, layout, mask=None)
    assert convert("isles22", tmp_path) == 0
    assert f"1 training case has no label and is unlabeled: {case(1)}" in capsys.readouterr().out
    dwi, adc, mask = (
        target / name.format(case(9))
        for name in ("imagesTr/{}_0000.nii.gz", "imagesTr/{}_0001.nii.gz", "labelsTr/{}.nii.gz")
    )
    np.testing.assert_array_equal(array(dwi), array(head(1000, noise=-5)).astype(np.float32))
    np.testing.assert_array_equal(array(adc), array(head(0.8)).astype(np.float32))
    np.testing.assert_array_equal(array(mask), array(label(shape=SHAPE)))
    assert sitk.ReadImage(str(mask)).GetPixelID() == sitk.sitkUInt8
    assert all(same_grid(file, head(1)) for file in (dwi, adc, mask))
    assert stems(target / "imagesUn") == [case(1)]
    assert "flair_resampled" not in read_json(target, "conversion_report")["cases"][case(9)]


def test_flair_is_resampled_to_dwi_and_its_overlap_is_reported(tmp_path, target, capsys):
    put_case(tmp_path, 9)
    shifted = head(500, shape=(40, 40, 5), spacing=(0.6, 0.7, 5), origin=(-25, 4, 1))
    put_case(tmp_path, 10, flair=shifted)
    assert convert("isles22", tmp_path, "--modalities", "dwi,flair") == 0
    flair = target / "imagesTr" / f"{case(9)}_0001.nii.gz"
    assert same_grid(flair, head(1))
    inside = array(head(1)) == 1
    assert np.mean(array(flair)[inside] > 250) > 0.85
    cases = read_json(target, "conversion_report")["cases"]
    assert cases[case(9)]["flair_overlap"]["foreground_dice"] > 0.8
    assert cases[case(9)]["flair_overlap"]["brain_without"] < 0.1
    assert cases[case(9)]["warnings"] == []
    assert cases[case(9)]["flair_resampled"].startswith("size: (12, 14, 10) and (40, 40, 5)")
    assert cases[case(10)]["flair_overlap"]["brain_without"] > 0.3
    assert f"warning: case {case(10)}: flair is misaligned with DWI" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "unit", "factor"), [(0.0008, "mm²/s", 1e6), (0.8, "1e-3 mm²/s", 1e3), (800.0, "1e-6 mm²/s", 1)]
)
def test_units_of_adc_are_detected_and_harmonized(tmp_path, target, value, unit, factor):
    put_case(tmp_path, 9, adc=head(value))
    assert convert("isles22", tmp_path, "--harmonize_adc") == 0
    np.testing.assert_allclose(array(target / "imagesTr" / f"{case(9)}_0001.nii.gz").max(), 800, rtol=1e-5)
    facts = read_json(target, "conversion_report")["cases"][case(9)]
    assert (facts["adc_unit"], facts["adc_factor"]) == (unit, factor)


def test_adc_keeps_its_unit_by_default_and_air_is_ignored(tmp_path, target):
    adc = head(0.8)
    adc[0, 0, 0] = 5000.0
    put_case(tmp_path, 9, adc=adc)
    assert convert("isles22", tmp_path) == 0
    facts = read_json(target, "conversion_report")["cases"][case(9)]
    assert (facts["adc_unit"], "adc_factor" in facts) == ("1e-3 mm²/s", False)
    np.testing.assert_array_equal(array(target / "imagesTr" / f"{case(9)}_0001.nii.gz"), array(adc).astype(np.float32))


def test_adc_on_a_different_grid_is_resampled_and_reported(tmp_path, target, capsys):
    put_case(tmp_path, 9, adc=head(0.8, origin=(-11, 5, 3)))
    assert convert("isles22", tmp_path) == 0
    assert same_grid(target / "imagesTr" / f"{case(9)}_0001.nii.gz", head(1))
    assert "adc was not on the grid of dwi" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "value"), [("dwi", 0), ("dwi", 7), ("adc", 0)])
def test_constant_images_raise(tmp_path, raw, capsys, kind, value):
    put_case(tmp_path, 9, **{kind: head(0, noise=value)})
    assert convert("isles22", tmp_path, "--harmonize_adc") == 1
    assert f"{path(tmp_path, case(9), kind)}: all voxels have the same value" in the_one_error(capsys)


def test_mask_on_a_different_grid_raises(tmp_path, target, capsys):
    put_case(tmp_path, 9, msk=label(shape=SHAPE, spacing=(2, 2, 2), origin=(-10, 5, 4)))
    assert convert("isles22", tmp_path) == 1
    assert "_msk.nii.gz differ in origin" in the_one_error(capsys)


def test_empty_masks_are_kept_and_reported(tmp_path, target, capsys):
    put_case(tmp_path, 150, mask=0)
    put_case(tmp_path, 9)
    assert convert("isles22", tmp_path) == 0
    assert stems(target / "labelsTr") == [case(9), case(150)]
    assert read_json(target, "conversion_report")["empty_labels"] == [case(150)]
    assert f"1 case has an empty label and is kept: {case(150)}" in capsys.readouterr().out


def test_empty_masks_are_excluded_from_val_and_test_by_default(tmp_path, target, capsys):
    """In fold 1, 0150 is a test case, and 0151 and 0170 are training cases."""
    protocol = published("isles22", "dycon_fold1")
    other = int(next(name for name in protocol.test if name != case(150))[-4:])
    put_case(tmp_path, 150, mask=0)
    put_case(tmp_path, 151, mask=0)
    put_case(tmp_path, other)
    put_case(tmp_path, 1)
    assert convert("isles22", tmp_path, "--protocol", "dycon_fold1") == 0
    split = read_json(target, "ssl_split")
    assert (split["labeled"], split["test"]) == ([case(1), case(151)], [case(other)])
    assert split["left_out"] == [case(150)]
    assert "its mask is empty" in read_json(target, "conversion_report")["left_out"][case(150)]
    assert convert("isles22", tmp_path, "--protocol", "dycon_fold1", "--keep_empty", "-d", 102) == 0
    assert case(150) in read_json(target.with_name("Dataset102_ISLES2022"), "ssl_split")["test"]
    assert f"1 case of val or test has an empty label, so no Dice: {case(150)}" in capsys.readouterr().out


real = pytest.mark.skipif(not (DATA / "isles22").is_dir(), reason="the real data next to the repository are missing")


@pytest.mark.slow
@real
def test_real_cases(target, capsys):
    assert convert("isles22", DATA / "isles22", "--harmonize_adc") == 0
    assert (stems(target / "imagesTr"), stems(target / "imagesUn")) == ([case(9)], [case(1)])
    cases = read_json(target, "conversion_report")["cases"]
    assert [cases[case(number)]["adc_unit"] for number in (1, 9)] == ["1e-3 mm²/s"] * 2
    assert cases[case(9)]["label_voxels"] == {"0": 915189, "1": 523}
    native = DATA / "isles22" / "rawdata" / case(9) / "ses-0001" / f"{case(9)}_ses-0001_dwi.nii.gz"
    written = target / "imagesTr" / f"{case(9)}_0000.nii.gz"
    np.testing.assert_array_equal(array(written), array(native).astype(np.float32))
    assert same_grid(written, sitk.ReadImage(str(native)))


@pytest.mark.slow
@real
def test_real_flair_in_the_release_layout(tmp_path, target):
    for kind in ("dwi", "adc", "flair", "msk"):
        file = path(tmp_path, case(9), kind, "release")
        file.parent.mkdir(parents=True, exist_ok=True)
        where = "derivatives" if kind == "msk" else "rawdata"
        file.symlink_to(DATA / "isles22" / where / case(9) / "ses-0001" / f"{case(9)}_ses-0001_{kind}.nii.gz")
    assert convert("isles22", tmp_path, "--modalities", "dwi,adc,flair") == 0
    facts = read_json(target, "conversion_report")["cases"][case(9)]
    assert facts["flair_overlap"]["foreground_dice"] > 0.93
    flair, dwi = facts["intensity_under_label"][2]["1"], facts["intensity_under_label"][0]["1"]
    assert 1550 < flair["mean"] < 1610
    assert 460 < dwi["mean"] < 490
