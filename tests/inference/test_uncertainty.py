"""Tests of entropy maps and rankings: closed forms, loops over voxels, nnU-Net's readers, and invalid files."""

import csv
import json
import math
import shutil
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunet_dycon.cli import main
from nnunet_dycon.components.label_space import RegionLabels
from nnunet_dycon.inference import uncertainty
from nnunet_dycon.inference.uncertainty import measure
from tests.tiny import TEST

SHAPE = (4, 5, 6)


def softmax(seed, labels=3, shape=SHAPE, scale=2.0):
    """Return random probabilities (labels, Z, Y, X) of mutually exclusive labels."""
    logits = np.random.default_rng(seed).normal(scale=scale, size=(labels, *shape))
    return (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)


def of_foreground(probability):
    """Return probabilities (2, Z, Y, X) of background and one label."""
    probability = np.asarray(probability, np.float32)
    return np.stack([1 - probability, probability])


def ball(inside=1.0, rim=0.0, radius=4, shape=(16, 16, 16)):
    """Return probabilities of a ball: `inside` in the ball, `rim` in a rim of one voxel around it, 0 elsewhere."""
    grid = np.indices(shape) - np.array(shape)[:, None, None, None] // 2
    distance = np.sqrt((grid**2).sum(0))
    return of_foreground(np.where(distance < radius, inside, np.where(distance < radius + 1, rim, 0)))


