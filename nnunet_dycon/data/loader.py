"""Two-stream data loader: each batch consists of nnU-Net's batch of labeled patches and a batch of unlabeled patches.

A single loader draws both kinds of patches. So the numbers of labeled and unlabeled patches per batch are fixed, and no
additional worker processes are needed. nnU-Net's training loop, pinned memory and shutdown work as with its own loader.
Spawned worker processes import the loader by name, so it must be defined in an importable module.

Exceptions of a worker process do not reach the main process: nnU-Net only reports that a worker has ended. Therefore a
loader that cannot read a case returns a dict with the single key `FAULT` and the error message instead of a batch.
`nnunet_dycon.data.augmenters` then raises a UserError with this message in the main process.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from threadpoolctl import ThreadpoolController

from nnunet_dycon.components.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.data.views import TwoViews, split_views, stronger
from nnunet_dycon.errors import UserError, explained
from nnunet_dycon.system.processes import end_with_parent

_REMEDY = "preprocess it again"
FAULT = "fault"  # the only key of the dict that replaces a batch if a case cannot be read; its value is the message


class UnlabeledDataset:
    """A dataset of preprocessed images without labels. It reads no segmentations or properties.

    Args:
        folder: folder of the preprocessed cases.
        identifiers: identifiers of the cases.
        remedy: last part of the error message on an image that cannot be read, such as a command to run.
    """

    def __init__(self, folder: Path | str, identifiers: Iterable[str], remedy: str = _REMEDY) -> None:
        self._sources = {case: (str(folder), remedy) for case in identifiers}

    @property
    def identifiers(self) -> list[str]:
        """Identifiers of the cases, sorted. nnU-Net's loader draws from them, all with the same probability."""
        return sorted(self._sources)

    def __or__(self, other: "UnlabeledDataset") -> "UnlabeledDataset":
        """Return a dataset with the cases of both datasets."""
        union = copy(self)
        union._sources = self._sources | other._sources
        return union

    def image_file(self, identifier: str) -> str:
        """Return the path of the image of a case.

        The ending is .b2nd or, for labeled cases in nnU-Net's older formats, .npy or .npz.
        """
        stem = os.path.join(self._sources[identifier][0], identifier)
        files = [stem + ending for ending in (".b2nd", ".npy", ".npz")]  # nnU-Net unpacks .npz to .npy
        return next(filter(os.path.isfile, files), files[0])

    def load_image(self, identifier: str) -> blosc2.NDArray | np.ndarray:
        """Return the image (C, *spatial) of a case. Voxels are read when they are indexed; for .npz, all at once."""
        file = self.image_file(identifier)
        if file.endswith(".npz"):
            return np.load(file)["data"]
        if file.endswith(".npy"):
            return np.load(file, mmap_mode="r")
        # As in nnU-Net's own dataset: memory mapping fails on Windows.
        mapping = {} if os.name == "nt" else {"mmap_mode": "r"}
        return blosc2.open(urlpath=file, mode="r", dparams={"nthreads": 1}, **mapping)

    def naming_unreadable_image(self, identifier: str) -> AbstractContextManager:
        """Return a context manager that replaces an exception while reading the image of a case by a UserError.

        The message contains the file and the remedy.
        """
        return explained(Exception, f"{self.image_file(identifier)} cannot be read; {self._sources[identifier][1]}")


def require_readable(folder: str, cases: Sequence[str], remedy: str) -> None:
    """Raise UserError if a file of preprocessed labeled cases cannot be read.

    All files of a case (image, segmentation and properties) are read completely. A folder in nnU-Net's older formats
    (.npz, .npy) is not checked.

    Args:
        folder: folder of the preprocessed cases.
        cases: identifiers of the cases.
        remedy: last part of the error message, such as a command to run.

    Raises:
        UserError: a file cannot be read. The message names it.
    """
    if not any(Path(folder).glob("*.b2nd")):
        return  # older formats of nnU-Net are not checked
    endings = (".b2nd", "_seg.b2nd", ".pkl")
    for file in (Path(folder, case + ending) for case in dict.fromkeys(cases) for ending in endings):
        with explained(Exception, f"{file} cannot be read; {remedy}"):
            load_pickle(str(file)) if file.suffix == ".pkl" else blosc2.open(str(file), mode="r")[:]


