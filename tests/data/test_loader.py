"""Tests of the two-stream loader: views with equal geometry, unlabeled patches, masks, workers."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon.components.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.data.augmenters import augmenter
from nnunet_dycon.data.loader import (
    LabeledLoader,
    TwoStreamLoader,
    UnlabeledDataset,
    UnlabeledLoader,
    to_batches,
)
from nnunet_dycon.data.views import TwoViews, split_views, stronger
from tests.processes import is_running
from tests.tiny import LABELED, UNLABELED

PATCH = (16, 24, 24)


def training_transforms(patch_size=PATCH, dummy_2d=False, mask=(False,), scales=None):
    rotation = (-0.5, 0.5)
    axes = tuple(range(len(patch_size)))
    return nnUNetTrainer.get_training_transforms(patch_size, rotation, scales, axes, dummy_2d, use_mask_for_norm=mask)


class Brighten(ImageOnlyTransform):
    """An intensity transform that is always applied, in place."""

    def _apply_to_image(self, img, **params):
        img += 100.0
        return img


@pytest.fixture
def make_loader(tiny):
    def make(unlabeled_batch_size=3, patch_size=PATCH, transforms=None, mask_channels=(), ignore=False):
        base = tiny / "nnUNet_preprocessed" / "Dataset901_Tiny"
        dataset_json = load_json(str(base / "dataset.json"))
        if ignore:
            dataset_json["labels"]["ignore"] = 3
        labels = PlansManager(str(base / "nnUNetPlans.json")).get_label_manager(dataset_json)
        views = TwoViews(transforms or training_transforms(patch_size, scales=[[1, 1, 1], [0.5, 0.5, 0.5]]))
        unlabeled = UnlabeledLoader(
            UnlabeledDataset(base / "nnUNetPlans_3d_fullres_unlabeled", list(UNLABELED)),
            unlabeled_batch_size, patch_size, patch_size, labels, transforms=views, mask_channels=mask_channels,
        )  # fmt: skip
        return TwoStreamLoader(
            nnUNetDatasetBlosc2(str(base / "nnUNetPlans_3d_fullres"), list(LABELED)),
            2, patch_size, patch_size, labels, transforms=views, unlabeled=unlabeled,
        )  # fmt: skip

    return make


def test_shapes_and_cases_of_batches(make_loader):
    labeled, unlabeled = to_batches(next(make_loader()), torch.device("cpu"))
    assert isinstance(labeled, LabeledBatch)
    assert isinstance(unlabeled, UnlabeledBatch)
    assert labeled.weak.shape == labeled.strong.shape == (2, 1, *PATCH)
    assert unlabeled.weak.shape == unlabeled.strong.shape == (3, 1, *PATCH)
    assert [target.shape for target in labeled.targets] == [(2, 1, *PATCH), (2, 1, 8, 12, 12)]
    assert labeled.full_resolution.shape == (2, 1, *PATCH)
    assert set(labeled.keys) <= set(LABELED)
    assert set(unlabeled.keys) <= set(UNLABELED)
    assert (len(labeled), len(unlabeled)) == (2, 3)


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_views_have_the_same_geometry(dummy_2d):
    """With one intensity transform, the strong view is the brightened weak view. They do not share memory."""
    stock = training_transforms(dummy_2d=dummy_2d).transforms
    spatial = [
        t for t in stock if "Spatial" in repr(type(t)) or "Mirror" in repr(type(t)) or "Convert" in repr(type(t))
    ]
    views = TwoViews(ComposeTransforms([*spatial, Brighten()]))
    moved = 0
    for seed in range(20):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        image = torch.randn(2, *PATCH)
        strong, weak = views(image=image.clone())["image"].chunk(2)
        torch.testing.assert_close(strong, weak + 100.0)
        moved += not torch.equal(weak, image)
    assert moved > 10


def test_segmentation_has_the_geometry_of_the_views():
    """If the image equals the segmentation, the weak view does, too, except for interpolation at borders."""
    label = torch.zeros(1, *PATCH, dtype=torch.int16)
    label[:, 4:12, 6:18, 6:18] = 1
    views = TwoViews(training_transforms())
    for seed in range(10):
        torch.manual_seed(seed)
        result = views(image=label.float(), segmentation=label.clone())
        weak = result["image"][1:]
        inside = (weak < 0.05) | (weak > 0.95)  # not at borders
        assert ((weak > 0.5).int() == result["segmentation"])[inside].float().mean() > 0.98


def test_strong_intensity_augmentation_changes_contrast_and_shift():
    views = TwoViews(stronger(training_transforms()))
    names = [type(getattr(one, "transform", one)).__name__ for one in views.transforms.transforms]
    start = names.index("MirrorTransform") - 3
    assert names[start : start + 3] == ["GammaTransform", "ContrastTransform", "BrightnessAdditiveTransform"]
    np.random.seed(0)  # noqa: NPY002 (what batchgeneratorsv2 draws from)
    torch.manual_seed(0)
    image = torch.randn(2, *PATCH)
    shifts, stretches = [], []
    for _ in range(60):
        strong, weak = views(image.clone(), torch.zeros(1, *PATCH))["image"].split(2)
        shifts.append(strong[0].mean() - weak[0].mean())
        stretches.append(strong[0].std() / weak[0].std())
    assert torch.stack(shifts).std() > 0.2
    assert min(stretches) < 0.7
    assert max(stretches) > 1.4


def test_strong_intensity_augmentation_without_intensity_transforms_raises():
    with pytest.raises(ValueError, match="no intensity transform"):
        stronger(ComposeTransforms([]))


def test_split_views():
    strong, weak = split_views(torch.arange(8.0).view(1, 4, 2))
    assert strong.tolist() == [[[0, 1], [2, 3]]]
    assert weak.tolist() == [[[4, 5], [6, 7]]]


def test_unlabeled_loader_reads_only_images(make_loader, tiny):
    folder = tiny / "nnUNet_preprocessed" / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres_unlabeled"
    for file in [*folder.glob("*_seg.b2nd"), *folder.glob("*.pkl")]:
        file.unlink()
    next(make_loader())


def test_unlabeled_patches_cover_all_positions(make_loader):
    """Positions are drawn uniformly, independently of the content of the image."""
    loader = make_loader().unlabeled
    corners = np.array([loader.get_bbox((24, 32, 40), False, None)[0] for _ in range(600)])
    for axis, size in enumerate((24, 32, 40)):
        starts = np.bincount(corners[:, axis], minlength=size - PATCH[axis] + 1)
        assert len(starts) == size - PATCH[axis] + 1
        assert starts.min() > 0


def test_unlabeled_loader_with_ignore_label(make_loader):
    """nnU-Net's loader would look for annotated voxels, which unlabeled cases do not have."""
    loader = make_loader(ignore=True)
    assert loader.has_ignore
    assert loader.unlabeled.generate_train_batch()["data"].shape == (3, 2, *PATCH)