def save(folder, case, probabilities, segmentation=None, spacing=(1.0, 1.0, 1.0), ending=".nii.gz"):
    """Write a case like nnUNetv2_predict --save_probabilities; spacing in mm, (X, Y, Z)."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{case}.npz", probabilities=probabilities)
    image = sitk.GetImageFromArray((probabilities.argmax(0) if segmentation is None else segmentation).astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(folder / f"{case}{ending}"))


def declare(folder, labels, regions_class_order=None, **plans):
    """Write dataset.json with the labels, and plans.json."""
    about = {"labels": {"background": 0, **labels}, "file_ending": ".nii.gz"}
    about |= {"regions_class_order": regions_class_order} if regions_class_order else {}
    (folder / "dataset.json").write_text(json.dumps(about))
    (folder / "plans.json").write_text(json.dumps(plans))


def rank(*arguments) -> int:
    """Run the command and return its exit code."""
    return main(["predict_uncertainty", "-np", "1", *map(str, arguments)])


def ranked(folder) -> dict[str, dict]:
    """Return the rows of uncertainty.csv by case, in the order of the file."""
    with (folder / "uncertainty" / "uncertainty.csv").open() as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def refusal(capsys, *arguments) -> str:
    """Return the single error line that a failing command prints."""
    assert rank(*arguments) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def read(file) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


@pytest.mark.parametrize("labels", [2, 3, 14])
def test_uniform_probabilities_have_the_entropy_ln_k(labels):
    result = measure([np.full((labels, *SHAPE), 1 / labels, np.float32)], 1.0)
    np.testing.assert_allclose(result.maps["entropy"], math.log(labels), rtol=1e-6)
    assert result.numbers["entropy_nats"] == pytest.approx(math.log(labels))


def test_probabilities_of_0_and_1_have_no_entropy_and_an_expected_dice_of_1():
    result = measure([ball()], 0.001)
    assert not result.maps["entropy"].any()
    voxels = np.count_nonzero(ball()[1])
    expected = {"expected_dice": 1, "entropy_nats": 0, "expected_error_ml": 0, "predicted_ml": voxels / 1000}
    assert result.numbers == pytest.approx(expected)


def by_loops(members, voxel_ml):
    """Return the numbers of DEFINITIONS, computed voxel by voxel with Python floats."""
    labels = range(1, len(members[0]))
    voxels = list(np.ndindex(members[0].shape[1:]))
    points = [[[float(p) for p in member[(slice(None), *voxel)]] for voxel in voxels] for member in members]
    means = [[fmean(values) for values in zip(*at)] for at in zip(*points)]

    def entropy(p):
        return -sum(x * math.log(x) for x in p if x > 0)

    zone = [i for i, p in enumerate(means) if 1 - p[0] >= 0.1]
    dice, between = [], []
    for k in labels:
        here = [p[k] for p in means if p.index(max(p)) == k]
        soft = sum(p[k] for p in means if p[k] >= 0.1)
        if here or soft:
            dice.append(2 * sum(here) / (len(here) + soft))
        for a, b in combinations(points, 2):
            first, second = ({i for i, p in enumerate(m) if p.index(max(p)) == k} for m in (a, b))
            if first | second:
                between.append(2 * len(first & second) / (len(first) + len(second)))
    numbers = {
        "expected_dice": fmean(dice),
        "entropy_nats": fmean(entropy(means[i]) for i in zone),
        "expected_error_ml": voxel_ml * sum(1 - max(means[i]) for i in zone),
        "predicted_ml": voxel_ml * sum(p.index(max(p)) > 0 for p in means),
    }
    if len(members) > 1:
        information = [entropy(means[i]) - fmean(entropy(m[i]) for m in points) for i in zone]
        numbers |= {"mutual_information_nats": fmean(information), "member_dice": fmean(between)}
    return numbers


@pytest.mark.parametrize("at_a_time", [1, 2**23])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_numbers_equal_a_loop_over_voxels(monkeypatch, count, dtype, at_a_time):
    monkeypatch.setattr(uncertainty, "_VALUES_AT_A_TIME", at_a_time)
    members = [softmax(seed).astype(dtype) for seed in range(count)]
    assert measure(members, 0.5).numbers == pytest.approx(by_loops(members, 0.5), rel=1e-5)


def sigmoid(seed, regions=3, shape=SHAPE):
    """Return random probabilities (regions, Z, Y, X) of overlapping regions."""
    return (1 / (1 + np.exp(-np.random.default_rng(seed).normal(scale=2.0, size=(regions, *shape))))).astype(np.float32)


def regions_by_loops(members, voxel_ml):
    """Return the same numbers for regions."""
    voxels = list(np.ndindex(members[0].shape[1:]))
    points = [[[float(p) for p in member[(slice(None), *voxel)]] for voxel in voxels] for member in members]
    means = [[fmean(values) for values in zip(*at)] for at in zip(*points)]

    def entropy(p):
        return -fmean(x * math.log(x) + (1 - x) * math.log(1 - x) for x in p)

    zone = [i for i, p in enumerate(means) if max(p) >= 0.1]
    dice, between = [], []
    for r in range(len(members[0])):
        here = [p[r] for p in means if p[r] > 0.5]
        dice.append(2 * sum(here) / (len(here) + sum(p[r] for p in means if p[r] >= 0.1)))
        for a, b in combinations(points, 2):
            first, second = ({i for i, p in enumerate(m) if p[r] > 0.5} for m in (a, b))
            between.append(2 * len(first & second) / (len(first) + len(second)))
    numbers = {
        "expected_dice": fmean(dice),
        "entropy_nats": fmean(entropy(means[i]) for i in zone),
        "expected_error_ml": voxel_ml * sum(fmean(min(x, 1 - x) for x in means[i]) for i in zone),
        "predicted_ml": voxel_ml * sum(max(p) > 0.5 for p in means),
    }
    if len(members) > 1:
        information = [entropy(means[i]) - fmean(entropy(m[i]) for m in points) for i in zone]
        numbers |= {"mutual_information_nats": fmean(information), "member_dice": fmean(between)}
    return numbers


@pytest.mark.parametrize("at_a_time", [1, 2**23])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("regions", [1, 3])
def test_numbers_of_regions_equal_a_loop_over_voxels(monkeypatch, regions, count, at_a_time):
    monkeypatch.setattr(uncertainty, "_VALUES_AT_A_TIME", at_a_time)
    members = [sigmoid(seed, regions) for seed in range(count)]
    found = measure(members, 0.5, RegionLabels())
    assert found.numbers == pytest.approx(regions_by_loops(members, 0.5), rel=1e-5)
    assert len(found.dice_per_label) == regions


def test_one_region_has_the_numbers_of_one_label():
    inside = ball(0.9, 0.3)
    numbers = [measure([inside], 1.0).numbers, measure([inside[1:]], 1.0, RegionLabels()).numbers]
    assert numbers[0] == pytest.approx(numbers[1])


@pytest.fixture
def of_regions(tmp_path):
    """Return two folders with predictions of two regions and nnU-Net's label maps."""
    folders = [tmp_path / "student", tmp_path / "teacher"]
    for seed, folder in enumerate(folders):
        probabilities = sigmoid(seed, 2)
        labels = np.where(probabilities[1] > 0.5, 5, np.where(probabilities[0] > 0.5, 2, 0))
        save(folder, "case", probabilities, segmentation=labels)
        declare(folder, {"whole": [2, 5], "core": 5}, regions_class_order=[2, 5])
    return folders


