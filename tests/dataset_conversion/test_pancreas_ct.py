"""Tests of the Pancreas-CT converter: DICOM, NIfTI, orientation of labels, copies of one scan, h5 files."""

import re

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.pancreas_ct import plan
from nnunet_dycon.dataset_conversion.protocols import published
from nnunet_dycon.errors import UserError
from tests.dataset_conversion.sources import (
    DATA,
    array,
    convert,
    read_json,
    same_grid,
    stems,
    the_one_error,
    write,
    write_dicom,
)

SHAPE = (6, 7, 12)
SPACING = (0.5, 0.75, 1.0)
# As in the TCIA data: rows from posterior to anterior, slices from head to foot.
DIRECTION = (1, 0, 0, 0, -1, 0, 0, 0, -1)
DICOM = "Pancreas-CT/{}/11-24-2015-study/Pancreas-99667"


@pytest.fixture
def target(raw):
    return raw / "Dataset101_PancreasCT"


def volume(values, kind):
    image = sitk.GetImageFromArray(values.T.astype(kind))
    image.SetSpacing(SPACING)
    image.SetDirection(DIRECTION)
    return image


def organ():
    """Return an off-center block without one corner, so that it has no symmetry."""
    mask = np.zeros(SHAPE, bool)
    mask[1:3, 4:7, 2:6] = True
    mask[1, 4, 2] = False
    return mask


def scan_values(number=0):
    """Return an organ of 100 HU in tissue of -50 HU with noise."""
    noise = np.random.default_rng(number).normal(scale=60, size=SHAPE)
    return np.where(organ(), 100, noise - 50)


def scan(number=0):
    return volume(scan_values(number), np.int16)


def label(mask=None, kind=np.uint8):
    return volume(organ() if mask is None else mask, kind)


def put_case(root, number, dicom=DICOM, labeled=True, names="1-{:03d}.dcm"):
    name = f"PANCREAS_{number:04d}"
    write_dicom(root / dicom.format(name), scan(number), names)
    if labeled:
        write(root / "TCIA_pancreas_labels-02-05-2017" / f"label{number:04d}.nii.gz", label())


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def touch_dicom(root, folder, count=12):
    touch(root, *(f"{folder}/1-{number:03d}.dcm" for number in range(count)))


def found(source, **options):
    return {case.identifier: case for case in plan(source, **options).training}


# Listing of cases


@pytest.mark.parametrize(
    "folder", ["manifest-1/" + DICOM, "DOI/{}/1.3.6.1/1.3.6.2", "{}", "'{}'/study/series", "pancreas/{}/x"]
)
def test_plan_finds_dicom_in_all_layouts(tmp_path, folder):
    touch_dicom(tmp_path, folder.format("PANCREAS_0003"))
    touch_dicom(tmp_path, folder.format("PANCREAS_0001"))
    touch(tmp_path, "labels/label0001.nii.gz", "labels/label0009.nii.gz", "labels/label0025.nii.gz", "LICENSE")
    cases = found(tmp_path)
    assert list(cases) == ["PANCREAS_0001", "PANCREAS_0003"]
    assert cases["PANCREAS_0001"].images == (tmp_path / folder.format("PANCREAS_0001"),)
    assert cases["PANCREAS_0001"].label == tmp_path / "labels/label0001.nii.gz"
    assert cases["PANCREAS_0003"].label is None
    assert plan(tmp_path).warnings == ("1 label has no image and is not used: PANCREAS_0009",)


def test_plan_finds_nifti(tmp_path):
    touch(tmp_path, "data/PANCREAS_0001.nii.gz", "data/'PANCREAS_0002.nii.gz'", "PANCREAS_0003.nii")
    touch(tmp_path, "label/label0001.nii.gz", "label/._label0002.nii.gz")
    assert list(found(tmp_path)) == ["PANCREAS_0001", "PANCREAS_0002", "PANCREAS_0003"]
    assert found(tmp_path)["PANCREAS_0002"].label is None


def test_copies_are_left_out_by_default_with_a_reason(tmp_path):
    for number in (1, 2, 25, 70):
        touch(tmp_path, f"PANCREAS_{number:04d}.nii.gz", f"label{number:04d}.nii.gz")
    assert list(found(tmp_path)) == ["PANCREAS_0001", "PANCREAS_0002"]
    reason = "a copy of PANCREAS_0002"
    assert plan(tmp_path).left_out == {"PANCREAS_0025": reason, "PANCREAS_0070": reason}
    assert len(found(tmp_path, keep_duplicates=True)) == 4
    assert plan(tmp_path, keep_duplicates=True).left_out == {}


