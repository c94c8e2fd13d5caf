"""Tests of scores against manual calculations, a brute-force implementation and MONAI; files and exit codes."""

import csv
import json
import math
import shutil
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from nnunet_dycon.cli import main
from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.inference.evaluation import METRICS, Evaluation, evaluate_folder, score
from tests.inference.files import DIAGONAL, SHAPE, SPACING, declare, save
from tests.tiny import write_volume

DICE, JACCARD, HD95, ASD = METRICS


def box(*bounds, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*b) for b in bounds)] = True
    return mask


def blobs(seed, shape=SHAPE):
    """Return a mask of random smooth objects; masks of different seeds overlap partially."""
    noise = np.random.default_rng(seed).normal(size=shape)
    for axis in range(len(shape)):
        noise = noise + np.roll(noise, 1, axis)
    return noise > 2


def surface_points(mask, spacing):
    """Return coordinates in mm, (N, axes), of mask voxels with a face neighbor outside of the mask or the image."""
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(mask.ndim):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)
    return np.argwhere(padded & ~inner) * np.array(spacing)


def brute_force(reference, prediction, spacing):
    """Return HD95 and ASD in mm from the distances of all pairs of surface voxels."""
    first, second = surface_points(reference, spacing), surface_points(prediction, spacing)
    table = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    forth, back = table.min(1), table.min(0)
    return max(np.percentile(forth, 95), np.percentile(back, 95)), (forth.sum() + back.sum()) / (len(forth) + len(back))


@pytest.fixture
def folders(tmp_path):
    """Return folders of references and predictions with three cases of two labels, and dataset.json with the latter."""
    reference, prediction = tmp_path / "raw" / "labelsTs", tmp_path / "out"
    for seed, case in enumerate(("case_a", "case_b", "case_c")):
        for folder, shift in ((reference, 0), (prediction, 10)):
            organ = blobs(seed + shift)
            save(folder / f"{case}.nii.gz", 1 * organ + (organ & blobs(seed + shift + 5)))
    declare(prediction, {"organ": 1, "tumor": 2}, file_ending=".nii.gz")
    return reference, prediction


def test_overlap_of_known_masks():
    scores = score(box((0, 2), (0, 2), (0, 4)), box((0, 2), (0, 2), (2, 4)), SPACING)
    assert scores[DICE] == pytest.approx(2 * 8 / (16 + 8))
    assert scores[JACCARD] == pytest.approx(8 / 16)
    assert (scores["reference_voxels"], scores["prediction_voxels"]) == (16, 8)


def test_distances_of_known_masks():
    """The reference is one voxel; the prediction has another one at a distance of 3 · 0.8 mm."""
    reference, prediction = box((2, 3), (4, 5), (1, 2)), box((2, 3), (4, 5), (1, 2)) | box((2, 3), (4, 5), (4, 5))
    scores = score(reference, prediction, SPACING)
    assert scores[HD95] == pytest.approx(0.95 * 2.4)  # between the distances 0 and 2.4 of the prediction's voxels
    assert scores[ASD] == pytest.approx((0 + 0 + 2.4) / 3)  # pooled; the mean of both directions' means would be 0.6
    assert score(prediction, reference, SPACING)[HD95] == scores[HD95]


@pytest.mark.filterwarnings("error")
def test_identical_masks_are_perfect():
    scores = score(blobs(0), blobs(0), SPACING)
    assert [scores[metric] for metric in METRICS] == [1, 1, 0, 0]


