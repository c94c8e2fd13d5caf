"""Tests of the check of label values in preprocessed segmentations."""

import json
import os
import tracemalloc
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnunet_dycon.data import label_values
from nnunet_dycon.data.label_values import check_label_values, sparsely_annotated
from nnunet_dycon.errors import UserError

DATASET = {"labels": {"background": 0, "organ": 1, "tumor": 2, "ignore": 3}}
BOTH = {0: 32, 1: 32}  # numbers of voxels of write(folder, case, 0, 1)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "nnUNetPlans_3d_fullres"
    folder.mkdir()
    return folder


def write(folder: Path, case: str, *values: int, as_npz: bool = False) -> None:
    segmentation = np.resize(np.array(values, np.int8), (1, 4, 4, 4))
    if as_npz:
        np.savez(folder / f"{case}.npz", data=segmentation, seg=segmentation)
        return
    file = folder / f"{case}_seg.b2nd"
    file.unlink(missing_ok=True)
    blosc2.asarray(segmentation, urlpath=str(file))


def test_voxels_of_each_label_are_counted_and_cases_with_ignored_voxels_are_sparsely_annotated(folder):
    write(folder, "a", -1, 0, 1, 0)
    write(folder, "b", 0, 3, as_npz=True)
    for _ in range(2):  # the second time from the stored numbers
        counts = check_label_values(folder, ["a", "b"], DATASET, 1)
        assert counts == {"a": {0: 32, 1: 16}, "b": {0: 32, 3: 32}}
    assert sparsely_annotated(counts, DATASET) == ["b"]
    assert sparsely_annotated(counts, {"labels": {"background": 0, "organ": 1, "tumor": 2, "vessel": 3}}) == []


def test_values_that_dataset_json_does_not_name_are_an_error_with_their_cases(folder):
    write(folder, "a", 0, 1)
    write(folder, "b", 0, 4, 7)
    with pytest.raises(UserError, match=r"1 labeled case has label values .* does not name: b \(4, 7\); correct"):
        check_label_values(folder, ["a", "b"], DATASET, 1)


@pytest.mark.parametrize("values", [(0,), (-1, 0, 3)])
def test_segmentations_without_foreground_are_an_error(folder, values):
    write(folder, "a", *values)
    with pytest.raises(UserError, match="no labeled case has a foreground voxel"):
        check_label_values(folder, ["a"], DATASET, 1)


def test_damaged_segmentation_is_named(folder):
    (folder / "a_seg.b2nd").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"a_seg.b2nd cannot be read"):
        check_label_values(folder, ["a"], DATASET, 1)


def test_memory_is_limited_to_the_voxels_and_one_slice(folder):
    voxels = np.zeros((1, 64, 128, 128), np.int8)
    blosc2.asarray(voxels, urlpath=str(folder / "a_seg.b2nd"))
    tracemalloc.start()
    try:
        assert label_values._count(folder / "a_seg.b2nd") == {0: voxels.size}
        assert tracemalloc.get_traced_memory()[1] < 2 * voxels.nbytes
    finally:
        tracemalloc.stop()


def test_only_changed_files_are_read_again(folder, monkeypatch):
    for case in ("a", "b"):
        write(folder, case, 0, 1)
    check_label_values(folder, ["a", "b"], DATASET, 1)
    read, count = [], label_values._count
    monkeypatch.setattr(label_values, "_count", lambda file: read.append(file.name) or count(file))
    assert check_label_values(folder, ["a", "b"], DATASET, 1) == {"a": BOTH, "b": BOTH}
    assert read == []
    write(folder, "b", 0, 2)
    os.utime(folder / "b_seg.b2nd", ns=(1, 1))
    assert check_label_values(folder, ["a", "b"], DATASET, 1) == {"a": BOTH, "b": {0: 32, 2: 32}}
    assert read == ["b_seg.b2nd"]


def test_damaged_cache_and_read_only_folder_do_not_matter(folder, monkeypatch):
    write(folder, "a", 0, 1)
    cache = folder.with_name(f"{folder.name}.label_values.json")
    version = (folder / "a_seg.b2nd").stat()
    earlier = json.dumps({"a": [[version.st_size, version.st_mtime_ns], [0, 1]]})  # without numbers of voxels
    for content in ("{", earlier):
        cache.write_text(content)
        assert check_label_values(folder, ["a"], DATASET, 1) == {"a": BOTH}
    cache.unlink()

    def refuse(file):
        raise PermissionError(file)

    monkeypatch.setattr(label_values, "replacing", refuse)
    assert check_label_values(folder, ["a"], DATASET, 1) == {"a": BOTH}
    assert not cache.exists()