def test_predictions_of_regions_are_ranked(of_regions, tmp_path, capsys):
    assert rank("-i", *of_regions, "-o", tmp_path / "uncertainty") == 0
    assert "warning" not in capsys.readouterr().err
    summary = json.loads((tmp_path / "uncertainty" / "uncertainty.json").read_text())
    (row,) = summary["cases"]
    assert row["expected_dice_per_label"].keys() == {"whole", "core"}
    members = [np.load(folder / "case.npz")["probabilities"] for folder in of_regions]
    assert {name: row[name] for name in summary["definitions"] if name != "rank"} == pytest.approx(
        regions_by_loops(members, 0.001), rel=1e-5
    )
    assert read(tmp_path / "uncertainty" / "case_entropy.nii.gz").max() <= math.log(2)


def test_invalid_predictions_of_regions_are_reported(of_regions, capsys):
    folder = of_regions[0]
    save(folder, "case", sigmoid(0, 2))  # its label map has the most probable region
    assert rank("-i", folder) == 0
    assert "differs from the segmentation of highest probability" in capsys.readouterr().err
    save(folder, "case", sigmoid(0, 3))
    assert "3 channels, but dataset.json requires 2 (one for each region)" in refusal(capsys, "-i", folder)
    save(folder, "case", sigmoid(0, 2) + 0.5)
    assert "probabilities are not all between 0 and 1" in refusal(capsys, "-i", folder)
    (folder / "dataset.json").unlink()
    save(folder, "case", sigmoid(0, 2))
    assert "copy the dataset.json that defines regions into the folder" in refusal(capsys, "-i", folder)


def test_numbers_do_not_depend_on_the_field_of_view():
    inside = ball(0.9, 0.3)
    wide = np.pad(inside, ((0, 0), (20, 20), (20, 20), (20, 20)))
    wide[0], wide[1] = np.where(wide.any(0), wide[0], 0.999), np.where(wide.any(0), wide[1], 0.001)
    assert measure([wide], 1.0).numbers == pytest.approx(measure([inside], 1.0).numbers)


def test_foreground_that_may_be_missed_increases_the_uncertainty():
    seen = ball(0.9, shape=(16, 16, 40))
    missed = seen.copy()
    missed[:, :4, :4, :4] = of_foreground(np.full((4, 4, 4), 0.4))
    missed, seen = (measure([p], 1.0).numbers for p in (missed, seen))
    assert missed["expected_dice"] < seen["expected_dice"]
    assert missed["entropy_nats"] > seen["entropy_nats"]
    assert missed["expected_error_ml"] == pytest.approx(seen["expected_error_ml"] + 64 * 0.4)


