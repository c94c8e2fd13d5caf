"""Conversion of a fully annotated data set to one with sparse annotation: some slices, or scribbles.

Voxels without annotation get nnU-Net's ignore label. The result is meant for trying out training with sparse
annotation.
"""

import json
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from skimage.measure import label as connected_regions
from skimage.morphology import skeletonize

from nnunet_dycon.data.dataset_json import ignore_label, label_values, read_dataset_json, values_by_name
from nnunet_dycon.data.image_checks import check_file
from nnunet_dycon.data.image_reading import Reader, files_with_ending, in_file_order, reader_class
from nnunet_dycon.data.unlabeled import dataset_name
from nnunet_dycon.dataset_conversion.roles import FOLDERS
from nnunet_dycon.dataset_conversion.writer import new_dataset_folder, reserved, writing_errors
from nnunet_dycon.errors import UserError, first_line, joined, some
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import link_or_copy, new_folder, require_whole
from nnunet_dycon.system.label_maps import rounded
from nnunet_dycon.system.processes import map_cases

_LABELS = "labelsTr"


@dataclass(frozen=True)
class Slices:
    """Annotation of every n-th slice.

    Attributes:
        every: n; the first annotated slice has the index n // 2. With fewer than n slices, the middle one is annotated.
        axis: axis along which the slices are counted, in nnU-Net's order (Z, Y, X): 0, 1 or 2.
    """

    every: int
    axis: int = 0

    @property
    def name(self) -> str:
        return f"Every{self.every}" + (f"Axis{self.axis}" if self.axis else "")

    def __call__(self, labels: np.ndarray, case: str) -> np.ndarray:
        """Return a mask (Z, Y, X) of the annotated slices of a label map (Z, Y, X); `case` is unused."""
        number = labels.shape[self.axis]
        mask = np.zeros(labels.shape, dtype=bool)
        np.moveaxis(mask, self.axis, 0)[min(self.every, number) // 2 :: self.every] = True
        return mask


@dataclass(frozen=True)
class Scribbles:
    """Annotation by scribbles.

    In each slice along Z, each connected region of each label, including background, has one scribble. The scribble is
    half of the pixels of the region's skeleton: those nearest to a random pixel of the skeleton.

    Attributes:
        seed: seed for drawing these random pixels.
    """

    seed: int = 0

    @property
    def name(self) -> str:
        return f"Scribbles{self.seed}" if self.seed else "Scribbles"

    def __call__(self, labels: np.ndarray, case: str) -> np.ndarray:
        """Return a mask (Z, Y, X) of the scribbles in a label map (Z, Y, X).

        The random pixels depend on `seed` and on the name of the case, `case`.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(case.encode())])
        mask = np.zeros(labels.shape, dtype=bool)
        for plane, drawn in zip(labels, mask):
            for value in np.unique(plane):
                regions = connected_regions(plane == value)
                skeleton = np.argwhere(skeletonize(plane == value))
                regions_of_pixels = regions[tuple(skeleton.T)]
                for region in np.unique(regions_of_pixels):
                    pixels = skeleton[regions_of_pixels == region]
                    distances = np.linalg.norm(pixels - rng.choice(pixels), axis=1)
                    piece = pixels[np.argsort(distances, kind="stable")[: max(1, len(pixels) // 2)]]
                    drawn[tuple(piece.T)] = True
        return mask


def sparsify(dataset: str, dataset_id: int, annotate: Slices | Scribbles, num_processes: int = 1) -> Path:
    """Write a copy of a data set in nnUNet_raw, in which only some voxels of labelsTr are annotated.

    The other voxels of labelsTr get the label "ignore", which is added to dataset.json. All images and the labels of
    held-out cases are unchanged: hard links, or copies if the file system does not support links.

    Args:
        dataset: ID or name of a data set whose voxels are all annotated.
        dataset_id: ID of the new data set.
        annotate: the rule that selects the annotated voxels.
        num_processes: number of worker processes; 1 uses this process.

    Returns:
        The folder of the new data set, nnUNet_raw/DatasetXXX_NAME_RULE, such as Dataset005_Heart_Every8.

    Raises:
        UserError: dataset.json is invalid or has an ignore label already, labelsTr is empty, a label file is damaged
            or has label values that are not in dataset.json, or the new data set cannot be written.
        UsageError: the data set does not exist, or the new ID is invalid or already used.
    """
    source = nnunet_folder("nnUNet_raw") / dataset_name(dataset)
    about = read_dataset_json(source)
    if ignore_label(about) is not None:
        raise UserError(
            f"{source / 'dataset.json'} has an ignore label already; name a data set whose voxels are all annotated"
        )
    folder = new_dataset_folder(dataset_id, f"{source.name[len('Dataset000_') :]}_{annotate.name}", "-o")
    files = files_with_ending(source / _LABELS, about["file_ending"])
    if not files:
        raise UserError(f"{source / _LABELS} has no file *{about['file_ending']}; name a data set with labels")
    ignore = max(label_values(about)) + 1
    reader = in_file_order(reader_class(about, files[0]))
    problem = f"cannot write {folder}"
    with reserved(folder, "-o"), writing_errors(problem, "free disk space"), new_folder(folder) as partial_folder:
        (partial_folder / _LABELS).mkdir()
        write = partial(_write_label, partial_folder / _LABELS, reader, about, ignore, annotate)
        results = list(map_cases(write, files, num_processes, "writing labels"))
        if faults := [result for result in results if isinstance(result, str)]:
            raise UserError(joined(faults))
        for name in (name for pair in FOLDERS.values() for name in pair if name not in (None, _LABELS)):
            _link_files(source / name, partial_folder / name)
        if (splits := source / "splits_final.json").is_file():
            link_or_copy(splits, partial_folder / splits.name)
        about["labels"]["ignore"] = ignore
        about["sparse_annotation"] = {"of": source.name, "rule": type(annotate).__name__.lower(), **vars(annotate)}
        (partial_folder / "dataset.json").write_text(json.dumps(about, indent=4))
    counts = (Counter(result) for result in results if not isinstance(result, str))
    _print_summary(folder, sum(counts, Counter()), about)
    return folder


def _write_label(
    folder: Path,
    reader: Reader,
    about: dict,
    ignore: int,
    annotate: Callable[[np.ndarray, str], np.ndarray],
    file: Path,
) -> dict[int, int] | str:
    """Write a copy of a label map in which voxels without annotation have the ignore label.

    Args:
        folder: folder of the copy, which gets the same file name.
        reader: nnU-Net's reader of the label maps.
        about: content of dataset.json.
        ignore: value of the voxels without annotation.
        annotate: the rule that selects the annotated voxels.
        file: label map in which all voxels are annotated.

    Returns:
        Label value -> number of voxels in the copy, or an error message if `file` cannot be read or has label values
        that are not in dataset.json.
    """
    try:
        check_file(file)
        voxels, properties = reader().read_seg(str(file))
    except Exception as error:  # of any reader
        return f"{file} cannot be read ({first_line(error)}); repair it"
    labels = rounded(voxels[0])
    if unknown := sorted(set(np.unique(labels).tolist()) - label_values(about)):
        return f"{file} has label values that dataset.json does not name: {some([f'{value:g}' for value in unknown])}"
    case = file.name.removesuffix(about["file_ending"])
    sparse = np.where(annotate(labels, case), labels, ignore).astype(np.int16)
    reader().write_seg(sparse, str(folder / file.name), properties)
    require_whole(folder / file.name)  # SimpleITK does not detect a full disk
    return dict(zip(*(array.tolist() for array in np.unique(sparse, return_counts=True))))


def _link_files(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for file in source.iterdir():
            if file.is_file():
                link_or_copy(file, target / file.name)
            elif not file.is_dir():
                raise UserError(f"{file} is a broken link; repair or remove it")


def _print_summary(folder: Path, total: Counter[int], about: dict) -> None:
    dataset_id, voxels = int(folder.name[len("Dataset") :][:3]), total.total()
    annotated = {name: sum(total[value] for value in its) for name, its in values_by_name(about).items()}
    annotated.pop("ignore")
    shares = ", ".join(f"{name} {number / voxels:.2g}" for name, number in annotated.items())
    print(f"annotated share of all voxels: {1 - total[about['labels']['ignore']] / voxels:.2g} ({shares})")
    if not total[about["labels"]["ignore"]]:
        print("warning: all voxels are annotated; choose a larger N or another --axis")
    for name, number in annotated.items():
        if not number:
            print(f"warning: no voxel of {name} is annotated, so the network cannot learn it; annotate more slices")
    print(f"written to {folder}; next:")
    print(f"  nnUNetv2_plan_and_preprocess -d {dataset_id}")
