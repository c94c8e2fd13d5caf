"""Tests of training with sparsely annotated cases, whose images are also used as unlabeled ones."""

import json
import shutil
from collections import Counter
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle

from nnunet_dycon.components.batches import StudentOutput
from nnunet_dycon.data.loader import UnlabeledDataset, to_batches
from nnunet_dycon.errors import UserError
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from nnunet_dycon.training import pseudo_label_page
from nnunet_dycon.training.run_record import record_file
from tests.tiny import set_environment
from tests.trainers.label_spaces import dataset_of
from tests.trainers.training import METHODS, deterministic, draw_no_pictures, make_trainer, seed_everything

CASES, SCANS = ["case_00", "case_01", "case_02"], ["scan_00", "scan_01"]


@pytest.fixture(params=["ignore label"])
def sparse_root(request, matrix_root, tmp_path, monkeypatch) -> Path:
    """Return a copy of nnUNet_preprocessed/DatasetXXX in which all labeled cases are sparsely annotated."""
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(matrix_root / folder / dataset_of(request.param), tmp_path / folder / dataset_of(request.param))
    set_environment(monkeypatch, tmp_path)
    return tmp_path / "nnUNet_preprocessed" / dataset_of(request.param)


def remove_unlabeled(base: Path) -> None:
    for folder in base.glob("*_unlabeled"):
        shutil.rmtree(folder)
    shutil.rmtree(base.parents[1] / "nnUNet_raw" / base.name / "imagesUn")


def annotate_completely(base: Path, case: str) -> None:
    """Replace the ignore label by background in the preprocessed segmentation of a case."""
    overwrite(base, case, lambda voxels: np.where(voxels == ignore_label(base), 0, voxels))


def ignore_label(base: Path) -> int:
    return json.loads((base / "dataset.json").read_text())["labels"]["ignore"]


def overwrite(base: Path, case: str, change) -> None:
    file = base / "nnUNetPlans_3d_fullres" / f"{case}_seg.b2nd"
    voxels = blosc2.open(str(file))[:]
    file.unlink()
    blosc2.asarray(change(voxels).astype(np.int16), urlpath=str(file))


def start(base: Path, fold: int | str = "all") -> SemiSupervisedTrainer:
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON, 1), fold, dataset=base.name)
    trainer.on_train_start()
    trainer._lock.close()
    return trainer


@pytest.mark.parametrize("sparse_root", ["ignore label", "regions, ignore label"], indirect=True)
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_data_sets_without_imagesun_are_trained(sparse_root, monkeypatch, configuration):
    draw_no_pictures(monkeypatch)
    remove_unlabeled(sparse_root)
    trainer = make_trainer(deterministic(trainer_class(RECOMMENDED), 1), "all", configuration, dataset=sparse_root.name)
    trainer.run_training()
    assert np.isfinite(trainer.curves["loss"]).all()
    cases = json.loads(record_file(Path(trainer.output_folder)).read_text())["cases"]
    assert cases == {"labeled": CASES, "unlabeled": [], "sparse": CASES, "validation": CASES}
    (log,) = Path(trainer.output_folder).glob("training_log*")
    assert "3 labeled and 0 unlabeled cases. Sparsely annotated: 3 labeled; their images are" in log.read_text()


def test_files_that_are_no_images_do_not_count_as_unlabeled_cases(sparse_root):
    remove_unlabeled(sparse_root)
    folder = sparse_root.parents[1] / "nnUNet_raw" / sparse_root.name / "imagesUn"
    folder.mkdir()
    (folder / ".DS_Store").touch()
    assert start(sparse_root)._cases.identifiers["unlabeled"] == []


def test_all_images_are_drawn_alike(sparse_root, monkeypatch):
    annotate_completely(sparse_root, "case_02")
    trainer = start(sparse_root)
    assert trainer._cases.identifiers["sparse"] == CASES[:2]
    loader = trainer.dataloader_train.data_loader.unlabeled
    seed_everything(0)
    drawn = Counter(key for _ in range(400) for key in loader.get_indices())
    assert drawn.keys() == {*CASES[:2], *SCANS}
    assert max(drawn.values()) < 1.3 * min(drawn.values())
    assert trainer.unlabeled_batch_size == 2  # for 4 images; for those of imagesUn alone: round(2 * 2 / 3) = 1