def test_incomplete_series_are_skipped_and_reported(tmp_path):
    touch_dicom(tmp_path, DICOM.format("PANCREAS_0001"))
    touch_dicom(tmp_path, DICOM.format("PANCREAS_0003"), count=9)
    touch(tmp_path, "label0001.nii.gz")
    assert list(found(tmp_path)) == ["PANCREAS_0001"]
    assert "has only 9 DICOM files and is skipped" in plan(tmp_path).warnings[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no case found in"),
        (["label0001.nii.gz"], "no case found in"),
        (["PANCREAS_0001.nii.gz"], "has no label0001.nii.gz; unpack TCIA_pancreas_labels"),
        (["a/PANCREAS_0001.nii.gz", "b/PANCREAS_0001.nii"], "are both the image of PANCREAS_0001; delete one"),
        (["PANCREAS_0001.nii", "a/label0001.nii.gz", "b/label0001.nii.gz"], "are both the label of PANCREAS_0001"),
        (["PANCREAS_0001.nii", "label0001.nii.gz", "0001.h5"], "has CT .* and normalized h5 files"),
        (["image0001_norm.h5", "0002.h5"], "were preprocessed differently"),
        (["0001.h5", "pancreas_001.h5"], "are both the image of PANCREAS_0001"),
        ([f"series/{number}.dcm" for number in range(12)], "the path does not name the case of these DICOM files"),
    ],
)
def test_plan_raises_for_ambiguous_or_missing_files(tmp_path, files, message):
    touch(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        plan(tmp_path)


def test_two_series_of_one_case_raise(tmp_path):
    touch_dicom(tmp_path, "PANCREAS_0001/study/one")
    touch_dicom(tmp_path, "PANCREAS_0001/study/two")
    with pytest.raises(UserError, match=r"study/one and .*study/two are both the image of PANCREAS_0001"):
        plan(tmp_path)


# Conversion


@pytest.mark.parametrize(("dicom", "names"), [(DICOM, "1-{:03d}.dcm"), ("DOI/{}/1.3/1.4", "{:06d}.dcm")])
def test_dicom_is_read_in_hounsfield_units_on_the_grid_of_the_label(tmp_path, target, dicom, names):
    put_case(tmp_path / "source", 1, dicom, names=names)
    put_case(tmp_path / "source", 3, dicom, labeled=False, names=names)
    assert convert("pancreas_ct", tmp_path / "source") == 0
    image, mask = target / "imagesTr" / "PANCREAS_0001_0000.nii.gz", target / "labelsTr" / "PANCREAS_0001.nii.gz"
    np.testing.assert_array_equal(array(image), array(scan(1)))
    np.testing.assert_array_equal(array(mask), organ())
    assert same_grid(image, scan())
    assert same_grid(mask, scan())
    assert sitk.ReadImage(str(image)).GetPixelID() == sitk.sitkInt16
    assert stems(target / "imagesUn") == ["PANCREAS_0003"]
    assert read_json(target, "dataset")["channel_names"] == {"0": "CT"}
    case = read_json(target, "conversion_report")["cases"]["PANCREAS_0001"]
    assert case["intensity_under_label"] == [{"1": {"mean": 100, "std": 0}}]
    assert (case["share_of_label_with_plausible_hu"], case["warnings"]) == (1, [])


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "RPI", "SAL", "PIR"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_label_in_another_orientation_with_correct_header_is_reoriented(tmp_path, target, orientation, kind):
    put_case(tmp_path / "source", 1)
    turned = sitk.DICOMOrient(label(kind=kind), orientation)
    assert array(turned).shape != SHAPE or not np.array_equal(array(turned), organ())
    write(tmp_path / "source" / "TCIA_pancreas_labels-02-05-2017" / "label0001.nii.gz", turned)
    assert convert("pancreas_ct", tmp_path / "source") == 0
    written = target / "labelsTr" / "PANCREAS_0001.nii.gz"
    np.testing.assert_array_equal(array(written), organ())
    assert same_grid(written, scan())
    case = read_json(target, "conversion_report")["cases"]["PANCREAS_0001"]
    assert (case["label_reoriented"], case["warnings"]) == (True, [])


@pytest.mark.parametrize(("axis", "expected"), [(0, "x"), (1, "y"), (2, "z")])
def test_label_flipped_without_its_header_is_reported(tmp_path, target, capsys, axis, expected):
    put_case(tmp_path / "source", 1)
    flipped = label(np.flip(organ(), axis))
    write(tmp_path / "source" / "TCIA_pancreas_labels-02-05-2017" / "label0001.nii.gz", flipped)
    assert convert("pancreas_ct", tmp_path / "source") == 0
    assert f"if it were flipped along {expected}; check the overlay" in capsys.readouterr().out


def test_label_of_air_is_reported(tmp_path, target, capsys):
    write(tmp_path / "s" / "PANCREAS_0001.nii.gz", volume(np.where(organ(), -900, -1000), np.int16))
    write(tmp_path / "s" / "label0001.nii.gz", label())
    assert convert("pancreas_ct", tmp_path / "s") == 0
    assert "only 0% of the label is within -100 to 250 HU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask[:, :, :11], "label0001.nii.gz differ in size: (6, 7, 12) and (6, 7, 11)"),
        (lambda mask: sitk.Flip(mask, [False, True, False])[:, 1:, :], "differ in size"),
        (lambda mask: shifted(mask, (0, 0.6, 0)), "differ in origin"),
        (lambda mask: spaced(mask, (0.5, 0.75, 1.25)), "differ in spacing"),
        (lambda mask: spaced(sitk.DICOMOrient(mask, "RAS"), (0.5, 0.75, 1.25)), "differ in"),
        (lambda mask: shifted(sitk.DICOMOrient(mask, "RAS"), (0, 0, 1)), "differ in"),
        (lambda mask: mask * 5, "label values 0, 5, but only 0, 1 are known"),
    ],
)
def test_label_on_another_grid_or_with_unknown_values_raises(tmp_path, target, capsys, change, message):
    put_case(tmp_path / "source", 1)
    write(tmp_path / "source" / "TCIA_pancreas_labels-02-05-2017" / "label0001.nii.gz", change(label()))
    assert convert("pancreas_ct", tmp_path / "source") == 1
    assert message in the_one_error(capsys)
    assert not target.exists()


