"""Tests of warnings about unlabeled cases that differ from the labeled ones in unit, spacing or orientation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from nnunet_dycon.cli import main
from nnunet_dycon.data.unlabeled import UnlabeledCases, preprocess_unlabeled
from nnunet_dycon.doctor import installation
from nnunet_dycon.errors import UserError
from tests.tiny import plan_and_preprocess, set_environment

RNG = np.random.default_rng(0)
SPACING = (0.5, 0.5, 2.0)  # x, y, z


def scan() -> tuple[np.ndarray, np.ndarray]:
    """Return a CT image in HU with air around soft tissue, and the mask of an organ, both (Z, Y, X)."""
    voxels = RNG.normal(-1000, 5, (16, 24, 24))
    voxels[2:, 4:20, 4:20] = RNG.normal(40, 60, (14, 16, 16))
    mask = np.zeros(voxels.shape, np.uint8)
    z, y, x = RNG.integers(3, 9, 3)
    mask[z : z + 6, y + 2 : y + 9, x + 2 : x + 9] = 1
    voxels[mask > 0] += 70
    return voxels.astype(np.float32), mask


def write(voxels: np.ndarray, file: Path, spacing=SPACING, orientation: str = "LPS") -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(file))


def write_tiff(voxels: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(file, voxels, photometric="minisblack")
    case = file.stem.removesuffix("_0000")
    file.with_name(f"{case}.json").write_text(json.dumps({"spacing": SPACING[::-1]}))


def make(root: Path, name: str, ending: str, put) -> Path:
    """Write and preprocess 3 labeled cases and 2 unlabeled ones; return the root."""
    raw = root / "nnUNet_raw" / name
    for number in range(5):
        voxels, mask = scan()
        images = "imagesTr" if number < 3 else "imagesUn"
        put(voxels, raw / images / f"case{number}_0000{ending}")
        if number < 3:
            put(mask, raw / "labelsTr" / f"case{number}{ending}")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "numTraining": 3}
    (raw / "dataset.json").write_text(json.dumps(content | {"file_ending": ending}))
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, root)
        patch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner fails with 0
        plan_and_preprocess(int(name[7:10]))
    return root


@pytest.fixture(scope="module")
def ct_root(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("ct"), "Dataset903_CT", ".nii.gz", write)


@pytest.fixture
def ct(ct_root, tmp_path, monkeypatch) -> Path:
    """Return a folder imagesUn in CT that the test may change."""
    shutil.copytree(ct_root, tmp_path / "root")
    set_environment(monkeypatch, tmp_path / "root")
    return tmp_path / "root" / "nnUNet_raw" / "Dataset903_CT" / "imagesUn"


def warnings_of_preprocessing(capsys, dataset: int = 903) -> list[str]:
    assert main(["preprocess_unlabeled", "-d", str(dataset), "-np", "1"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_damaged_labeled_case_is_named(ct):
    folder = UnlabeledCases.of_dataset("903", "3d_fullres", "nnUNetPlans").folder.with_name("nnUNetPlans_3d_fullres")
    file = folder / "case1.b2nd"
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes(500) + content[middle + 500 :])
    with pytest.raises(UserError, match=r"case1.b2nd cannot be read; remove its folder, and run nnUNetv2_preprocess"):
        preprocess_unlabeled("903", "3d_fullres")


def test_similar_cases_have_no_warnings(ct, capsys):
    assert warnings_of_preprocessing(capsys) == []
    assert UnlabeledCases.of_dataset("903", "3d_fullres", "nnUNetPlans").remarks() == []


CHANGES = {
    "windowed to [0, 1]": (lambda hu: (hu.clip(-125, 275) + 125) / 400, "has almost equal CT intensities"),
    "offset of 1024": (lambda hu: hu + 1024, "has most CT intensities above the range of the labels"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_other_units_of_ct_are_named(ct, capsys, monkeypatch, change, message):
    monkeypatch.setattr(installation, "check_look_up", lambda trainer: [])  # it imports nnU-Net in a new process
    write(change(scan()[0]), ct / "other_0000.nii.gz")
    (warning,) = warnings_of_preprocessing(capsys)
    assert warning.startswith(f"warning: 1 unlabeled case {message}: other, unlike in the labeled cases.")
    assert main(["doctor", "-d", "903", "-f", "all"]) == 0
    assert f"warning  unlabeled: 1 unlabeled case {message}: other" in capsys.readouterr().out


def test_intensities_below_those_of_all_labels_are_an_error(ct, capsys):
    write(scan()[0] - 1024, ct / "other_0000.nii.gz")
    assert main(["preprocess_unlabeled", "-d", "903", "-np", "1"]) == 1
    assert "other_0000.nii.gz (its intensities cannot be normalized; they probably" in capsys.readouterr().err


def test_more_air_and_other_organs_are_no_other_unit(ct, capsys):
    voxels, _ = scan()
    write(np.pad(voxels, ((0, 0), (12, 12), (12, 12)), constant_values=-1000), ct / "air_0000.nii.gz")
    voxels[5:9] += 300  # bone
    write(voxels, ct / "bone_0000.nii.gz")
    assert warnings_of_preprocessing(capsys) == []


def test_other_orientation_is_named(ct, capsys):
    write(scan()[0], ct / "turned_0000.nii.gz", orientation="RAS")
    (warning,) = warnings_of_preprocessing(capsys)
    expected = "1 unlabeled case has its axes in the order RAS: turned; labeled cases: LPS."
    assert warning.startswith(f"warning: {expected}")


def test_spacing_of_exactly_one_is_named_if_labeled_cases_have_another(ct, capsys):
    write(scan()[0], ct / "unknown_0000.nii.gz", spacing=(1, 1, 1))
    (warning,) = warnings_of_preprocessing(capsys)
    assert warning.startswith("warning: 1 unlabeled case has a spacing of exactly 1 mm: unknown; labeled cases: 2 x")


def test_header_without_spacing_is_an_error(ct, capsys):
    file = ct / "zero_0000.nii"
    write(scan()[0], file)
    content = bytearray(file.read_bytes())
    content[84:88] = np.float32(0).tobytes()  # pixdim[2]
    file.unlink()
    (ct / "zero_0000.nii.gz").write_bytes(bytes(content))
    assert main(["preprocess_unlabeled", "-d", "903", "-np", "1"]) == 1
    assert "zero_0000.nii.gz (the spacing in its header, 0.5 x 0 x 2, is not" in capsys.readouterr().err


def test_files_with_another_ending_are_named(ct, capsys):
    (ct / "scan_0000.nrrd").touch()
    (warning,) = warnings_of_preprocessing(capsys)
    assert warning.endswith("nnU-Net reads only *.nii.gz, so it does not use scan_0000.nrrd")


def test_spacing_files_of_tiff_images_are_checked(tmp_path, monkeypatch, capsys):
    """A missing file is a warning, and a changed, added or removed one makes the preprocessed cases out of date."""
    make(tmp_path, "Dataset904_Tiff", ".tif", write_tiff)
    set_environment(monkeypatch, tmp_path)
    raw = tmp_path / "nnUNet_raw" / "Dataset904_Tiff" / "imagesUn"
    assert warnings_of_preprocessing(capsys, 904) == []
    cases = UnlabeledCases.of_dataset("904", "3d_fullres", "nnUNetPlans")
    assert cases.fault() is None
    file = raw / "case3.json"
    for change in (file.unlink, lambda: file.write_text('{"spacing": [2.0, 0.5, 0.5]}  ')):
        change()
        assert "have changed" in cases.fault()
        warnings = warnings_of_preprocessing(capsys, 904)
        is_missing = not file.exists()
        assert (
            any("nnU-Net assumes a spacing of 1 mm, because there is no case3.json" in w for w in warnings)
            == is_missing
        )
        assert any("has a spacing of exactly 1 mm: case3" in w for w in warnings) == is_missing
        assert cases.fault() is None
    shutil.rmtree(raw)
    assert cases.fault() is None
