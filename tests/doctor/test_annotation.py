"""Tests of the doctor's check of sparse annotations."""

import pytest

from nnunet_dycon.doctor.annotation import examine_annotation
from nnunet_dycon.doctor.findings import NOTE, WARNING

CLASSES = {"labels": {"background": 0, "liver": 1, "tumor": 2, "ignore": 3}}
REGIONS = {"labels": {"background": 0, "liver": [1, 2], "tumor": 2, "ignore": 3}}
FULL = {0: 800, 1: 100, 2: 100}


@pytest.mark.parametrize("labels", [CLASSES, {"labels": {"background": 0, "liver": 1, "tumor": 2}}])
def test_completely_annotated_cases_have_no_finding(labels):
    assert list(examine_annotation({"a": FULL}, labels)) == []


@pytest.mark.parametrize(("labels", "liver"), [(CLASSES, "0.08"), (REGIONS, "0.14")])
def test_share_of_annotated_voxels_per_label(labels, liver):
    (finding,) = examine_annotation({"a": FULL, "b": {0: 300, 1: 60, 2: 20, 3: 620}}, labels)
    assert finding.status == NOTE
    assert finding.message == (
        "sparsely annotated: 1 of 2 labeled cases; their images are also used as unlabeled ones. Annotated share of "
        f"all voxels: 0.69 (background 0.55, liver {liver}, tumor 0.06)"
    )


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": {0: 500, 1: 60, 2: 60, 3: 380}, "b": {3: 1000}}, "1 labeled case has no annotation: b"),
        ({"a": {1: 60, 2: 60, 3: 880}}, "no voxel is annotated as background"),
        ({"a": {0: 500, 1: 60, 2: 49, 3: 380}}, "1 label has fewer than 50 annotated voxels: tumor (49)"),
        ({"a": {0: 500, 1: 9, 3: 380}}, "2 labels have fewer than 50 annotated voxels: liver (9), tumor (0)"),
    ],
)
def test_warnings(counts, message):
    note, warning = examine_annotation(counts, CLASSES)
    assert (note.status, warning.status) == (NOTE, WARNING)
    assert warning.message == message or warning.message.startswith(f"{message}, so")
    assert warning.remedy


def test_annotation_can_be_lost_by_resampling():
    counts = {"a": {0: 500, 1: 60, 2: 60, 3: 380}, "b": {3: 1000}}
    _, warning = examine_annotation(counts, CLASSES, [2.0, 0.75, 0.75])
    assert "resampling to 2 x 0.75 x 0.75 mm has removed it" in warning.remedy


def test_fifty_voxels_in_all_cases_suffice():
    (finding,) = examine_annotation({"a": {0: 9, 1: 25, 2: 50, 3: 9}, "b": {1: 25}}, CLASSES)
    assert finding.status == NOTE
