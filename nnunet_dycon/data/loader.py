"""The two-stream loader: nnU-Net's batch of labeled patches with a batch of unlabeled patches.

A single loader keeps the composition of a batch fixed, needs no additional worker processes, and works with nnU-Net's
loop, pinning and shutdown. It is defined in an importable module because worker processes may be spawned.

nnU-Net does not report the exception of a worker process, only that it ended. Therefore a loader returns a fault in
place of a batch if a case cannot be read, and `nnunet_dycon.data.augmenters` raises it.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc2
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from threadpoolctl import ThreadpoolController

from nnunet_dycon.components.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.data.views import TwoViews, split_views, stronger
from nnunet_dycon.errors import UserError, explained

_REMEDY = "preprocess it again"
FAULT = "fault"  # the only key of what is returned in place of a batch


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


def require_readable(folder: str, cases: Sequence[str], remedy: str) -> None:
    """Read labeled, preprocessed cases to their ends; raise UserError if a file cannot be read, which names it."""
    if not any(Path(folder).glob("*.b2nd")):
        return  # nnU-Net has written no other files for long
    endings = (".b2nd", "_seg.b2nd", ".pkl")
    for file in (Path(folder, case + ending) for case in dict.fromkeys(cases) for ending in endings):
        with explained(Exception, f"{file} cannot be read; {remedy}"):
            load_pickle(str(file)) if file.suffix == ".pkl" else blosc2.open(str(file), mode="r")[:]


@contextmanager
def naming_unreadable_cases(trainer: nnUNetTrainer) -> Iterator[None]:
    """If nnU-Net's validation fails, raise UserError if that is because a validation case cannot be read."""
    try:
        yield
    except Exception:
        cases = trainer.do_split()[1]
        require_readable(trainer.preprocessed_dataset_folder, cases, trainer.unlabeled_cases.labeled_remedy)
        raise


def _end_with_parent() -> None:
    """End this process when its parent does, by which it would otherwise be left, with all its memory, if that is
    killed: as many processes more with each restart."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class LabeledLoader(nnUNetDataLoader):
    """nnU-Net's, but for a case that cannot be read, which it hands over in place of a batch.

    Args:
        remedy: what to do about such a case.
    """

    def __init__(self, data, *arguments, remedy: str = _REMEDY, **options) -> None:
        super().__init__(data, *arguments, **options)
        self.remedy = remedy
        self._drawn: Sequence[str] = ()

    def __next__(self) -> dict:
        try:
            return super().__next__()
        except UserError as error:
            return {FAULT: str(error)}

    def set_thread_id(self, thread_id: int) -> None:
        """Called where a worker process begins: let it end with its parent."""
        super().set_thread_id(thread_id)
        threading.Thread(target=_end_with_parent, daemon=True).start()

    def get_indices(self) -> Sequence[str]:
        self._drawn = super().get_indices()
        return self._drawn

    def generate_train_batch(self) -> dict:
        try:
            return super().generate_train_batch()
        except Exception as error:
            require_readable(self._data.source_folder, self._drawn, self.remedy)
            raise RuntimeError(f"no batch could be made of the cases {', '.join(self._drawn)}") from error


class UnlabeledLoader(nnUNetDataLoader):
    """Draws patches uniformly from unlabeled images: there is no foreground to look for.

    Args:
        data: the cases.
        mask_channels: of the plans, which channels are normalised within their nonzero region.
        remedy: what to do about a case that cannot be read.
    """

    def __init__(
        self, data: UnlabeledDataset, *arguments, mask_channels: Sequence[bool] = (), remedy: str = _REMEDY, **options
    ) -> None:
        super().__init__(data, *arguments, **options)
        self.remedy = remedy
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
        with explained(Exception, f"{os.path.join(self._data.folder, key)}.b2nd cannot be read; {self.remedy}"):
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


class TwoStreamLoader(LabeledLoader):
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


def make_loaders(
    trainer: nnUNetTrainer, labeled: Any, unlabeled: UnlabeledDataset, validation: Any
) -> tuple[TwoStreamLoader, LabeledLoader]:
    """Return the loaders of training and validation: those of nnU-Net's get_dataloaders, the first with two streams.

    Args:
        trainer: a semi-supervised one; its plans, transforms, batch sizes and settings are used.
        labeled: nnU-Net's dataset of the training cases.
        unlabeled: the unlabeled cases.
        validation: nnU-Net's dataset of the validation cases.
    """
    plan, labels, scales = trainer.configuration_manager, trainer.label_manager, trainer._get_deep_supervision_scales()
    rotation, dummy_2d, initial_size, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    about_labels = {
        "is_cascaded": trainer.is_cascaded,
        "foreground_labels": labels.foreground_labels,
        "regions": labels.foreground_regions if labels.has_regions else None,
        "ignore_label": labels.ignore_label,
    }
    transforms = trainer.get_training_transforms(
        plan.patch_size, rotation, scales, mirror_axes, dummy_2d, use_mask_for_norm=plan.use_mask_for_norm,
        **about_labels,
    )  # fmt: skip
    views = TwoViews(stronger(transforms) if trainer.training_settings.strong_intensity_augmentation else transforms)
    options = {
        "remedy": trainer.unlabeled_cases.labeled_remedy,
        "oversample_foreground_percent": trainer.oversample_foreground_percent,
        "probabilistic_oversampling": trainer.probabilistic_oversampling,
    }
    sizes = (initial_size, plan.patch_size, labels)
    unlabeled_loader = UnlabeledLoader(
        unlabeled, trainer.unlabeled_batch_size, *sizes, transforms=views, mask_channels=plan.use_mask_for_norm,
        remedy=trainer.unlabeled_cases.remedy,
    )  # fmt: skip
    return (
        TwoStreamLoader(labeled, trainer.batch_size, *sizes, transforms=views, unlabeled=unlabeled_loader, **options),
        LabeledLoader(
            validation, trainer.batch_size, plan.patch_size, plan.patch_size, labels,
            transforms=trainer.get_validation_transforms(scales, **about_labels), **options,
        ),
    )  # fmt: skip