def poison(base: Path, case: str) -> None:
    """Replace the labels, the ignore pattern and the list of annotated voxels of a case."""
    rng = np.random.default_rng(7)
    overwrite(base, case, lambda voxels: rng.integers(0, ignore_label(base) + 1, voxels.shape))
    file = base / "nnUNetPlans_3d_fullres" / f"{case}.pkl"
    properties = load_pickle(str(file))
    properties["class_locations"] = {key: np.array([[0, 1, 2, 3]]) for key in properties["class_locations"]}
    write_pickle(properties, str(file))


@pytest.mark.parametrize("sparse_root", ["ignore label", "regions, ignore label"], indirect=True)
def test_annotation_of_sparsely_annotated_cases_has_no_influence_on_unlabeled_patches(sparse_root):
    """Control: the image has an influence, and so have the labels on labeled patches."""

    def draw() -> tuple[list, list]:
        loader = start(sparse_root).dataloader_train.data_loader
        for transform in loader.unlabeled.transforms.transforms.transforms:
            getattr(transform, "transform", transform).benchmark = False  # of GaussianBlurTransform
        seed_everything(0)
        unlabeled = [loader.unlabeled.generate_train_batch() for _ in range(4)]
        return unlabeled, [loader.generate_train_batch()["target"][0] for _ in range(2)]

    clean, targets = draw()
    assert {key for batch in clean for key in batch["keys"]} > set(SCANS)
    for case in CASES:
        poison(sparse_root, case)
    poisoned, others = draw()
    for before, after in zip(clean, poisoned):
        assert before.keys() == after.keys() == {"data", "keys"}
        assert list(before["keys"]) == list(after["keys"])
        torch.testing.assert_close(after["data"], before["data"], rtol=0, atol=0)
    assert not all(map(torch.equal, targets, others))

    for case in CASES:
        file = sparse_root / "nnUNetPlans_3d_fullres" / f"{case}.b2nd"
        image = blosc2.open(str(file))[:]
        file.unlink()
        blosc2.asarray(image[:, ::-1].copy(), urlpath=str(file))
    changed, _ = draw()
    assert not all(torch.equal(before["data"], after["data"]) for before, after in zip(clean, changed))


def test_unlabeled_patches_need_no_segmentation_file(sparse_root):
    loader = start(sparse_root).dataloader_train.data_loader.unlabeled
    for ending in ("_seg.b2nd", ".pkl"):
        for case in CASES:
            (sparse_root / "nnUNetPlans_3d_fullres" / f"{case}{ending}").unlink()
    assert {key for _ in range(20) for key in loader.generate_train_batch()["keys"]} == {*CASES, *SCANS}


def test_validation_cases_are_not_used(sparse_root):
    folds = [{"train": CASES[:2], "val": CASES[2:]}]
    (sparse_root / "splits_final.json").write_text(json.dumps(folds))
    assert start(sparse_root, 0)._cases.identifiers["sparse"] == CASES[:2]
    for case in CASES[:2]:
        annotate_completely(sparse_root, case)
    remove_unlabeled(sparse_root)
    with pytest.raises(SystemExit, match="no training case of this fold is sparsely annotated; put unlabeled images"):
        start(sparse_root, 0)


def test_without_any_unlabeled_voxel_both_ways_are_named(sparse_root, capsys):
    for case in CASES:
        annotate_completely(sparse_root, case)
    remove_unlabeled(sparse_root)
    message = (
        r"no unlabeled cases: .*imagesUn has no file \*.nii.gz; put unlabeled images there, or mark voxels without "
        r"annotation in labelsTr with the ignore label 3 and preprocess again"
    )
    capsys.readouterr()
    with pytest.raises(SystemExit, match=message):
        start(sparse_root)
    assert "preprocessing the unlabeled cases" not in capsys.readouterr().out


