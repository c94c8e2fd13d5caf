"""Tests of the BraTS 2019 converter: file endings, nested folders, missing masks, label values, regions, h5 files."""

import h5py
import numpy as np
import pytest

from nnunet_dycon.dataset_conversion.brats19 import plan
from nnunet_dycon.dataset_conversion.protocols import published
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

ROOT = "MICCAI_BraTS_2019_Data_Training"
GRID = {"spacing": (1, 1, 1), "origin": (0, -6, 0)}
MODALITIES = ("t1", "t1ce", "t2", "flair")  # in nnU-Net's order


@pytest.fixture
def target(raw):
    return raw / "Dataset101_BraTS2019"


def put_case(root, name, mask=(1, 2, 4), grade="HGG", ending=".nii.gz"):
    """Write all modalities of a case with different intensities; no mask if it is None. Return the folder."""
    folder = root / grade / name
    for number, modality in enumerate(MODALITIES):
        write(folder / f"{name}_{modality}{ending}", image(number, 1000 * (number + 1), np.int16, **GRID))
    if mask is not None:
        write(folder / f"{name}_seg{ending}", label(mask, **GRID))
    return folder


def touch_case(folder, names=(*MODALITIES, "seg"), ending=".nii.gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{folder.name}_{name}{ending}").touch()


def found(source, **options):
    return {case.identifier: case for case in plan(source, **options).training}


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("root", ["", ROOT, f"{ROOT}/{ROOT}", f"archive/{ROOT}/{ROOT}"])
def test_plan_finds_both_endings_in_nested_folders(tmp_path, root, ending):
    touch_case(tmp_path / root / "HGG" / "BraTS19_A_1", ending=ending)
    touch_case(tmp_path / root / "LGG" / "BraTS19_B_1", ending=ending)
    (tmp_path / root / "name_mapping.csv").touch()
    (tmp_path / root / "HGG" / "BraTS19_A_1" / f"._BraTS19_A_1_seg{ending}").touch()
    cases = found(tmp_path)
    assert list(cases) == ["BraTS19_A_1", "BraTS19_B_1"]
    assert [case.facts for case in cases.values()] == [{"grade": "HGG"}, {"grade": "LGG"}]
    assert cases["BraTS19_A_1"].label == tmp_path / root / "HGG" / "BraTS19_A_1" / f"BraTS19_A_1_seg{ending}"
    assert [path.name for path in cases["BraTS19_A_1"].images] == [f"BraTS19_A_1_{m}{ending}" for m in MODALITIES]


def test_plan_accepts_a_single_mask_with_a_different_name(tmp_path):
    touch_case(tmp_path / "HGG" / "A", MODALITIES)
    (tmp_path / "HGG" / "A" / "W39_1998.09.19_Segm.nii").touch()
    assert found(tmp_path)["A"].label.name == "W39_1998.09.19_Segm.nii"
    (tmp_path / "HGG" / "A" / "other_seg_2.nii").touch()
    with pytest.raises(UserError, match="may all be the mask"):
        plan(tmp_path)