def shifted(image, by):
    image.SetOrigin(np.add(image.GetOrigin(), by).tolist())
    return image


def spaced(image, spacing):
    image.SetSpacing(spacing)
    return image


def remove(folder):
    (folder / "1-005.dcm").unlink()


def copy(folder):
    (folder / "1-100.dcm").write_bytes((folder / "1-005.dcm").read_bytes())


def cut(folder):
    content = (folder / "1-005.dcm").read_bytes()
    (folder / "1-005.dcm").write_bytes(content[: len(content) // 3])


def empty(folder):
    (folder / "1-005.dcm").write_bytes(b"")


def add_series(folder):
    write_dicom(folder, scan(7), "2-{:03d}.dcm", series="1.2.4")


def remove_last(folder):
    (folder / "1-012.dcm").unlink()


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (remove, ["1-004.dcm and 1-006.dcm are 2 mm apart, others 1 mm: a slice is missing or displaced"]),
        (copy, ["1-005.dcm and 1-100.dcm have the same position in the patient; delete one"]),
        (cut, ["1-005.dcm"]),
        (empty, ["1-005.dcm"]),
        (add_series, ["Pancreas-99667: expected one DICOM series, found 2"]),
        (remove_last, ["Pancreas-99667 and ", "label0001.nii.gz differ in size: (6, 7, 11) and (6, 7, 12)"]),
    ],
)
def test_damaged_dicom_raises(tmp_path, target, capsys, damage, messages):
    put_case(tmp_path / "source", 1)
    damage(tmp_path / "source" / DICOM.format("PANCREAS_0001"))
    assert convert("pancreas_ct", tmp_path / "source") == 1
    error = the_one_error(capsys)
    assert all(message in error for message in messages), error
    assert not target.exists()


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("1-001.dcm", ["11 DICOM slices are numbered 2 to 12: the first or last slice may be missing"]),
        ("1-012.dcm", []),  # cannot be detected
    ],
)
def test_missing_first_slice_of_an_unlabeled_scan_is_reported(tmp_path, target, missing, expected):
    put_case(tmp_path / "source", 1)
    put_case(tmp_path / "source", 3, labeled=False)
    (tmp_path / "source" / DICOM.format("PANCREAS_0003") / missing).unlink()
    assert convert("pancreas_ct", tmp_path / "source") == 0
    cases = read_json(target, "conversion_report")["cases"]
    assert [cases[f"PANCREAS_{number:04d}"]["warnings"] for number in (1, 3)] == [[], expected]