@pytest.mark.parametrize("spacing", [SPACING, (1.0, 1.0, 1.0), (0.7, 2.5, 0.7)])
@pytest.mark.parametrize("seed", range(4))
def test_distances_equal_brute_force(seed, spacing):
    reference, prediction = blobs(seed), blobs(seed + 20)
    assert reference[0].any()  # some objects touch the border
    scores = score(reference, prediction, spacing)
    assert (scores[HD95], scores[ASD]) == pytest.approx(brute_force(reference, prediction, spacing), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_2d_distances_equal_brute_force(seed):
    reference, prediction = blobs(seed, (20, 15)), blobs(seed + 20, (20, 15))
    scores = score(reference, prediction, (0.5, 0.8))
    assert (scores[HD95], scores[ASD]) == pytest.approx(brute_force(reference, prediction, (0.5, 0.8)), rel=1e-5)


SMALL, FAR = box((2, 4), (3, 6), (4, 7)), box((3, 5), (7, 9), (2, 5))


@pytest.mark.parametrize(
    ("reference", "prediction"),
    [
        (SMALL, FAR),
        (box((0, 2), (0, 5), (0, 3)), SMALL),  # touches three faces of the image
        (box((4, 6), (9, 12), (8, 10)), box((4, 6), (7, 12), (7, 10))),  # both masks touch the other three
        (box((0, 6), (0, 12), (0, 10)), SMALL),  # the whole image
        (box((0, 6), (0, 12), (0, 10)), box((0, 6), (0, 12), (0, 10))),
        (box((0, 1), (0, 12), (0, 10)), box((5, 6), (0, 12), (0, 10))),  # first and last slice
    ],
)
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_cropping_does_not_change_distances(reference, prediction):
    given = {"y_pred": prediction[None, None], "y": reference[None, None], "spacing": SPACING}
    hd95 = compute_hausdorff_distance(**given, include_background=True, percentile=95)
    asd = compute_average_surface_distance(**given, include_background=True, symmetric=True)
    scores = score(reference, prediction, SPACING)
    assert (scores[HD95], scores[ASD]) == (hd95.item(), asd.item())
    assert (scores[HD95], scores[ASD]) == pytest.approx(brute_force(reference, prediction, SPACING), rel=1e-5)


@pytest.mark.parametrize("empty", ["reference", "prediction"])
def test_one_empty_mask_has_dice_0_and_the_diagonal_as_distance(empty):
    masks = {"reference": SMALL, "prediction": SMALL, empty: np.zeros(SHAPE, bool)}
    scores = score(**masks, spacing_mm=SPACING)
    assert [scores[metric] for metric in METRICS] == pytest.approx([0, 0, DIAGONAL, DIAGONAL])


@pytest.mark.filterwarnings("error")
def test_two_empty_masks_have_no_scores():
    scores = score(np.zeros(SHAPE, bool), np.zeros(SHAPE, bool), SPACING)
    assert all(math.isnan(scores[metric]) for metric in METRICS)


def test_masks_and_spacing_of_different_shape_raise():
    with pytest.raises(ValueError, match="shapes"):
        score(SMALL, SMALL[:-1], SPACING)
    with pytest.raises(ValueError, match="spacing"):
        score(SMALL, SMALL, (1.0, 1.0))


def test_labels_are_read_from_the_folder_of_predictions(folders):
    result = evaluate_folder(*folders)
    assert result.labels == ["organ", "tumor"]
    assert [(row["case"], row["label"]) for row in result.rows] == [
        (case, label) for case in ("case_a", "case_b", "case_c") for label in ("organ", "tumor")
    ]
    reference, prediction = (blobs(1 + s) & blobs(6 + s) for s in (0, 10))  # label 2 of case_b
    assert result.rows[3] == {"case": "case_b", "label": "tumor", **score(reference, prediction, SPACING)}


def test_labels_are_read_from_the_raw_data_set(folders):
    reference, prediction = folders
    (prediction / "dataset.json").rename(reference.parent / "dataset.json")
    assert evaluate_folder(reference, prediction).labels == ["organ", "tumor"]


def test_dataset_json_of_the_predictions_has_priority(folders):
    declare(folders[0].parent, {"other": 1})
    assert evaluate_folder(*folders).labels == ["organ", "tumor"]


@pytest.mark.parametrize("remove", [True, False])
def test_labels_can_be_chosen_by_value(folders, remove):
    by_name = evaluate_folder(*folders).rows
    if remove:
        (folders[1] / "dataset.json").unlink()
    rows = evaluate_folder(*folders, labels=[2, 2]).rows
    assert rows == tuple({**row, "label": "2"} for row in by_name if row["label"] == "tumor")


def test_missing_labels_are_an_error(folders):
    (folders[1] / "dataset.json").unlink()
    with pytest.raises(UsageError, match="-l"):
        evaluate_folder(*folders)
    declare(folders[1], {})
    with pytest.raises(UsageError, match="no foreground"):
        evaluate_folder(*folders)


@pytest.mark.parametrize("labels", [[0], [1, 0], [-1], [3]])
def test_background_and_ignore_label_cannot_be_chosen(folders, labels):
    declare(folders[1], {"organ": 1, "tumor": 2, "ignore": 3})
    with pytest.raises(UsageError, match="-l"):
        evaluate_folder(*folders, labels=labels)


def test_regions_are_unions_of_labels(tmp_path):
    reference, prediction = tmp_path / "labelsTs", tmp_path / "out"
    save(reference / "a.nii.gz", 1 * box((1, 4), (2, 6), (2, 6)) + box((2, 3), (3, 5), (3, 5)))
    save(prediction / "a.nii.gz", 2 * box((1, 4), (2, 6), (2, 6)))
    declare(prediction, {"whole": [1, 2], "core": [2]}, regions_class_order=[1, 2])
    whole, core = evaluate_folder(reference, prediction).rows
    assert (whole["label"], whole[DICE], whole[HD95]) == ("whole", 1, 0)
    assert (core["label"], core["reference_voxels"], core["prediction_voxels"]) == ("core", 4, 48)


@pytest.mark.parametrize("labels", [None, [1]])
def test_ignored_voxels_are_in_neither_mask(tmp_path, labels):
    reference, prediction = tmp_path / "labelsTs", tmp_path / "out"
    annotated = box((1, 3), (2, 6), (2, 6))
    save(reference / "a.nii.gz", 1 * annotated + 2 * box((3, 6), (0, 12), (0, 10)))
    save(prediction / "a.nii.gz", box((1, 5), (2, 6), (2, 6)))
    declare(prediction, {"organ": 1, "ignore": 2})
    (row,) = evaluate_folder(reference, prediction, labels=labels).rows
    assert {key: row[key] for key in METRICS} == dict(zip(METRICS, (1, 1, 0, 0), strict=True))
    assert row["prediction_voxels"] == annotated.sum()


def test_missing_prediction_is_an_error_with_its_case(folders):
    (folders[1] / "case_b.nii.gz").unlink()
    with pytest.raises(UserError, match="1 of 3 references") as caught:
        evaluate_folder(*folders)
    assert all(text in str(caught.value) for text in ("case_b", *map(str, folders)))


def test_prediction_without_reference_is_a_warning(folders, capsys):
    save(folders[1] / "case_x.nii.gz", SMALL)
    assert len(evaluate_folder(*folders).rows) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning" in line
    assert "case_x" in line


def test_different_size_and_spacing_are_errors(folders):
    for array, spacing, message in ((SMALL[:-1], SPACING, "size"), (SMALL, (3.0, 0.5, 0.81), "spacing")):
        save(folders[1] / "case_b.nii.gz", array, spacing)
        with pytest.raises(UserError, match=f"differ in {message}") as caught:
            evaluate_folder(*folders)
        assert all(str(folder / "case_b.nii.gz") in str(caught.value) for folder in folders)
    save(folders[1] / "case_b.nii.gz", SMALL, (3.0, 0.5, 0.8001))  # rounded by a writer
    evaluate_folder(*folders)


def test_different_origin_is_a_warning(folders, capsys):
    save(folders[1] / "case_b.nii.gz", SMALL, origin=(5.0, 0.0, 0.0))
    save(folders[1] / "case_c.nii.gz", SMALL, origin=(1e-4, 0.0, 0.0))
    evaluate_folder(*folders)
    (line,) = capsys.readouterr().err.splitlines()
    assert "origin" in line
    assert "1 of 3 cases: case_b" in line


@pytest.mark.parametrize("side", [0, 1])
def test_unknown_label_values_are_a_warning(folders, capsys, side):
    save(folders[side] / "case_b.nii.gz", 7 * SMALL)
    evaluate_folder(*folders)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folders[side] / "case_b.nii.gz") in line
    assert line.endswith(": 7")