def test_plan_of_validation_cases_with_upper_case_names(tmp_path):
    touch_case(tmp_path / "MICCAI_BraTS_2019_Data_Validation" / "V", [m.upper() for m in MODALITIES])
    case = found(tmp_path)["V"]
    assert (case.label, case.facts, len(case.images)) == (None, {}, 4)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["HGG/A/A_flair.nii.gz", "HGG/A/A_flair.nii"],
            r"A_flair\.nii and .*\.nii\.gz are both flair of case A",
        ),
        (["HGG/A/A_t1.nii", "LGG/A/A_t1.nii"], r"case A is in .*HGG/A and in .*LGG/A"),
        (["HGG/A/A_t1.nii", "HGG/A/A_t1ce.nii", "HGG/A/A_flair.nii"], r"HGG/A: there is no A_t2\.nii\.gz or \.nii"),
        (["A_flair.nii", "B_flair.nii"], "are both flair of case .*; keep one; expected .* a folder per case"),
        (["x/pain_t1.nii"], "complete the case, choose other --modalities or correct -i: expected 'HGG/<case>/"),
        (["HGG/A/A_seg.nii"], r"no case found in .*; expected 'HGG/<case>/<case>_flair\.nii\.gz'"),
        ([], "no case found"),
    ],
)
def test_plan_raises_for_ambiguous_or_missing_files(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        plan(tmp_path)


def test_modalities_that_are_not_selected_may_be_missing(tmp_path):
    touch_case(tmp_path / "HGG" / "A", ["flair", "seg"])
    assert [path.name for path in found(tmp_path, modalities="flair")["A"].images] == ["A_flair.nii.gz"]


@pytest.mark.parametrize("modalities", ["pd", "flair,flair", ""])
def test_unknown_or_repeated_modalities_raise(tmp_path, raw, capsys, modalities):
    touch_case(tmp_path / "HGG" / "A")
    assert convert("brats19", tmp_path, "--modalities", f"t1,{modalities}") == 2
    assert "choose from t1, t1ce, t2, flair" in the_one_error(capsys)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_whole_tumor_of_four_modalities(tmp_path, target, ending):
    put_case(tmp_path / ROOT, "A", ending=ending)
    put_case(tmp_path / ROOT, "B", mask=2, grade="LGG", ending=ending)
    put_case(tmp_path / ROOT, "C", mask=None, ending=ending)
    assert convert("brats19", tmp_path) == 0
    about = read_json(target, "dataset")
    assert about["channel_names"] == {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
    assert about["labels"] == {"background": 0, "whole_tumor": 1}
    assert (stems(target / "imagesTr"), stems(target / "labelsTr"), stems(target / "imagesUn")) == (
        ["A", "B"], ["A", "B"], ["C"],
    )  # fmt: skip
    for number in range(4):
        written = target / "imagesTr" / f"A_{number:04d}.nii.gz"
        np.testing.assert_array_equal(array(written), array(image(number, 1000 * (number + 1), np.int16)))
        assert same_grid(written, image(**GRID))
    for case in "AB":
        np.testing.assert_array_equal(array(target / "labelsTr" / f"{case}.nii.gz"), array(label(1)))
    cases = read_json(target, "conversion_report")["cases"]
    assert [cases[name]["grade"] for name in "ABC"] == ["HGG", "LGG", "HGG"]


def test_regions_are_written(tmp_path, target):
    put_case(tmp_path, "A")
    assert convert("brats19", tmp_path, "--target", "regions", "--modalities", "flair,t1") == 0
    about = read_json(target, "dataset")
    assert about["channel_names"] == {"0": "FLAIR", "1": "T1"}
    assert about["labels"] == {
        "background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3,
    }  # fmt: skip
    assert about["regions_class_order"] == [1, 2, 3]
    native, written = array(label((1, 2, 4))), array(target / "labelsTr" / "A.nii.gz")
    for old, new in ((0, 0), (2, 1), (1, 2), (4, 3)):
        assert (written[native == old] == new).all()


def test_protocol_uses_flair_only_and_prints_its_faults(tmp_path, target, capsys):
    protocol = published("brats19", "ssl4mis")
    names = (*protocol.train[:3], protocol.val[0], protocol.test[0])
    for name in names:
        put_case(tmp_path / ROOT, name)
    assert convert("brats19", tmp_path, "--protocol", "ssl4mis", "--labeled", 2) == 0
    split = read_json(target, "ssl_split")
    assert (split["labeled"], split["unlabeled"]) == (list(names[:2]), [names[2]])
    assert (split["val"], split["test"]) == ([names[3]], [names[4]])
    assert read_json(target, "dataset")["channel_names"] == {"0": "FLAIR"}
    np.testing.assert_array_equal(
        array(target / "imagesTs" / f"{names[4]}_0000.nii.gz"), array(image(3, 4000, np.int16))
    )
    printed = capsys.readouterr().out
    assert "DyCON's released test script scores val.txt" in printed
    assert "omit --modalities" not in printed


def test_protocol_with_other_modalities_prints_a_note(tmp_path, target, capsys):
    for name in published("brats19", "ssl4mis").train[:2]:
        put_case(tmp_path, name)
    assert convert("brats19", tmp_path, "--protocol", "ssl4mis", "--modalities", "t1,flair") == 0
    assert "use FLAIR only" in capsys.readouterr().out


def test_unknown_label_value_raises(tmp_path, raw, capsys):
    put_case(tmp_path, "A", mask=3)
    assert convert("brats19", tmp_path) == 1
    assert "A_seg.nii.gz: label values 0, 3, but only 0, 1, 2, 4 are known" in the_one_error(capsys)


def test_modality_on_a_different_grid_raises(tmp_path, raw, capsys):
    folder = put_case(tmp_path, "A")
    write(folder / "A_t2.nii.gz", image(origin=(0, 0, 0), spacing=(1, 1, 1)))
    assert convert("brats19", tmp_path) == 1
    error = the_one_error(capsys)
    assert "A_t1.nii.gz and " in error
    assert "A_t2.nii.gz differ in origin: (0, -6, 0) and (0, 0, 0)" in error


def test_masks_of_unlabeled_cases_are_never_opened(tmp_path, target):
    for name in "AB":
        folder = put_case(tmp_path, name)
    (folder / "B_seg.nii.gz").write_bytes(b"garbage")
    seed = next(s for s in range(20) if np.random.default_rng(s).permutation(2)[0] == 0)
    assert convert("brats19", tmp_path, "--labeled", 1, "--seed", seed) == 0
    assert (stems(target / "labelsTr"), stems(target / "imagesUn")) == (["A"], ["B"])
    assert "B_seg" not in (target / "conversion_report.json").read_text()


# h5


def put_h5(file, mask=(1,)):
    """Write an h5 file as in SSL4MIS and return its image (x, y, z)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).normal(size=array(label(mask)).shape).astype(np.float32)
    with h5py.File(file, "w") as content:
        content["image"], content["label"] = values.T, array(label(mask)).T
    return values


def test_h5_files_are_converted_with_the_axes_zyx(tmp_path, target, capsys):
    values = put_h5(tmp_path / "BraTS2019" / "data" / "BraTS19_A.h5")
    put_h5(tmp_path / "BraTS2019" / "data" / "brats_B.h5")
    (tmp_path / "BraTS2019" / "mri_norm2.h5").touch()
    seed = next(s for s in range(20) if np.random.default_rng(s).permutation(2)[0] == 0)
    assert convert("brats19", tmp_path, "--labeled", 1, "--seed", seed) == 0
    written = target / "imagesTr" / "BraTS19_A_0000.nii.gz"
    np.testing.assert_array_equal(array(written), values)
    np.testing.assert_array_equal(array(target / "labelsTr" / "BraTS19_A.nii.gz"), array(label((1,))))
    assert same_grid(written, image(spacing=(1, 1, 1), origin=(0, 0, 0)))
    assert read_json(target, "dataset")["channel_names"] == {"0": "FLAIR"}
    assert (stems(target / "labelsTr"), stems(target / "imagesUn")) == (["BraTS19_A"], ["brats_B"])
    assert "already cropped and normalized" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (["BraTS_A.h5", "x/BraTS_A.h5"], {}, r"A\.h5 and .*x/BraTS_A\.h5 are both case BraTS_A; name a folder"),
        (["A.h5", "training/C_1.h5"], {}, "no case found"),
        (
            ["BraTS_A.h5", "HGG/B/B_flair.nii"],
            {"modalities": "flair"},
            r"has MRI \(.*B_flair\.nii\) and normalized h5 files",
        ),
        (["BraTS_A.h5"], {"modalities": "flair,t1"}, "only FLAIR and the whole tumor; omit"),
        (["BraTS_A.h5"], {"target": "regions"}, "only FLAIR and the whole tumor; omit"),
    ],
)
def test_invalid_h5_sources_raise(tmp_path, files, options, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        plan(tmp_path, **options)


@pytest.mark.skipif(not (DATA / "brats19_standin").is_dir(), reason="the data next to the repository are missing")
def test_stand_in_data(target):
    assert convert("brats19", DATA / "brats19_standin", "--modalities", "flair") == 0
    assert (stems(target / "imagesTr"), stems(target / "imagesUn")) == (
        ["BraTS19_STANDIN_001_1"], ["BraTS19_STANDIN_002_1"],
    )  # fmt: skip
    (mask,) = DATA.glob("brats19_standin/*/HGG/*/*_seg.nii.gz")
    written = target / "labelsTr" / "BraTS19_STANDIN_001_1.nii.gz"
    np.testing.assert_array_equal(array(written), array(mask) > 0)
    case = read_json(target, "conversion_report")["cases"]["BraTS19_STANDIN_002_1"]
    assert (case["size"], case["grade"], case["origin_mm"]) == ([240, 240, 155], "LGG", [0, -239, 0])
