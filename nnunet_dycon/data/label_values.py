"""Number of voxels with each label in the preprocessed segmentations of labeled cases, and a check of the values."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import blosc2
import numpy as np

from nnunet_dycon.data.dataset_json import ignore_label, label_values
from nnunet_dycon.errors import UserError, counted, explained
from nnunet_dycon.system.files import replacing
from nnunet_dycon.system.processes import map_cases

_CACHE = ".label_values.json"
_OUTSIDE = -1  # nnU-Net's value of voxels outside of the nonzero region of the image
_FEW_BYTES = 2**26  # up to this size, reading takes less time than starting processes
_DAMAGE = (ValueError, KeyError, TypeError, EOFError, RuntimeError, OSError)


def check_label_values(
    folder: Path, cases: Iterable[str], dataset_json: dict, num_processes: int, stores: bool = True
) -> dict[str, dict[int, int]]:
    """Check the label values in preprocessed segmentations, and return the number of voxels with each value.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX/<data_identifier>.
        cases: identifiers of the labeled cases.
        dataset_json: content of dataset.json.
        num_processes: number of worker processes.
        stores: whether to store the numbers for the next call, as in `count_labels`.

    Returns:
        Case identifier -> label value -> number of voxels, as from `count_labels`.

    Raises:
        UserError: a segmentation is missing, cannot be read, or has a value that is not in dataset.json; or no
            segmentation has a foreground voxel.
    """
    counts = count_labels(folder, cases, num_processes, stores)
    known = label_values(dataset_json)
    unknown = {case: sorted(found.keys() - known) for case, found in counts.items() if found.keys() - known}
    if unknown:
        cases_and_values = [f"{case} ({', '.join(map(str, values))})" for case, values in unknown.items()]
        one, many = (f"{verb} label values that dataset.json does not name" for verb in ("has", "have"))
        raise UserError(
            f"{folder}: {counted(cases_and_values, f'labeled case {one}', f'labeled cases {many}')}; correct the label "
            "files or add the values to dataset.json, and run nnUNetv2_plan_and_preprocess again with --clean"
        )
    if not set().union(*counts.values()) - {0, ignore_label(dataset_json)}:
        raise UserError(
            f"{folder}: no labeled case has a foreground voxel; check the label files in labelsTr, and run "
            "nnUNetv2_plan_and_preprocess again with --clean"
        )
    return counts


def count_labels(
    folder: Path, cases: Iterable[str], num_processes: int, stores: bool = True
) -> dict[str, dict[int, int]]:
    """Return case identifier -> label value -> number of voxels in the preprocessed segmentation of the case.

    Only values that occur in the case are keys. Values that are not in dataset.json are included, but not the -1 with
    which nnU-Net marks voxels outside the nonzero region.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX/<data_identifier>. The numbers are stored in
            <data_identifier>.label_values.json next to this folder, and computed again only for changed files.
        cases: identifiers of the labeled cases.
        num_processes: number of worker processes.
        stores: whether to store the numbers for the next call.

    Raises:
        UserError: a segmentation is missing or cannot be read.
    """
    cache = folder.with_name(folder.name + _CACHE)
    known: dict[str, list] = {}
    with suppress(OSError, ValueError):
        stored = json.loads(cache.read_text())
        known = {case: entry for case, entry in stored.items() if isinstance(entry[1], dict)}  # a list in 0.1
    files = {case: _segmentation(folder, case) for case in sorted(cases)}
    versions = {case: [file.stat().st_size, file.stat().st_mtime_ns] for case, file in files.items()}
    new = [case for case in files if case not in known or known[case][0] != versions[case]]
    if new:
        is_small = sum(versions[case][0] for case in new) < _FEW_BYTES
        jobs = [files[case] for case in new]
        results = map_cases(_count, jobs, 1 if is_small else num_processes, "reading labels")
        known |= {case: [versions[case], found] for case, found in zip(new, results)}
        if stores:
            with suppress(OSError), replacing(cache) as partial_file:  # the folder may be read-only
                partial_file.write_text(json.dumps({case: known[case] for case in files}))
    return {case: {int(value): number for value, number in known[case][1].items()} for case in files}


def sparsely_annotated(counts: Mapping[str, Mapping[int, int]], dataset_json: dict) -> list[str]:
    """Return the identifiers of the cases in which some voxels are not annotated, that is, have the ignore label.

    Args:
        counts: result of `count_labels`.
        dataset_json: content of dataset.json.
    """
    ignore = ignore_label(dataset_json)
    return [case for case, found in counts.items() if ignore is not None and found.get(ignore)]


def _segmentation(folder: Path, case: str) -> Path:
    for name in (f"{case}_seg.b2nd", f"{case}.npz"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no segmentation of {case}; preprocess again with nnUNetv2_preprocess")


def _count(file: Path) -> dict[int, int]:
    """Return label value -> number of voxels in a preprocessed segmentation (.b2nd or .npz), without the value -1."""
    with explained(_DAMAGE, f"{file} cannot be read; remove its folder, and run nnUNetv2_preprocess again"):
        if file.suffix == ".npz":
            with np.load(file) as content:
                voxels = content["seg"]
        else:
            voxels = blosc2.open(str(file), mode="r")[:]
    counts: Counter[int] = Counter()
    for z in range(voxels.shape[1]):  # bincount needs 8 bytes per voxel, too much for all slices at once
        part = voxels[:, z].astype(np.int32).ravel()
        lowest = part.min()
        numbers = np.bincount(part - lowest)
        found = np.flatnonzero(numbers)
        counts.update(dict(zip((found + lowest).tolist(), numbers[found].tolist())))
    del counts[_OUTSIDE]
    return dict(counts)