def test_slices_are_sorted_by_position_not_by_name(tmp_path, target):
    put_case(tmp_path / "source", 1)
    folder = tmp_path / "source" / DICOM.format("PANCREAS_0001")
    (folder / "1-001.dcm").rename(folder / "9-999.dcm")
    assert convert("pancreas_ct", tmp_path / "source") == 0
    np.testing.assert_array_equal(array(target / "imagesTr" / "PANCREAS_0001_0000.nii.gz"), array(scan(1)))


def test_dicom_with_the_folder_converter(tmp_path, raw):
    put_case(tmp_path / "source", 1)
    patterns = ("--channel", "CT=**/{case}/*/*/", "--masks", "*/{case}.nii.gz")
    labels = tmp_path / "source" / "TCIA_pancreas_labels-02-05-2017"
    (labels / "label0001.nii.gz").rename(labels / "PANCREAS_0001.nii.gz")
    assert convert("folder", tmp_path / "source", *patterns, "--foreground", "pancreas=1") == 0
    folder = raw / "Dataset101_Own"
    np.testing.assert_array_equal(array(folder / "imagesTr" / "PANCREAS_0001_0000.nii.gz"), array(scan(1)))
    np.testing.assert_array_equal(array(folder / "labelsTr" / "PANCREAS_0001.nii.gz"), organ())


# Roles


def put_nifti(root, *numbers):
    for number in numbers:
        write(root / f"PANCREAS_{number:04d}.nii.gz", scan(number))
        write(root / f"label{number:04d}.nii.gz", label())


def test_protocol_leaves_out_copies(tmp_path, target, capsys):
    put_nifti(tmp_path / "s", 1, 2, 25, 63, 70)
    assert convert("pancreas_ct", tmp_path / "s", "--protocol", "dycon", "--labeled", 1) == 0
    split = read_json(target, "ssl_split")
    assert [split[role] for role in ("labeled", "unlabeled", "test")] == [
        ["PANCREAS_0001"], ["PANCREAS_0002"], ["PANCREAS_0063"],
    ]  # fmt: skip
    assert split["left_out"] == ["PANCREAS_0025", "PANCREAS_0070"]
    printed = capsys.readouterr().out
    assert "scores test1.list, all of whose 20 cases are training cases" in printed
    assert "in the published lists 0002 and 0025 are training cases, 0070 is a test case" in printed
    assert "77 of the 82 cases of protocol dycon are absent" in printed
    assert read_json(target, "conversion_report")["left_out"]["PANCREAS_0070"] == "a copy of PANCREAS_0002"


def test_kept_duplicates_have_their_published_roles(tmp_path, target):
    put_nifti(tmp_path / "s", 1, 2, 25, 70)
    assert convert("pancreas_ct", tmp_path / "s", "--protocol", "mcnet", "--keep_duplicates") == 0
    split = read_json(target, "ssl_split")
    protocol = published("pancreas_ct", "mcnet")
    there = {f"PANCREAS_{number:04d}" for number in (1, 2, 25, 70)}
    assert split["labeled"] == [name for name in protocol.train if name in there]
    assert split["test"] == [name for name in protocol.test if name in there]
    assert ("PANCREAS_0002" in split["labeled"], "PANCREAS_0025" in split["test"]) == (True, True)