def test_augmented_voxels_outside_the_nonzero_region_are_zero(make_loader, tiny):
    """As for labeled cases in nnU-Net if images are normalized within their nonzero region."""
    transforms = ComposeTransforms([Brighten(), *training_transforms(mask=(True,)).transforms[-2:]])
    loader = make_loader(transforms=transforms, mask_channels=(True,)).unlabeled
    patch = torch.randn(1, *PATCH)
    patch[:, :, :5] = 0
    outside = loader._outside(patch)
    assert outside.shape == (1, *PATCH)
    strong = loader.transforms(image=patch.clone(), segmentation=outside)["image"][:1]
    assert (strong[:, :, :5] == 0).all()
    torch.testing.assert_close(strong[:, :, 5:], patch[:, :, 5:] + 100)


def test_nonzero_region_depends_only_on_masked_channels(make_loader):
    """For example MR and CT: air in CT is not 0 after normalization."""
    loader = make_loader(mask_channels=(True, False)).unlabeled
    patch = torch.ones(2, *PATCH)
    patch[0, :, :5] = 0
    assert (loader._outside(patch)[0, :, :5] == -1).all()
    assert (loader._outside(patch)[0, :, 5:] == 0).all()


def test_images_smaller_than_the_patch_are_padded(make_loader):
    patch_size = (32, 40, 48)
    assert make_loader(patch_size=patch_size).unlabeled.generate_train_batch()["data"].shape == (3, 2, *patch_size)


def test_2d_patches(make_loader):
    transforms = training_transforms((32, 40))
    loader = make_loader(patch_size=(32, 40), transforms=transforms)
    labeled, unlabeled = to_batches(next(loader), torch.device("cpu"))
    assert labeled.strong.shape == (2, 1, 32, 40)
    assert unlabeled.weak.shape == (3, 1, 32, 40)


class Endless(LabeledLoader):
    """A loader without cases."""

    infinite = True

    def __init__(self):
        pass

    def __next__(self):
        return {"data": torch.zeros(1)}


def start_workers_and_die(connection) -> None:
    """Send the IDs of two worker processes, then kill this process."""
    batches = augmenter(Endless(), 2, 2, pin_memory=False)
    next(batches)
    connection.send([process.pid for process in batches._processes])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="requires /proc")
def test_workers_end_if_the_training_is_killed():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    training = context.Process(target=start_workers_and_die, args=(sender,))
    training.start()
    sender.close()
    workers = receiver.recv()
    training.join()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    remaining = [worker for worker in workers if is_running(worker)]
    for worker in remaining:
        os.kill(worker, signal.SIGKILL)
    assert len(workers) == 2
    assert not remaining
