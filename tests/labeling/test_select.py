"""Tests of `nnunet_dycon select`."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.cli import main
from nnunet_dycon.labeling.select import farthest_first
from nnunet_dycon.system.environment import FOLDER_VARIABLES
from tests.tiny import LABELED, UNLABELED, write_volume


def select(*options: object, number: int = 2) -> int:
    return main(["select", "-d", "901", "-n", str(number), "-np", "1", *map(str, options)])


def table(folder: Path) -> list[dict]:
    with (folder / "selected.csv").open() as file:
        return list(csv.DictReader(file))


def test_most_uncertain_cases_are_written_with_images_and_predictions(raw, predicted, tmp_path, capsys):
    out = tmp_path / "next"
    assert select("-i", predicted, "-o", out) == 0
    chosen = [UNLABELED[3], UNLABELED[2]]
    assert [row["case"] for row in table(out)] == chosen
    assert [int(row["rank"]) for row in table(out)] == [1, 2]
    assert float(table(out)[0]["rating"]) < float(table(out)[1]["rating"])
    assert sorted(file.name for file in (out / "labels").iterdir()) == sorted(f"{case}.nii.gz" for case in chosen)
    for case in chosen:
        image = raw / "imagesUn" / f"{case}_0000.nii.gz"
        assert (out / "images" / image.name).read_bytes() == image.read_bytes()
        assert not (out / "images" / image.name).samefile(image)  # it may be changed by a viewer
        written, expected = (sitk.ReadImage(str(folder / f"{case}.nii.gz")) for folder in (out / "labels", predicted))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(expected))
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(written, get)() == pytest.approx(getattr(sitk.ReadImage(str(image)), get)())
    record = json.loads((out / "selected.json").read_text())
    assert (record["of"], record["strategy"], list(record["predictions"])) == ("Dataset901_Tiny", "uncertainty", chosen)
    assert "nnunet_dycon add_labels -d 901" in capsys.readouterr().out


def test_random_order_depends_on_the_seed_only(raw, predicted, tmp_path):
    for name, seed in (("a", 1), ("b", 1)):
        assert select("-i", predicted, "-o", tmp_path / name, "--strategy", "random", "--seed", seed, number=4) == 0
    orders = {tuple(row["case"] for row in table(tmp_path / name)) for name in ("a", "b")}
    assert len(orders) == 1
    for seed in range(2, 8):
        out = tmp_path / str(seed)
        assert select("-i", predicted, "-o", out, "--strategy", "random", "--seed", seed, number=4) == 0
        orders.add(tuple(row["case"] for row in table(out)))
    assert len(orders) > 2


def test_the_most_different_image_is_selected_first(raw, predicted, tmp_path):
    file = raw / "imagesUn" / f"{UNLABELED[1]}_0000.nii.gz"
    write_volume(sitk.GetArrayFromImage(sitk.ReadImage(str(file))) * 20 + 300, file)
    assert select("-i", predicted, "-o", tmp_path / "next", "--strategy", "diverse", number=1) == 0
    assert [row["case"] for row in table(tmp_path / "next")] == [UNLABELED[1]]


def test_farthest_first_covers_the_points():
    points = np.array([[0.0], [1.0], [10.0], [11.0], [5.0]])
    order, distances = farthest_first(points, np.array([[0.0]]))
    assert order == [3, 4, 1, 2, 0]
    assert distances == [11, 5, 1, 1, 0]
    order, distances = farthest_first(points, np.zeros((0, 1)))
    assert order[0] == 4
    assert np.isinf(distances[0])
    assert sorted(order) == list(range(5))


def test_fewer_cases_than_asked_are_all_selected(raw, predicted, tmp_path, capsys):
    assert select("-i", predicted, "-o", tmp_path / "next", number=9) == 0
    assert len(table(tmp_path / "next")) == 4
    assert "only 4 unlabeled cases exist; all are selected" in capsys.readouterr().out


def test_ties_are_named(raw, predicted, tmp_path, capsys):
    for case in UNLABELED[1:]:
        for ending in (".npz", ".nii.gz"):
            (predicted / f"{case}{ending}").write_bytes((predicted / f"{UNLABELED[0]}{ending}").read_bytes())
    assert select("-i", predicted, "-o", tmp_path / "next", number=2) == 0
    printed = capsys.readouterr().out
    assert f"2 other cases have the rating of the last selected one: {UNLABELED[2]}, {UNLABELED[3]}" in printed
    assert [row["case"] for row in table(tmp_path / "next")] == UNLABELED[:2]


def of_another_case(predicted: Path) -> None:
    (predicted / f"{UNLABELED[0]}.nii.gz").rename(predicted / f"{LABELED[0]}.nii.gz")


def on_another_grid(predicted: Path) -> None:
    file = predicted / f"{UNLABELED[3]}.nii.gz"
    image = sitk.ReadImage(str(file))
    image.SetOrigin((5, 0, 0))
    sitk.WriteImage(image, str(file))


def with_unknown_label(predicted: Path) -> None:
    file = predicted / f"{UNLABELED[3]}.nii.gz"
    image = sitk.ReadImage(str(file))
    sitk.WriteImage(image + 7, str(file))


def with_truncated_image(predicted: Path) -> None:
    (name,) = [name for name in os.listdir(os.environ["nnUNet_raw"]) if name.startswith("Dataset901")]
    file = Path(os.environ["nnUNet_raw"]) / name / "imagesUn" / f"{UNLABELED[3]}_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:-10])


BAD = [
    (on_another_grid, "has another voxel grid than its image: another origin"),
    (with_unknown_label, "has values that dataset.json does not name: 7"),
    (with_truncated_image, f"{UNLABELED[3]}_0000.nii.gz cannot be read; repair or remove it"),
    (of_another_case, f"has predictions of {LABELED[0]}, which are not in imagesUn"),
    (lambda predicted: (predicted / f"{UNLABELED[1]}.nii.gz").unlink(), f"has no predictions of {UNLABELED[1]}"),
    (lambda predicted: (predicted / f"{UNLABELED[1]}.npz").write_bytes(b"x"), f"{UNLABELED[1]}.npz cannot be read"),
    (lambda predicted: (predicted / f"{UNLABELED[3]}.nii.gz").write_bytes(b"x"), f"{UNLABELED[3]}.nii.gz"),
    (lambda predicted: predicted.rename(predicted.with_name("moved")), "does not exist"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message for _, message in BAD])
def test_invalid_input_is_reported_in_one_line_and_nothing_is_written(raw, predicted, tmp_path, capsys, spoil, message):
    spoil(predicted)
    assert select("-i", predicted, "-o", tmp_path / "next") in (1, 2)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*next*"))


def test_existing_folder_is_not_overwritten(raw, predicted, tmp_path, capsys):
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "mine").write_text("")
    assert select("-i", predicted, "-o", tmp_path / "next") == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("variable", FOLDER_VARIABLES)
def test_folders_of_nnunet_are_not_written_to(raw, predicted, capsys, variable):
    assert select("-i", predicted, "-o", Path(os.environ[variable]) / "next") == 2
    assert f"is in {variable}" in capsys.readouterr().err


def test_only_the_first_channel_must_have_the_grid_of_the_prediction(raw, predicted, tmp_path):
    about = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(about | {"channel_names": {"0": "a", "1": "b"}}))
    for folder in ("imagesTr", "imagesUn"):
        for file in sorted((raw / folder).glob("*_0000.nii.gz")):
            image = sitk.ReadImage(str(file))
            image.SetOrigin((5, 0, 0))  # nnU-Net only warns of it
            sitk.WriteImage(image, str(file).replace("_0000", "_0001"))
    assert select("-i", predicted, "-o", tmp_path / "next") == 0
    assert len(list((tmp_path / "next" / "images").iterdir())) == 4