def test_unpredicted_label_has_dice_0_if_possible_and_is_left_out_otherwise():
    probabilities = np.concatenate([ball(), np.zeros((1, 16, 16, 16), np.float32)])
    result = measure([probabilities], 1.0)
    assert result.dice_per_label == [1, None]
    assert result.numbers["expected_dice"] == 1
    probabilities[0, 0], probabilities[2, 0] = 0.6, 0.4
    result = measure([probabilities], 1.0)
    assert result.dice_per_label == [1, 0]
    assert result.numbers["expected_dice"] == 0.5


def test_disagreement_of_equal_and_opposite_members():
    result = measure([softmax(0), softmax(0)], 1.0)
    assert not result.maps["mutual_information"].any()
    assert (result.numbers["mutual_information_nats"], result.numbers["member_dice"]) == (0, 1)
    alone = measure([softmax(0)], 1.0)
    np.testing.assert_array_equal(result.maps["entropy"], alone.maps["entropy"])
    assert alone.numbers.items() <= result.numbers.items()

    everywhere, nowhere = of_foreground(np.ones(SHAPE)), of_foreground(np.zeros(SHAPE))
    result = measure([everywhere, nowhere], 1.0)
    np.testing.assert_allclose(result.maps["mutual_information"], math.log(2), rtol=1e-6)
    assert result.numbers["mutual_information_nats"] == pytest.approx(math.log(2))
    assert result.numbers["member_dice"] == 0


def test_cases_are_ranked_worst_first_and_empty_predictions_before_all(tmp_path, capsys):
    save(tmp_path, "sharp", ball())
    save(tmp_path, "blurred", ball(0.8, 0.3))
    save(tmp_path, "hazy", ball(0.55, 0.4))
    save(tmp_path, "empty", ball(0.0))
    save(tmp_path, "missed", ball(0.4))
    save(tmp_path, "sharp_in_a_wide_field_of_view", ball(shape=(40, 40, 40)))
    assert rank("-i", tmp_path) == 0
    rows = ranked(tmp_path)
    assert list(rows) == ["missed", "empty", "hazy", "blurred", "sharp", "sharp_in_a_wide_field_of_view"]
    assert [row["rank"] for row in rows.values()] == list("123456")
    assert (rows["empty"]["expected_dice"], rows["empty"]["entropy_nats"]) == ("0.0", "")
    assert (rows["missed"]["expected_dice"], rows["missed"]["predicted_ml"]) == ("0.0", "0.0")
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:7]]
    assert printed == [["rank", "case"], *([row["rank"], case] for case, row in rows.items())]


def test_command_writes_maps_csv_and_json(tmp_path, capsys):
    declare(tmp_path, {"organ": 1, "tumor": 2, "ignore": 3})
    save(tmp_path, "a.b", softmax(0), spacing=(0.5, 2.0, 3.0))
    before = {file.name for file in tmp_path.iterdir()}
    assert rank("-i", tmp_path, "--json") == 0
    assert {file.name for file in tmp_path.iterdir()} == before | {"uncertainty"}
    written = {"a.b_entropy.nii.gz", "uncertainty.csv", "uncertainty.json"}
    assert {file.name for file in (tmp_path / "uncertainty").iterdir()} == written
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "uncertainty" / "uncertainty.json").read_text())
    (row,) = summary["cases"]
    assert row["expected_dice_per_label"].keys() == {"organ", "tumor"}
    assert row.keys() - {"case", "expected_dice_per_label"} == summary["definitions"].keys()
    assert row["predicted_ml"] == pytest.approx(np.count_nonzero(softmax(0).argmax(0)) * 0.003)
    assert ranked(tmp_path)["a.b"].keys() == {"case", *summary["definitions"]}