@contextmanager
def naming_unreadable_cases(trainer: nnUNetTrainer) -> Iterator[None]:
    """Return a context manager for nnU-Net's validation that raises UserError if a validation case cannot be read.

    The validation runs in the `with` block. The cases are checked only if it raises an exception. If all cases can be
    read, this exception is raised unchanged.

    Args:
        trainer: semi-supervised trainer that runs the validation.
    """
    try:
        yield
    except Exception:
        cases = trainer.do_split()[1]
        require_readable(trainer.preprocessed_dataset_folder, cases, trainer.unlabeled_cases.labeled_remedy)
        raise


class LabeledLoader(nnUNetDataLoader):
    """nnU-Net's data loader, which returns an error message instead of a batch if a case cannot be read.

    The message is the value of the single key `FAULT` in a dict. `nnunet_dycon.data.augmenters` raises it as UserError.

    Args:
        data, arguments, options: arguments of nnUNetDataLoader.
        remedy: last part of the error message on a case that cannot be read, such as a command to run.
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
        """Store the number of this worker process, and start a thread that ends the process when its parent ends.

        batchgenerators calls this method in each worker process at its start.
        """
        super().set_thread_id(thread_id)
        end_with_parent()

    def get_indices(self) -> Sequence[str]:
        self._drawn = super().get_indices()
        return self._drawn

    def generate_train_batch(self) -> dict:
        try:
            return super().generate_train_batch()
        except Exception as error:
            require_readable(self._data.source_folder, self._drawn, self.remedy)
            raise RuntimeError(
                f"no batch could be drawn from the cases {', '.join(self._drawn)}; the cause is above"
            ) from error


class UnlabeledLoader(nnUNetDataLoader):
    """A loader of patches at uniformly random positions of unlabeled images, without oversampling of foreground.

    Args:
        data: the unlabeled cases.
        arguments, options: further arguments of nnUNetDataLoader. `transforms` must be `TwoViews`, which returns a
            strongly and a weakly augmented view of a patch.
        mask_channels: for each channel, whether it is normalized within its nonzero region (use_mask_for_norm).
    """

    def __init__(self, data: UnlabeledDataset, *arguments, mask_channels: Sequence[bool] = (), **options) -> None:
        super().__init__(data, *arguments, **options)
        # With an ignore label, nnU-Net would look for annotated voxels, which unlabeled cases do not have.
        self.has_ignore = False
        self.masked = [channel for channel, masked in enumerate(mask_channels) if masked]

    def generate_train_batch(self) -> dict:
        """Return a batch of B unlabeled patches.

        "data" has the shape (B, 2C, *spatial): the C channels of the strong view, then those of the weak view. "keys"
        are the identifiers of the B cases.
        """
        keys = self.get_indices()
        with torch.no_grad(), self._libraries.limit(limits=1):
            return {"data": torch.stack([self._patch(key) for key in keys]), "keys": keys}

    @cached_property
    def _libraries(self) -> ThreadpoolController:
        # Created once per process. nnU-Net's loader creates one for each batch, which takes 7 ms.
        return ThreadpoolController()

    def _patch(self, key: str) -> torch.Tensor:
        with self._data.naming_unreadable_image(key):
            image = self._data.load_image(key)
            lower, upper = self.get_bbox(image.shape[1:], force_fg=False, class_locations=None)
            box = [[first, last] for first, last in zip(lower, upper)]
            patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        if self.patch_size_was_2d:
            patch = patch[:, 0]
        outside = self._outside(patch) if self.masked else None
        return self.transforms(image=patch, segmentation=outside)["image"]

    def _outside(self, patch: torch.Tensor) -> torch.Tensor:
        """Return nnU-Net's mask of the nonzero region of a patch: -1 for voxels outside this region, 0 inside.

        nnU-Net stores this mask in the segmentation. During augmentation, it sets voxels outside to 0 in the channels
        that are normalized within their nonzero region (``self.masked``). Unlabeled cases have no stored segmentation,
        so the mask is computed from the image: a voxel is outside if all these channels are 0. `preprocess_unlabeled`
        ensures that they are exactly 0 outside. The images of sparsely annotated cases, which are also used as
        unlabeled ones, are preprocessed by nnU-Net. Its resampling blurs the border of the region, so a few voxels next
        to the border count as inside.

        Args:
            patch: (C, *spatial), before augmentation.

        Returns:
            (1, *spatial), int16.
        """
        return -(patch[self.masked] == 0).all(0, keepdim=True).to(torch.int16)


class TwoStreamLoader(LabeledLoader):
    """A loader whose batches contain labeled and unlabeled patches, each in a strong and a weak view (`TwoViews`).

    For the format of a batch see `generate_train_batch`.

    Args:
        arguments, options: positional and keyword arguments of `LabeledLoader`, which draws the labeled patches.
        unlabeled: the loader of unlabeled patches.
        transforms: the augmentation of labeled patches, which returns both views.
    """

    def __init__(self, *arguments, unlabeled: UnlabeledLoader, transforms: TwoViews, **options) -> None:
        super().__init__(*arguments, transforms=transforms, **options)
        self.unlabeled = unlabeled

    def generate_train_batch(self) -> dict:
        """Return nnU-Net's batch of labeled patches, to which the batch of unlabeled patches is added.

        "data" (labeled) and "unlabeled_data" have the shape (B, 2C, *spatial), each with its own B: the C channels of
        the strong view, then those of the weak view. "unlabeled_keys" are the identifiers of the unlabeled cases.
        """
        batch = super().generate_train_batch()
        unlabeled = self.unlabeled.generate_train_batch()
        return {**batch, "unlabeled_data": unlabeled["data"], "unlabeled_keys": unlabeled["keys"]}


def to_batches(batch: dict, device: torch.device) -> tuple[LabeledBatch, UnlabeledBatch]:
    """Split a batch of a `TwoStreamLoader` into a labeled and an unlabeled batch, and move them to a device."""

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


@dataclass(frozen=True)
class TrainingCases:
    """The datasets of a training.

    Attributes:
        labeled: nnU-Net's dataset of the labeled training cases.
        unlabeled: the images of imagesUn.
        sparse: the images of those labeled training cases that are sparsely annotated, without their annotation.
        validation: nnU-Net's dataset of the validation cases.
    """

    labeled: Any
    unlabeled: UnlabeledDataset
    sparse: UnlabeledDataset
    validation: Any

    @classmethod
    def of(cls, trainer: nnUNetTrainer, datasets: tuple[Any, Any], sparse: Iterable[str]) -> "TrainingCases":
        """Create an instance for a semi-supervised trainer.

        Args:
            trainer: the trainer, whose unlabeled cases are used.
            datasets: result of the trainer's get_tr_and_val_datasets: the datasets of the labeled training cases and
                of the validation cases.
            sparse: identifiers of all sparsely annotated cases; those that are not training cases are not used.

        Raises:
            UserError: there are neither unlabeled nor sparsely annotated training cases.
        """
        cases, (labeled, validation) = trainer.unlabeled_cases, datasets
        reused = set(labeled.identifiers) & set(sparse)
        unlabeled = UnlabeledDataset(cases.folder, cases.identifiers(), cases.remedy)
        if not (unlabeled.identifiers or reused):
            raise UserError(
                f"no unlabeled cases: {cases.no_images}, and no training case of this fold is sparsely annotated; "
                f"{cases.ways_to_add}"
            )
        images = UnlabeledDataset(trainer.preprocessed_dataset_folder, reused, cases.labeled_remedy)
        return cls(labeled, unlabeled, images, validation)

    @property
    def images(self) -> UnlabeledDataset:
        """The images of `unlabeled` and `sparse`: unlabeled patches are drawn from all cases with equal probability."""
        return self.unlabeled | self.sparse

    @property
    def identifiers(self) -> dict[str, list[str]]:
        """Identifiers of the cases in each dataset, with the keys "labeled", "unlabeled", "sparse" and "validation".

        The cases in "sparse" are in "labeled", too.
        """
        return {role.name: list(getattr(self, role.name).identifiers) for role in fields(self)}


def make_loaders(trainer: nnUNetTrainer, cases: TrainingCases) -> tuple[TwoStreamLoader, LabeledLoader]:
    """Return the loaders of training and validation, configured as in nnU-Net's get_dataloaders.

    Args:
        trainer: a semi-supervised trainer, whose plans, transforms, batch sizes and settings are used.
        cases: the datasets of the training.
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
        cases.images, trainer.unlabeled_batch_size, *sizes, transforms=views, mask_channels=plan.use_mask_for_norm,
    )  # fmt: skip
    return (
        TwoStreamLoader(
            cases.labeled, trainer.batch_size, *sizes, transforms=views, unlabeled=unlabeled_loader, **options
        ),
        LabeledLoader(
            cases.validation, trainer.batch_size, plan.patch_size, plan.patch_size, labels,
            transforms=trainer.get_validation_transforms(scales, **about_labels), **options,
        ),
    )  # fmt: skip
