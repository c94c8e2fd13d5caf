"""Tests of `nnunet_dycon add_labels`."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.cli import main
from nnunet_dycon.data import label_journal
from nnunet_dycon.data.unlabeled import UnlabeledCases, preprocess_unlabeled
from nnunet_dycon.doctor.dataset import examine_raw
from nnunet_dycon.doctor.findings import OK
from nnunet_dycon.errors import UserError
from nnunet_dycon.labeling.add_labels import extended, reduced
from tests.test_kills import contents, kills
from tests.tiny import LABELED, UNLABELED, set_environment, write_volume

NEW = UNLABELED[:2]
SPLITS = [{"train": [c for c in LABELED if c != case], "val": [case]} for case in LABELED]


def add_labels(folder: Path, *options: object) -> int:
    return main(["add_labels", "-d", "901", "-i", str(folder), "-np", "1", *map(str, options)])


def undo() -> int:
    return main(["add_labels", "-d", "901", "--undo"])


@pytest.fixture
def new(raw, base, tmp_path) -> Path:
    """Return a folder with labels of two unlabeled cases; write folds of the labeled cases."""
    folder = tmp_path / "new"
    for case in NEW:
        array = np.zeros((24, 32, 40), np.uint8)
        array[2:6, 2:6, 2:6], array[10:14, 10:14, 10:14] = 1, 2
        write_volume(array, folder / f"{case}.nii.gz")
    (base / "splits_final.json").write_text(json.dumps(SPLITS))
    return folder


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def cases(folder: Path) -> list[str]:
    return sorted(file.name.removesuffix(".nii.gz").removesuffix("_0000") for file in folder.iterdir())


def assert_added(raw: Path, base: Path, new: Path) -> None:
    assert cases(raw / "imagesTr") == cases(raw / "labelsTr") == sorted([*LABELED, *NEW])
    assert cases(raw / "imagesUn") == UNLABELED[2:]
    for case in NEW:
        np.testing.assert_array_equal(read(raw / "labelsTr" / f"{case}.nii.gz"), read(new / f"{case}.nii.gz"))
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == len(LABELED) + 2
    splits = json.loads((base / "splits_final.json").read_text())
    for before, after in zip(SPLITS, splits):
        assert set(before["val"]) <= set(after["val"])
        assert not set(after["val"]) & set(after["train"])
        assert set(after["val"]) | set(after["train"]) == {*LABELED, *NEW}
    assert sorted(case for split in splits for case in split["val"]) == sorted([*LABELED, *NEW])
    assert not (base / "dataset_fingerprint.json").exists()


def test_cases_move_to_the_labeled_ones(raw, base, new, capsys):
    before = json.loads((raw / "dataset.json").read_text())
    images = {case: (raw / "imagesUn" / f"{case}_0000.nii.gz").read_bytes() for case in NEW}
    assert add_labels(new) == 0
    assert_added(raw, base, new)
    for case, image in images.items():
        assert (raw / "imagesTr" / f"{case}_0000.nii.gz").read_bytes() == image
    assert json.loads((raw / "dataset.json").read_text()) == before | {"numTraining": 7}
    printed = capsys.readouterr().out
    for command in ("nnUNetv2_preprocess -d 901", "preprocess_unlabeled -d 901", "nnUNetv2_train 901", "--undo"):
        assert command in printed
    # The preprocessed cases are out of date: nothing trains on them unnoticed.
    with pytest.raises(UserError, match="run: nnunet_dycon preprocess_unlabeled"):
        UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans").require(1)


def test_undo_restores_everything_and_keeps_the_labels(raw, base, new):
    state = state_of(raw, base)
    assert add_labels(new) == 0
    written = {case: (raw / "labelsTr" / f"{case}.nii.gz").read_bytes() for case in NEW}
    assert undo() == 0
    after = state_of(raw, base)
    kept = {name: content for name, content in after.items() if "/label_history/" in name}
    restored = {name: content for name, content in after.items() if name not in kept}
    assert restored.keys() == state.keys()
    for name, content in restored.items():
        same = json.loads(content) == json.loads(state[name]) if name.endswith(".json") else content == state[name]
        assert same, name
    for case, label in written.items():
        assert kept[f"nnUNet_raw/label_history/001_labels/{case}.nii.gz"] == label
    assert undo() == 2  # nothing left to undo
    assert add_labels(new) == 0
    assert_added(raw, base, new)


def test_two_additions_are_undone_one_after_the_other(raw, base, new, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    (new / f"{NEW[1]}.nii.gz").rename(second / f"{NEW[1]}.nii.gz")
    assert add_labels(new) == 0
    assert add_labels(second) == 0
    assert cases(raw / "labelsTr") == sorted([*LABELED, *NEW])
    assert undo() == 0
    assert cases(raw / "labelsTr") == sorted([*LABELED, NEW[0]])
    assert undo() == 0
    assert cases(raw / "labelsTr") == LABELED
    assert undo() == 2
    assert len(list((raw / "label_history").glob("*_labels/*.nii.gz"))) == 2


def test_undo_with_a_missing_file_changes_nothing(raw, base, new, capsys):
    assert add_labels(new) == 0
    (raw / "labelsTr" / f"{NEW[0]}.nii.gz").unlink()
    before = state_of(raw, base)
    assert undo() == 1
    assert f"{NEW[0]}.nii.gz does not exist; restore it (nothing was changed)" in capsys.readouterr().err
    assert state_of(raw, base) == before


def test_interrupted_command_is_completed_in_a_moved_data_set(raw, base, new, tmp_path, monkeypatch):
    interrupt(raw, monkeypatch)
    root = raw.parents[1]
    moved = root.with_name("moved")
    root.rename(moved)
    set_environment(monkeypatch, moved)
    raw, base = (moved / path.relative_to(root) for path in (raw, base))
    label_journal.finish_interrupted(raw)
    assert_added(raw, base, new)


def test_undo_is_refused_after_a_training(raw, base, new, tiny, capsys):
    assert add_labels(new) == 0
    fold = tiny / "nnUNet_results" / "Dataset901_Tiny" / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    checkpoint = fold / "checkpoint_latest.pth"
    checkpoint.write_bytes(b"")
    os.utime(checkpoint, (0, 0))  # a model from before
    before = contents(raw)
    os.utime(checkpoint)
    assert undo() == 1
    assert "may have been trained with them" in capsys.readouterr().err
    assert contents(raw) == before
    os.utime(checkpoint, (0, 0))
    assert undo() == 0


def test_labels_of_select_must_be_corrected(raw, predicted, tmp_path, capsys):
    out = tmp_path / "next"
    assert main(["select", "-d", "901", "-i", str(predicted), "-n", "2", "-o", str(out), "-np", "1"]) == 0
    first, second = sorted((out / "labels").iterdir())
    changed = read(first)
    changed[0, 0, 0] = 1
    write_volume(changed, first)
    assert add_labels(out) == 1
    assert f"{second} equals the prediction" in capsys.readouterr().err
    assert add_labels(out, "--accept_predictions") == 0
    assert len(cases(raw / "labelsTr")) == len(LABELED) + 2


def state_of(raw: Path, base: Path) -> dict[str, bytes]:
    return {
        f"{folder.parent.name}/{name}": content for folder in (raw, base) for name, content in contents(folder).items()
    }


def hashes(*folders: Path) -> set[str]:
    files = [file for folder in folders for file in folder.rglob("*.nii.gz") if file.is_file()]
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("command", ["add", pytest.param("undo", marks=pytest.mark.slow)])
def test_no_image_or_label_is_lost_by_a_kill_and_the_next_command_completes(raw, base, new, tmp_path, command):
    if command == "undo":
        assert add_labels(new) == 0
    saved = tmp_path / "saved"
    for folder in (raw, base):
        shutil.copytree(folder, saved / folder.name / folder.parent.name)

    def restore():
        for folder in (raw, base):
            shutil.rmtree(folder)
            shutil.copytree(saved / folder.name / folder.parent.name, folder)

    files = hashes(raw / "imagesTr", raw / "imagesUn", raw / "labelsTr")
    seen = set()
    for _ in kills(restore, (lambda: add_labels(new)) if command == "add" else undo):
        assert files <= hashes(raw)
        seen.add(label_journal.is_interrupted(raw))
        if label_journal.is_interrupted(raw):
            preprocessed = raw.parents[1] / "nnUNet_preprocessed" / raw.name / "nnUNetPlans_3d_fullres_unlabeled"
            shutil.rmtree(preprocessed, ignore_errors=True)
            label_journal.finish_interrupted(raw)
            if command == "add":
                assert_added(raw, base, new)
            else:
                assert cases(raw / "imagesUn") == UNLABELED
                assert cases(raw / "labelsTr") == LABELED
        else:
            added = cases(raw / "labelsTr") == sorted([*LABELED, *NEW])
            assert added or cases(raw / "labelsTr") == LABELED
            assert json.loads((raw / "dataset.json").read_text())["numTraining"] == len(cases(raw / "labelsTr"))
        assert files <= hashes(raw)
    assert seen == {True, False}


def interrupt(raw: Path, monkeypatch) -> None:
    """Leave a journal that has not been applied."""
    with monkeypatch.context() as patch:
        patch.setattr(label_journal, "_apply", lambda source: (_ for _ in ()).throw(KeyboardInterrupt))
        assert add_labels(raw.parents[2] / "new") == 130


def test_the_next_command_completes_an_interrupted_one(raw, base, new, monkeypatch):
    interrupt(raw, monkeypatch)
    assert cases(raw / "labelsTr") == LABELED
    preprocess_unlabeled("901", "3d_fullres")
    assert_added(raw, base, new)


def test_doctor_names_an_interrupted_command_and_changes_nothing(raw, base, new, monkeypatch):
    interrupt(raw, monkeypatch)
    before = contents(raw)
    found = [finding for finding in examine_raw(raw, frozenset(), compares_images=False) if finding.status != OK]
    assert [finding.message for finding in found] == [f"add_labels was interrupted in {raw}"]
    assert "nnunet_dycon preprocess_unlabeled" in found[0].remedy
    assert contents(raw) == before


def empty(raw: Path, new: Path) -> None:
    write_volume(np.zeros((24, 32, 40), np.uint8), new / f"{NEW[0]}.nii.gz")


def other_grid(raw: Path, new: Path) -> None:
    write_volume(np.ones((24, 32, 39), np.uint8), new / f"{NEW[0]}.nii.gz")


def other_spacing(raw: Path, new: Path) -> None:
    write_volume(np.ones((24, 32, 40), np.uint8), new / f"{NEW[0]}.nii.gz", (1, 1, 2))


def unknown_value(raw: Path, new: Path) -> None:
    write_volume(np.full((24, 32, 40), 7, np.uint8), new / f"{NEW[0]}.nii.gz")


def unknown_case(raw: Path, new: Path) -> None:
    (new / f"{NEW[0]}.nii.gz").rename(new / "other.nii.gz")


def labeled_case(raw: Path, new: Path) -> None:
    (new / f"{NEW[0]}.nii.gz").rename(new / f"{LABELED[0]}.nii.gz")


def image_taken(raw: Path, new: Path) -> None:
    shutil.copy(raw / "imagesUn" / f"{NEW[0]}_0000.nii.gz", raw / "imagesTr")


def truncated(raw: Path, new: Path) -> None:
    file = new / f"{NEW[0]}.nii.gz"
    file.write_bytes(file.read_bytes()[:-10])


def two_files(raw: Path, new: Path) -> None:
    shutil.copy(new / f"{NEW[0]}.nii.gz", new / f"{NEW[0]}.nrrd")
    file = raw / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"file_ending": ".nrrd"}))


def truncated_image(raw: Path, new: Path) -> None:
    file = raw / "imagesUn" / f"{NEW[1]}_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:-10])


def four_dimensional(raw: Path, new: Path) -> None:
    file = new / f"{NEW[0]}.nii.gz"
    sitk.WriteImage(sitk.JoinSeries([sitk.ReadImage(str(file))] * 2), str(file))


def damaged_folds(raw: Path, new: Path) -> None:
    file = Path(os.environ["nnUNet_preprocessed"]) / raw.name / "splits_final.json"
    file.write_text(json.dumps([{"val": []}]))


def damaged_record(raw: Path, new: Path) -> None:
    (new / "selected.json").write_text("[1]")


BAD = [
    (four_dimensional, f"{NEW[0]}.nii.gz has 2 channels instead of 1"),
    (truncated_image, f"{NEW[1]}_0000.nii.gz cannot be read"),
    (damaged_folds, "splits_final.json is damaged"),
    (damaged_record, "selected.json is damaged"),
    (two_files, "are labels of the same case; remove one of both"),
    (empty, "has no foreground; annotate it, or add --allow_empty"),
    (other_grid, "has another voxel grid"),
    (other_spacing, "has another voxel grid"),
    (unknown_value, "has values that dataset.json does not name: 7"),
    (unknown_case, "has no images of other"),
    (labeled_case, f"has labels of {LABELED[0]} already"),
    (image_taken, "in both imagesTr and imagesUn"),
    (truncated, "cannot be read"),
    (lambda raw, new: [file.unlink() for file in new.iterdir()], "has no label files"),
    (lambda raw, new: shutil.rmtree(new), "does not exist"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_invalid_labels_are_reported_in_one_line_and_nothing_is_changed(raw, base, new, capsys, spoil, message):
    spoil(raw, new)
    before = state_of(raw, base)
    assert add_labels(new) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert state_of(raw, base) == before


def test_other_files_are_named(raw, base, new, capsys):
    (new / "case.seg.nrrd").touch()
    assert add_labels(new) == 0
    assert "not used, since labels must be saved as CASE.nii.gz: case.seg.nrrd" in capsys.readouterr().out


def test_difference_of_the_voxel_grid_is_stated(raw, base, new, capsys):
    other_spacing(raw, new)
    assert add_labels(new) == 1
    assert "spacing (Z, Y, X) 2 x 1 x 1 mm instead of 1 x 1 x 1 mm" in capsys.readouterr().err


def test_all_environment_variables_are_required_before_anything_is_changed(raw, base, new, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    before = state_of(raw, base)
    assert add_labels(new) == 2
    assert "nnUNet_results is not set" in capsys.readouterr().err
    assert state_of(raw, base) == before


def test_repeated_interrupted_command_succeeds(raw, base, new, monkeypatch, capsys):
    interrupt(raw, monkeypatch)
    assert add_labels(new) == 0
    printed = capsys.readouterr().out
    assert "completing an interrupted move" in printed
    assert "added 2 labels" in printed
    assert_added(raw, base, new)


def test_repeated_interrupted_command_does_not_ignore_changed_labels(raw, base, new, monkeypatch, capsys):
    interrupt(raw, monkeypatch)
    write_volume(np.ones((24, 32, 40), np.uint8), new / f"{NEW[0]}.nii.gz")
    assert add_labels(new) == 1
    assert f"the labels of {NEW[0]} have changed since the interrupted call" in capsys.readouterr().err


def test_repeated_interrupted_undo_undoes_one_addition(raw, base, new, tmp_path, monkeypatch, capsys):
    second = tmp_path / "second"
    second.mkdir()
    (new / f"{NEW[1]}.nii.gz").rename(second / f"{NEW[1]}.nii.gz")
    assert add_labels(new) == add_labels(second) == 0
    with monkeypatch.context() as patch:
        patch.setattr(label_journal, "_apply", lambda source: None)  # interrupted after the journal is written
        undo()
    assert label_journal.is_interrupted(raw)
    capsys.readouterr()
    assert undo() == 0
    assert cases(raw / "labelsTr") == sorted([*LABELED, NEW[0]])
    assert f"moved {NEW[1]} back to imagesUn" in capsys.readouterr().out


def test_interrupted_command_is_completed_before_planning(raw, base, new, monkeypatch):
    interrupt(raw, monkeypatch)
    (base / "nnUNetPlans.json").unlink()
    with pytest.raises(UserError, match=r"nnUNetPlans\.json does not exist"):
        preprocess_unlabeled("901", "3d_fullres")
    assert_added(raw, base, new)


def test_when_all_cases_are_labeled_no_unlabeled_ones_are_used(raw, base, new, capsys):
    preprocess_unlabeled("901", "3d_fullres")
    for case in UNLABELED[2:]:
        shutil.copy(new / f"{NEW[0]}.nii.gz", new / f"{case}.nii.gz")
    assert add_labels(new) == 0
    printed = capsys.readouterr().out
    assert "no unlabeled cases are left" in printed
    assert "nnUNetv2_train 901 3d_fullres 0\n" in printed
    assert "preprocess_unlabeled" not in printed
    assert main(["preprocess_unlabeled", "-d", "901"]) == 1
    assert "all are labeled now, so the preprocessed ones were removed" in capsys.readouterr().err
    assert not UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans").folder.exists()


def test_empty_labels_are_accepted_if_asked_for(raw, base, new):
    empty(raw, new)
    assert add_labels(new, "--allow_empty") == 0
    assert read(raw / "labelsTr" / f"{NEW[0]}.nii.gz").max() == 0


def test_undo_without_additions_is_refused(raw, base, capsys):
    assert undo() == 2
    assert "nothing to undo" in capsys.readouterr().err


def test_new_cases_join_the_smallest_folds():
    splits = [{"train": ["c"], "val": ["a", "b"]}, {"train": ["a", "b"], "val": ["c"]}]
    assert extended(splits, ["d", "e"]) == [
        {"train": ["c", "d"], "val": ["a", "b", "e"]},
        {"train": ["a", "b", "e"], "val": ["c", "d"]},
    ]
    assert reduced(extended(splits, ["d", "e"]), ["d", "e"]) == splits
    assert extended([], ["d"]) == []
    assert extended([{"train": ["a"], "val": ["a"]}], ["b"]) == [{"train": ["a", "b"], "val": ["a"]}]