# Mixing by copy-paste exchanges voxels between labeled and unlabeled images.
_WITHOUT_COPY_PASTE = [name for name in METHODS if name != "nnUNetTrainerBCP"]
_COMPARING = {"nnUNetTrainerUGPL", "nnUNetTrainerCPS", "nnUNetTrainerDyCONCoTraining"} | {
    name for name in METHODS if name.startswith("nnUNetTrainerDyCON")
}


@pytest.mark.parametrize("name", _WITHOUT_COPY_PASTE)
def test_methods_that_learn_from_ignored_voxels_of_labeled_patches(sparse_root, name):
    """As in docs/how-to/sparse_annotations.md: only the terms that compare two predictions of all images."""
    trainer = make_trainer(deterministic(trainer_class(name), 1), dataset=sparse_root.name)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer._lock.close()
    outputs = []

    def student(images: torch.Tensor) -> StudentOutput:
        outputs.append(trainer._student(images))
        outputs[-1].logits[0].retain_grad()
        return outputs[-1]

    labeled, unlabeled = to_batches(next(trainer.dataloader_train), trainer.device)
    trainer.method(student, labeled, unlabeled, 1.0)["loss"].backward()
    gradient = outputs[0].logits[0].grad[: len(labeled)]
    ignored = (labeled.full_resolution == ignore_label(sparse_root)).expand_as(gradient)
    assert 0 < ignored.float().mean() < 1
    assert gradient[~ignored].any()
    assert bool(gradient[ignored].any()) == (name in _COMPARING)


def test_unreadable_image_is_named_with_the_remedy_for_labeled_cases(sparse_root):
    trainer = start(sparse_root)
    (sparse_root / "nnUNetPlans_3d_fullres" / "case_01.b2nd").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"nnUNetPlans_3d_fullres/case_01.b2nd cannot be read; run: nnUNetv2_prep"):
        trainer.dataloader_train.data_loader.unlabeled._patch("case_01")


def test_images_in_older_formats_are_read(tmp_path):
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    np.savez(tmp_path / "a.npz", data=image, seg=np.zeros_like(image))
    dataset = UnlabeledDataset(tmp_path, ["a"])
    np.testing.assert_array_equal(dataset.load_image("a"), image)
    np.save(tmp_path / "a.npy", image + 1)  # preferred, since it needs no decompression
    np.testing.assert_array_equal(dataset.load_image("a"), image + 1)


@pytest.mark.parametrize("sparse_root", ["ignore label", "regions, ignore label"], indirect=True)
@pytest.mark.parametrize("has_unlabeled", [False, True])
def test_page_shows_annotation(sparse_root, monkeypatch, has_unlabeled):
    if not has_unlabeled:
        remove_unlabeled(sparse_root)
    pages, draw = [], pseudo_label_page.draw_pseudo_labels
    monkeypatch.setattr(
        pseudo_label_page, "draw_pseudo_labels", lambda cases, *rest, **options: pages.append(cases) or draw(
            cases, *rest, **options)
    )  # fmt: skip
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON, 1), dataset=sparse_root.name)
    trainer.run_training()
    assert list(Path(trainer.output_folder).glob("pseudo_labels_epoch_*.png"))
    cases = pages[-1]
    assert [case.case for case in cases] == ([*SCANS, CASES[0]] if has_unlabeled else CASES)
    for case in cases:
        if case.case in SCANS:
            assert case.annotation is None
            continue
        segmentation = blosc2.open(str(sparse_root / "nnUNetPlans_3d_fullres" / f"{case.case}_seg.b2nd"))[0]
        expected = segmentation[case.index].astype(int)  # the nested regions 1, 2, 3 have the numbers of their labels
        expected[expected == ignore_label(sparse_root)] = -1
        np.testing.assert_array_equal(case.annotation, expected.clip(-1))
        assert {-1, 0, 1} <= set(np.unique(case.annotation))
        counts = ((segmentation > 0) & (segmentation < ignore_label(sparse_root))).sum((1, 2))
        assert case.index == counts.argmax()