def test_empty_ignore_label_is_none(folders):
    reference, prediction = folders
    expected = evaluate_folder(reference, prediction, labels=[1]).rows
    declare(prediction, {"organ": 1, "ignore": []})
    assert evaluate_folder(reference, prediction, labels=[1]).rows == expected


def test_nan_is_an_unknown_label_value(tmp_path, capsys):
    mask = box((1, 4), (2, 6), (2, 6))
    save(tmp_path / "labelsTr" / "a.nrrd", mask)
    write_volume(np.where(mask, 1, np.nan), tmp_path / "pred" / "a.nrrd", SPACING[::-1])
    declare(tmp_path / "pred", {"organ": 1}, file_ending=".nrrd")
    (row,) = evaluate_folder(tmp_path / "labelsTr", tmp_path / "pred").rows
    assert row["dice"] == 1
    assert "a.nrrd: unknown label values, scored as background: nan" in capsys.readouterr().err


def test_invalid_folders_are_errors(folders, tmp_path):
    reference, prediction = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    for pair, message in (
        ((reference, tmp_path / "nowhere"), "no such folder"),
        ((tmp_path / "nowhere", prediction), "no such folder"),
        ((empty, prediction), "no reference files"),
        ((reference, empty), "-l"),
        ((prediction, prediction), "same folder"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_folder(*pair)
    with pytest.raises(UserError, match="3 of 3"):
        evaluate_folder(reference, empty, labels=[1])


def test_damaged_files_are_errors_with_their_names(folders):
    (folders[1] / "case_b.nii.gz").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"case_b.nii.gz: cannot be read"):
        evaluate_folder(*folders)
    save(folders[1] / "case_b.nii.gz", blobs(0))
    content = (folders[1] / "case_b.nii.gz").read_bytes()
    (folders[1] / "case_b.nii.gz").write_bytes(content[:-20])  # the header is intact
    with pytest.raises(UserError, match=r"case_b.nii.gz: cannot be read"):
        evaluate_folder(*folders)
    (folders[1] / "dataset.json").write_text('{"labels": {"0": "background"}}')
    with pytest.raises(UserError, match=r"dataset.json"):
        evaluate_folder(*folders)


def test_4d_label_map_is_an_error(folders):
    sitk.WriteImage(sitk.Image([4, 4, 4, 2], sitk.sitkUInt8), str(folders[1] / "case_b.nii.gz"))
    with pytest.raises(UserError, match="dimensions"):
        evaluate_folder(*folders)


def test_file_ending_of_dataset_json_is_used(folders):
    reference, prediction = folders
    for folder in folders:
        save(folder / "only.nrrd", SMALL)
    declare(prediction, {"organ": 1}, file_ending=".nrrd")
    assert [row["case"] for row in evaluate_folder(reference, prediction).rows] == ["only"]
    declare(prediction, {"organ": 1}, file_ending=".png")
    with pytest.raises(UserError, match="no spacing"):
        evaluate_folder(reference, prediction)


def rows_of(*scores, label="organ"):
    """Return rows from (dice, reference voxels, prediction voxels) of each case."""
    keys = ("case", "label", *METRICS, "reference_voxels", "prediction_voxels")
    values = [(f"case_{i}", label, dice, dice, 8 * dice, 4 * dice, *n) for i, (dice, *n) in enumerate(scores)]
    return tuple(dict(zip(keys, line, strict=True)) for line in values)


SOME = Evaluation(
    rows_of((0.5, 3, 4), (math.nan, 0, 0), (0.0, 2, 0), (0.25, 9, 9)) + rows_of((math.nan, 0, 0), label="tumor")
)


def test_statistics_leave_out_cases_without_scores():
    content = SOME.as_json()
    assert content["mean"]["organ"] == {DICE: 0.25, JACCARD: 0.25, HD95: 2, ASD: 1}
    assert content["median"]["organ"][DICE] == 0.25
    assert content["mean"]["tumor"] == dict.fromkeys(METRICS)
    assert content["foreground_mean"][DICE] == 0.25
    assert content["one_empty"] == {"organ": 1, "tumor": 0}
    assert content["both_empty"] == {"organ": 1, "tumor": 1}
    assert set(METRICS) <= set(content["definitions"])


def test_foreground_mean_gives_equal_weight_to_labels():
    result = Evaluation(rows_of((1.0, 1, 1)) + rows_of((0.0, 1, 1), (0.0, 1, 1), (0.6, 1, 1), label="tumor"))
    assert result.as_json()["foreground_mean"][DICE] == pytest.approx((1.0 + 0.2) / 2)


def test_csv_and_json_contain_the_same_scores(tmp_path):
    SOME.write(tmp_path / "new" / "folder")
    content = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())
    with (tmp_path / "new" / "folder" / "evaluation.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == ["evaluation.csv", "evaluation.json"]
    assert content == SOME.as_json()
    assert list(table[0]) == ["case", "label", *METRICS, "reference_voxels", "prediction_voxels"]
    numbers = [
        {k: v if k in ("case", "label") else (float(v) if v else None) for k, v in line.items()} for line in table
    ]
    assert numbers == content["cases"]
    assert numbers[1][DICE] is None


def test_unwritable_output_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        SOME.write(tmp_path / "file")


def test_table_has_scores_and_definitions():
    lines = SOME.as_table().splitlines()
    assert lines[0].split() == ["case", "label", *METRICS]
    assert lines[1].split() == ["case_0", "organ", "0.500", "0.500", "4.000", "2.000"]
    assert any(line.startswith("one empty: 1 (") for line in lines)
    assert any(line.startswith("both empty: 2 (") for line in lines)
    assert len({len(line) for line in lines[:6]}) == 1
    assert "empty:" not in replace(SOME, rows=rows_of((0.5, 3, 4))).as_table()


def test_command_writes_files_and_returns_exit_codes(folders, tmp_path, capsys):
    reference, prediction = map(str, folders)
    assert main(["evaluate", "-ref", reference, "-pred", prediction]) == 0
    assert "asd_mm_symmetric" in capsys.readouterr().out
    written = (folders[1] / "evaluation.json").read_text()
    assert main(["evaluate", "-ref", reference, "-pred", prediction, "-o", str(tmp_path / "o"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(written)
    assert (tmp_path / "o" / "evaluation.json").read_text() == written

    assert main(["evaluate", "-ref", reference, "-pred", prediction, "-l", "0"]) == 2
    (folders[1] / "case_a.nii.gz").unlink()
    capsys.readouterr()
    assert main(["evaluate", "-ref", reference, "-pred", prediction, "-l", "1"]) == 1
    assert "case_a" in capsys.readouterr().err


def test_number_of_processes_does_not_change_scores(folders):
    for seed in range(3):
        for folder in folders:
            save(folder / f"more_{seed}.nii.gz", 1 * blobs(seed) + blobs(len(folder.name) + seed))
    assert evaluate_folder(*folders, num_processes=2).rows == evaluate_folder(*folders).rows


def test_labels_that_were_rescaled_are_rounded(folders):
    expected = evaluate_folder(*folders).rows
    for file in sorted(folders[1].glob("*.nii.gz")):
        volume = sitk.ReadImage(str(file), sitk.sitkFloat64)
        sitk.WriteImage(volume * 0.99995, str(file))
    assert evaluate_folder(*folders).rows == expected


def disc(radius: int, shape=(64, 64)) -> np.ndarray:
    y, x = np.indices(shape)
    return ((y - 32) ** 2 + (x - 32) ** 2 < radius**2).astype(np.uint8)


@pytest.fixture
def pair(tmp_path):
    """Return a function that writes a reference and a prediction and returns the scores of the label."""

    def scores(reference, prediction, ending=".nii.gz", **dataset):
        folders = [tmp_path / name for name in ("reference", "prediction")]
        for folder, volume in zip(folders, (reference, prediction)):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if isinstance(volume, sitk.Image):
                sitk.WriteImage(volume, str(folder / f"a{ending}"))
            else:
                volume(folder / f"a{ending}")
        content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ending}
        (folders[1] / "dataset.json").write_text(json.dumps(content | dataset))
        (row,) = evaluate_folder(*folders).rows
        return {metric: row[metric] for metric in METRICS}

    return scores


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_volumes_of_one_slice_are_scored_in_2d(pair, capsys, axis):
    images = [sitk.GetImageFromArray(disc(radius)) for radius in (20, 25)]
    expected = pair(*images)
    assert "one slice" not in capsys.readouterr().err
    assert expected["asd_mm_symmetric"] > 4
    volumes = [sitk.GetImageFromArray(np.expand_dims(disc(radius), axis)) for radius in (20, 25)]
    assert pair(*volumes) == expected
    assert "volumes of one slice are scored in 2D" in capsys.readouterr().err


def test_prediction_with_turned_axes_at_the_same_position_is_reoriented(pair, capsys):
    odd = np.zeros((10, 12, 14), np.uint8)
    odd[2:5, 4:9, 6:12] = 1
    reference = sitk.GetImageFromArray(odd)
    reference.SetSpacing((0.5, 1.0, 2.0))
    shifted = sitk.GetImageFromArray(np.roll(odd, 1, 0))
    shifted.CopyInformation(reference)
    expected = pair(reference, shifted)
    assert 0.5 < expected["dice"] < 1
    assert pair(reference, sitk.DICOMOrient(shifted, "PIR")) == expected
    assert "origin or direction differ" not in capsys.readouterr().err


def test_sheared_nifti_is_read_with_nibabel(pair):
    affine = np.array([[1, 0, 0.03, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])

    def write_sheared(mask):
        def write(file):
            image = nibabel.Nifti1Image(mask.T, affine)
            image.set_sform(affine, 1)
            image.set_qform(None, 0)
            nibabel.save(image, file)

        return write

    masks = [np.stack([disc(radius)] * 3) for radius in (20, 25)]
    scores = pair(*map(write_sheared, masks))
    assert scores["dice"] == pytest.approx(2 * masks[0].sum() / (masks[0].sum() + masks[1].sum()))


def test_tiff_volumes_have_the_spacing_of_their_json_files(pair):
    def write_tiff(mask):
        def write(file):
            tifffile.imwrite(file, np.stack([mask] * 9), photometric="minisblack")
            file.with_suffix(".json").write_text(json.dumps({"spacing": [5.0, 2.0, 2.0]}))

        return write

    scores = pair(write_tiff(disc(20)), write_tiff(disc(25)), ending=".tif")
    assert scores["hd95_mm_max_directed"] == pytest.approx(2 * 5, abs=1)


def test_tiff_without_spacing_is_a_warning(pair, capsys):
    def write(file):
        tifffile.imwrite(file, np.stack([disc(20)] * 9).astype(np.uint8), photometric="minisblack")

    def write_with_spacing(file):
        write(file)
        file.with_suffix(".json").write_text(json.dumps({"spacing": [5.0, 2.0, 2.0]}))

    pair(write, write, ending=".tif")
    assert "2 label maps have no spacing, and are scored with 1 mm" in capsys.readouterr().err
    with pytest.raises(UserError, match="differ in spacing"):
        pair(write, write_with_spacing, ending=".tif")


@pytest.mark.parametrize(("value", "pixdim", "message"), [(np.nan, 1, "NaN"), (1, 0, "0 x 1 x 1, is not finite")])
def test_nifti_that_is_read_with_other_values_is_an_error(pair, value, pixdim, message):
    def write(file):
        image = nibabel.Nifti1Image(np.where(np.stack([disc(20)] * 3), value, 0).astype(np.float32), np.eye(4))
        content = bytearray(image.to_bytes())
        content[80:84] = np.float32(pixdim).tobytes()
        file.write_bytes(content)

    with pytest.raises(UserError, match=message):
        pair(write, write, ending=".nii")


def test_references_with_another_ending_are_a_warning(folders, capsys):
    save(folders[0] / "case_x.nii", SMALL)
    assert len(evaluate_folder(*folders).rows) == 6
    assert "only *.nii.gz is scored (file_ending in dataset.json), and not case_x.nii" in capsys.readouterr().err


def test_unknown_reader_of_the_plans_is_an_error(folders):
    (folders[1] / "plans.json").write_text('{"image_reader_writer": "OtherIO"}')
    with pytest.raises(UserError, match="the plans name the reader OtherIO"):
        evaluate_folder(*folders)


def test_region_order_that_contradicts_its_regions_is_a_warning(pair, capsys):
    mask = sitk.GetImageFromArray(np.stack([disc(20)] * 3))
    labels = {"background": 0, "a": [1, 2]}
    pair(mask, mask, labels=labels, regions_class_order=[1])
    assert "regions_class_order" not in capsys.readouterr().err
    pair(mask, mask, labels=labels, regions_class_order=[3])
    printed = capsys.readouterr().err
    assert 'dataset.json: "regions_class_order" is [3], so nnU-Net stores predictions of label 1' in printed