def test_split_file_with_copies_raises_without_keep_duplicates(tmp_path, split_file, target, capsys):
    put_nifti(tmp_path / "s", 1, 2, 25)
    split = split_file({"labeled": ["PANCREAS_0001", "PANCREAS_0002"], "test": ["PANCREAS_0025"]})
    assert convert("pancreas_ct", tmp_path / "s", "--split", split) == 1
    assert "case PANCREAS_0025 (test) is left out: a copy of PANCREAS_0002" in the_one_error(capsys)
    assert convert("pancreas_ct", tmp_path / "s", "--split", split, "--keep_duplicates") == 0
    assert "PANCREAS_0002 (labeled) and PANCREAS_0025 (test) are copies of one scan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labeled", "expected"),
    [
        ("50%", r"cases PANCREAS_0002 \(\w+\) and .* are copies of one scan on different sides of the split"),
        ("100%", "the labeled cases PANCREAS_0002 and PANCREAS_0025 and PANCREAS_0070 are copies of one scan; a fold"),
    ],
)
def test_draw_with_kept_duplicates_warns(tmp_path, target, labeled, expected):
    put_nifti(tmp_path / "s", 1, 2, 3, 25, 70)
    assert convert("pancreas_ct", tmp_path / "s", "--labeled", labeled, "--keep_duplicates") == 0
    split = read_json(target, "ssl_split")
    assert len(split["labeled"] + split["unlabeled"]) == 5
    (warning,) = read_json(target, "conversion_report")["warnings"]
    assert re.match(expected, warning)


# h5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Pancreas_h5/image0001_norm.h5", "MC-Net: 1 mm on all axes"),
        ("0001.h5", "CoraNet and BCP: cropped"),
        ("pancreas_001.h5", "only approximately in z"),
        ("Pancreas_data/PANCREAS_0001.h5", "DyCON: the recipe is not published"),
    ],
)
def test_h5_families(tmp_path, target, capsys, name, expected):
    file = tmp_path / "s" / name
    file.parent.mkdir(parents=True)
    values = np.random.default_rng(0).normal(size=SHAPE)
    with h5py.File(file, "w") as content:
        content["image"], content["label"] = values, organ().astype(np.float32)
    assert convert("pancreas_ct", tmp_path / "s") == 0
    image = target / "imagesTr" / "PANCREAS_0001_0000.nii.gz"
    np.testing.assert_array_equal(array(image), values.astype(np.float32))
    np.testing.assert_array_equal(array(target / "labelsTr" / "PANCREAS_0001.nii.gz"), organ())
    assert sitk.ReadImage(str(image)).GetSpacing() == (1, 1, 1)
    assert read_json(target, "dataset")["channel_names"] == {"0": "normalized_CT"}
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("float16", np.float32),
        (">f4", np.float32),
        (">i2", np.int16),
        ("float64", np.float32),
        ("longdouble", np.float32),
    ],
)
def test_h5_of_data_types_that_simpleitk_does_not_support(tmp_path, target, kind, written):
    values = scan_values().astype(kind)
    with h5py.File(tmp_path / "0001.h5", "w") as content:
        content["image"], content["label"] = values, organ()
    assert convert("pancreas_ct", tmp_path) == 0
    image = array(target / "imagesTr" / "PANCREAS_0001_0000.nii.gz")
    assert image.dtype == written
    np.testing.assert_array_equal(image, values.astype(written))
    np.testing.assert_array_equal(array(target / "labelsTr" / "PANCREAS_0001.nii.gz"), organ())


@pytest.mark.parametrize(
    "image", [None, np.zeros((3, 4)), np.zeros((3, 0, 4)), np.full((3, 4, 5), b"a"), np.ones((3, 4, 5), complex), 7]
)
def test_h5_without_a_volume_raises(tmp_path, raw, capsys, image):
    with h5py.File(tmp_path / "0001.h5", "w") as content:
        content["label"] = organ()
        if image is None:
            content.create_group("image")
        else:
            content["image"] = image
    assert convert("pancreas_ct", tmp_path) == 1
    assert "0001.h5: expected a 3D volume in 'image'" in the_one_error(capsys)


# Real data


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "pancreas_ct").is_dir(), reason="the real data next to the repository are missing")
def test_real_case(target):
    assert convert("pancreas_ct", DATA / "pancreas_ct") == 0
    case = read_json(target, "conversion_report")["cases"]["PANCREAS_0001"]
    assert case["intensity_under_label"] == [{"1": {"mean": 102.5568, "std": 30.8643}}]
    assert (case["size"], case["spacing_mm"]) == ([512, 512, 240], [0.859375, 0.859375, 1])
    assert case["warnings"] == []
    (folder,) = DATA.glob("pancreas_ct/Pancreas-CT/PANCREAS_0001/*/*")
    written = sitk.ReadImage(str(target / "imagesTr" / "PANCREAS_0001_0000.nii.gz"))
    np.testing.assert_array_equal(array(written)[:, :, 99], array(sitk.ReadImage(str(folder / "1-100.dcm")))[:, :, 0])