def test_two_folders_give_mutual_information_and_the_entropy_of_the_mean(tmp_path):
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    save(student, "case", softmax(0))
    save(teacher, "case", softmax(1))
    assert rank("-i", student, teacher, "-o", tmp_path / "out") == 0
    maps = measure([softmax(0), softmax(1)], 1.0).maps
    for name in ("entropy", "mutual_information"):
        np.testing.assert_array_equal(read(tmp_path / "out" / f"case_{name}.nii.gz"), maps[name])


def test_maps_of_an_earlier_ranking_are_removed(tmp_path):
    student, teacher, out = tmp_path / "student", tmp_path / "teacher", tmp_path / "out"
    for folder in (student, teacher):
        save(folder, "gone", softmax(0))
        save(folder, "kept", softmax(1))
    assert rank("-i", student, teacher, "-o", out) == 0
    (out / "mine_entropy.nii.gz").write_bytes(b"file of the user")
    for file in student.glob("gone*"):
        file.unlink()
    assert rank("-i", student, "-o", out) == 0
    maps = {file.name for file in out.glob("*.nii.gz")}
    assert maps == {"kept_entropy.nii.gz", "mine_entropy.nii.gz"}


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("axes", ["LPS", "RAS", "SLA", "PIR"])
def test_maps_have_the_grid_of_the_image_with_every_reader(tmp_path, reader, axes):
    """The image contains foreground probabilities, so the map must have their entropy at the same voxel."""
    probability = np.random.default_rng(0).uniform(0.01, 0.99, SHAPE).astype(np.float32)
    image = sitk.GetImageFromArray(probability)
    tilt = sitk.Euler3DTransform((0, 0, 0), 0.1, 0.05, -0.08).GetMatrix()
    direction = np.reshape(sitk.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(axes), (3, 3))
    image.SetDirection((np.reshape(tilt, (3, 3)) @ direction).ravel())
    image.SetSpacing((0.5, 1.5, 3.0))
    image.SetOrigin((-12.5, 30.25, 7.0))
    sitk.WriteImage(image, str(tmp_path / "image.nii.gz"))

    declare(tmp_path, {"organ": 1}, image_reader_writer=reader)
    io = recursive_find_reader_writer_by_name(reader)()
    (seen,), properties = io.read_images([str(tmp_path / "image.nii.gz")])
    save(tmp_path, "case", of_foreground(seen))
    io.write_seg((seen > 0.5).astype(np.uint8), str(tmp_path / "case.nii.gz"), properties)
    assert rank("-i", tmp_path) == 0

    stored, entropy = (
        sitk.ReadImage(str(tmp_path / name)) for name in ("image.nii.gz", "uncertainty/case_entropy.nii.gz")
    )
    for get in (sitk.Image.GetSize, sitk.Image.GetSpacing, sitk.Image.GetOrigin, sitk.Image.GetDirection):
        np.testing.assert_allclose(get(entropy), get(stored), atol=1e-5)
    assert entropy.GetPixelID() == sitk.sitkFloat32
    expected = -probability * np.log(probability) - (1 - probability) * np.log(1 - probability)
    np.testing.assert_allclose(sitk.GetArrayFromImage(entropy), expected, rtol=1e-4)


def test_segmentation_that_differs_from_the_probabilities_is_a_warning(tmp_path, capsys):
    save(tmp_path, "case", softmax(0), segmentation=np.zeros(SHAPE))
    assert rank("-i", tmp_path) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "case.nii.gz differs from the segmentation of highest probability" in line


