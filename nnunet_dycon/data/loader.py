"""The two-stream loader: nnU-Net's batch of labeled patches, and beside it one of unlabeled patches.

One loader, not two: composition is fixed, no further worker processes are needed, and nnU-Net's loop, pinning and
shut-down work as they are. It is defined in an importable module because worker processes may be spawned.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import ThreadpoolController

from nnunet_dycon.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.data.views import TwoViews, split_views


class UnlabeledDataset:
    """Preprocessed unlabeled cases. It can read images, and nothing else of a case."""

    def __init__(self, folder: Path, identifiers: list[str]) -> None:
        self.folder = str(folder)
        self.identifiers = sorted(identifiers)

    def load_image(self, identifier: str) -> blosc2.NDArray:
        """The image (C, X, Y, Z) of a case, read lazily."""
        # As nnU-Net reads its own: memory mapping fails on Windows.
        mapping = {} if os.name == "nt" else {"mmap_mode": "r"}
        file = os.path.join(self.folder, f"{identifier}.b2nd")
        return blosc2.open(urlpath=file, mode="r", dparams={"nthreads": 1}, **mapping)


class UnlabeledLoader(nnUNetDataLoader):
    """Draws patches uniformly from unlabeled images: there is no foreground to look for."""

    def __init__(self, data: UnlabeledDataset, *arguments, mask_channels: Sequence[bool] = (), **options) -> None:
        super().__init__(data, *arguments, **options)
        # With an ignore label nnU-Net would look for annotated voxels, which an unlabeled case does not have.
        self.has_ignore = False
        self.masked = [channel for channel, masked in enumerate(mask_channels) if masked]

    def generate_train_batch(self) -> dict:
        """{"data": (B, 2C, *spatial), "keys": B identifiers}."""
        keys = self.get_indices()
        with torch.no_grad(), self._libraries.limit(limits=1):
            return {"data": torch.stack([self._patch(key) for key in keys]), "keys": keys}

    @cached_property
    def _libraries(self) -> ThreadpoolController:
        # Looked for once in each process: nnU-Net's loader does so for each batch, which takes 7 ms.
        return ThreadpoolController()

    def _patch(self, key: str) -> torch.Tensor:
        image = self._data.load_image(key)
        lower, upper = self.get_bbox(image.shape[1:], force_fg=False, class_locations=None)
        box = [[first, last] for first, last in zip(lower, upper)]
        patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        if self.patch_size_was_2d:
            patch = patch[:, 0]
        outside = self._outside(patch) if self.masked else None
        return self.transforms(image=patch, segmentation=outside)["image"]

    def _outside(self, patch: torch.Tensor) -> torch.Tensor:
        """-1 where every masked channel is 0, else 0: (1, *spatial).

        Where images are normalised within their nonzero region, nnU-Net sets augmented voxels outside of it to 0 again
        and looks the region up in the segmentation. Here it is read off the image, which preprocessing made exactly 0
        outside.
        """
        return -(patch[self.masked] == 0).all(0, keepdim=True).to(torch.int16)


class TwoStreamLoader(nnUNetDataLoader):
    """nnU-Net's loader with two views of each labeled patch, and an unlabeled batch from a second one."""

    def __init__(self, *arguments, unlabeled: UnlabeledLoader, transforms: TwoViews, **options) -> None:
        super().__init__(*arguments, transforms=transforms, **options)
        self.unlabeled = unlabeled

    def generate_train_batch(self) -> dict:
        """nnU-Net's batch with "data" (B, 2C, *spatial), and "unlabeled_data" (B, 2C, *spatial), "unlabeled_keys"."""
        batch = super().generate_train_batch()
        unlabeled = self.unlabeled.generate_train_batch()
        return {**batch, "unlabeled_data": unlabeled["data"], "unlabeled_keys": unlabeled["keys"]}


def to_batches(batch: dict, device: torch.device) -> tuple[LabeledBatch, UnlabeledBatch]:
    """Move what a `TwoStreamLoader` drew to the device and give its parts their names."""

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    targets = batch["target"]
    targets = [on_device(level) for level in targets] if isinstance(targets, list) else on_device(targets)
    strong, weak = split_views(on_device(batch["data"]))
    unlabeled_strong, unlabeled_weak = split_views(on_device(batch["unlabeled_data"]))
    return (
        LabeledBatch(weak, strong, targets, tuple(map(str, batch["keys"]))),
        UnlabeledBatch(unlabeled_weak, unlabeled_strong, tuple(map(str, batch["unlabeled_keys"]))),
    )


def augmenter(
    loader: nnUNetDataLoader, processes: int, cached: int, pin_memory: bool
) -> SingleThreadedAugmenter | NonDetMultiThreadedAugmenter:
    """Draw from a loader in this process (0) or in worker processes, as nnU-Net does."""
    if processes == 0:
        return SingleThreadedAugmenter(loader, None)
    # Forked workers inherit one state of torch's generator, so without seeds all would flip the same coins.
    seeds = [int(seed) for seed in np.random.default_rng().integers(2**31, size=processes)]
    return NonDetMultiThreadedAugmenter(
        loader, None, processes, num_cached=cached, seeds=seeds, pin_memory=pin_memory, wait_time=0.002
    )