def test_invalid_folders_are_errors(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    assert "no such folder; check the path" in refusal(capsys, "-i", a)
    a.mkdir()
    assert "--save_probabilities" in refusal(capsys, "-i", a)
    save(a, "case", softmax(0))
    assert "nnU-Net would treat the uncertainty maps in it as predictions" in refusal(capsys, "-i", a, "-o", a)
    assert "a folder is given twice" in refusal(capsys, "-i", a, a)
    (a / "dataset.json").write_text('{"labels": {"organ": "x"}}')
    assert "dataset.json does not define labels in nnU-Net's format" in refusal(capsys, "-i", a)
    (a / "dataset.json").write_text("[]")
    assert "dataset.json does not define labels in nnU-Net's format" in refusal(capsys, "-i", a)
    (a / "dataset.json").unlink()
    save(b, "other", softmax(0))
    assert "folders: case, other; predict" in refusal(capsys, "-i", a, b)
    save(b, "case", softmax(0, shape=(3, 5, 6)))
    (b / "other.npz").unlink()
    assert "has (3, 4, 5, 6)" in refusal(capsys, "-i", a, b)


@pytest.mark.parametrize("size", [0, 100, -20])
def test_damaged_files_are_errors(tmp_path, capsys, size):
    for name in ("case.npz", "case.nii.gz"):
        save(tmp_path, "case", softmax(0))
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:size])
        assert f"{file} cannot be read; predict again" in refusal(capsys, "-i", tmp_path)


def test_files_of_different_predictions_are_errors(tmp_path, capsys):
    save(tmp_path, "case", softmax(0), segmentation=np.zeros((3, 5, 6)))
    assert "do not belong to the same prediction" in refusal(capsys, "-i", tmp_path)
    (tmp_path / "case.nii.gz").unlink()
    assert "case.nii.gz does not exist" in refusal(capsys, "-i", tmp_path)
    save(tmp_path, "case", softmax(0))
    declare(tmp_path, {"organ": 1})
    assert "3 channels, but dataset.json requires 2 (background and 1 label)" in refusal(capsys, "-i", tmp_path)


def test_invalid_probabilities_are_errors(tmp_path, capsys):
    for wrong in (softmax(0) / 2, np.where(softmax(0) > 0.9, np.nan, softmax(0))):
        save(tmp_path, "case", wrong)
        assert "do not sum to 1" in refusal(capsys, "-i", tmp_path)
    np.savez(tmp_path / "case.npz", data=softmax(0))
    assert "case.npz cannot be read" in refusal(capsys, "-i", tmp_path)


def test_regions_without_an_order_and_files_without_spacing_are_errors(tmp_path, capsys):
    save(tmp_path, "case", softmax(0))
    declare(tmp_path, {"whole": [1, 2], "core": 2})
    line = refusal(capsys, "-i", tmp_path)
    assert "dataset.json does not define labels in nnU-Net's format; predict again ('regions_class_order')" in line
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0}, "file_ending": ".png"}))
    assert "files have no spacing" in refusal(capsys, "-i", tmp_path)


def test_maps_and_numbers_of_nnunets_predictions(tiny_predictions, tmp_path):
    """Student and teacher are ranked together, with two processes."""
    folders = {name: tmp_path / name for name in tiny_predictions}
    for name, folder in tiny_predictions.items():
        shutil.copytree(folder, folders[name])
    out = tmp_path / "out"
    assert main(["predict_uncertainty", "-np", "2", "-i", *map(str, folders.values()), "-o", str(out)]) == 0
    summary = json.loads((out / "uncertainty.json").read_text())
    assert {row["case"] for row in summary["cases"]} == set(TEST)
    for row in summary["cases"]:
        members = [np.load(folder / f"{row['case']}.npz")["probabilities"] for folder in folders.values()]
        result = measure(members, 0.001)
        assert {name: row[name] for name in result.numbers} == pytest.approx(result.numbers)
        assert row["mutual_information_nats"] > 0
        np.testing.assert_array_equal(read(out / f"{row['case']}_entropy.nii.gz"), result.maps["entropy"])


def test_predictions_of_nnunet_raise_no_warning(tiny_predictions, tmp_path, capsys):
    shutil.copytree(tiny_predictions["student"], tmp_path / "student")
    assert rank("-i", tmp_path / "student") == 0
    assert "warning" not in capsys.readouterr().err
    assert set(ranked(tmp_path / "student")) == set(TEST)
