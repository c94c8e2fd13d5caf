"""Tests of the checks of dataset.json."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from nnunet_dycon.data.dataset_json import check_dataset_json, dataset_json_faults, region_faults
from nnunet_dycon.errors import UserError

CLASSES = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "edema": 1, "core": 2},
    "file_ending": ".nii.gz",
}
REGIONS = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}}
HEALTHY = {
    "classes": {},
    "reader": {"file_ending": ".mgz", "overwrite_image_reader_writer": "NibabelIO"},
    "ignore label": {"labels": {"background": 0, "organ": 1, "ignore": 2}},
    "regions": REGIONS | {"regions_class_order": [1, 2, 3]},
    "region order of BraTS": {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
        "regions_class_order": [1, 2, 3],
    },
    "regions and ignore label": {
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    },
}
FAULTY = {
    "channel names reversed": ({"channel_names": {"T1": 0}}, '"channel_names" is {\'T1\': 0}, but must map "0", "1"'),
    "channel name is a number": ({"channel_names": {"0": 0}}, '"channel_names" is {\'0\': 0}'),
    "unknown ending": ({"file_ending": ".nii.gz "}, "\"file_ending\" is '.nii.gz ', but nnU-Net reads only .bmp"),
    "unknown reader": ({"overwrite_image_reader_writer": "OtherIO"}, "is 'OtherIO', but nnU-Net has no reader"),
    "reader is no name": ({"overwrite_image_reader_writer": None}, "is None, but nnU-Net has no reader"),
    "no channel names": ({"channel_names": {}}, '"channel_names" is {}' ),
    "channels from 1": ({"channel_names": {"1": "T1"}}, 'must map "0", "1"'),
    "labels reversed": ({"labels": {"0": "background", "1": "a"}}, "must map names to values"),
    "no labels": ({"labels": {}}, '"labels" is {}'),
    "gap": ({"labels": {"background": 0, "a": 1, "b": 3}}, 'the values in "labels" are [0, 1, 3], but'),
    "no background": ({"labels": {"a": 1, "b": 2}}, '"labels" must contain "background": 0'),
    "only background": ({"labels": {"background": 0}}, "no label except background"),
    "ignore in the middle": ({"labels": {"background": 0, "a": 1, "ignore": 2, "b": 3}}, '"ignore" is 2, but must'),
    "ending without dot": ({"file_ending": "nii.gz"}, "\"file_ending\" is 'nii.gz', but must start with a dot"),
    "no region order": (REGIONS, '"regions_class_order" is None, but must have one value for each of the 3 regions'),
    "short region order": (REGIONS | {"regions_class_order": [1, 2]}, "one value for each of the 3 regions"),
    "stored outside of its region": (
        {
            "labels": {"background": 0, "whole": [1, 2, 3, 4], "core": [1, 2, 3], "enhancing": 1},
            "regions_class_order": [1, 2, 3],
        },
        "stores predictions of label 1 as 3, which is not in the same regions",
    ),
    "small region first": (
        {"labels": {"background": 0, "core": 2, "whole": [1, 2]}, "regions_class_order": [2, 1]},
        "list larger regions first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", HEALTHY.values(), ids=HEALTHY)
def test_valid_content_passes(change):
    check_dataset_json(CLASSES | change, Path("dataset.json"))


def test_channels_can_be_named_as_in_version_1_of_nnunet():
    content = {key: value for key, value in CLASSES.items() if key != "channel_names"} | {"modality": {"0": "MRI"}}
    check_dataset_json(content, Path("dataset.json"))


@pytest.mark.parametrize(("change", "message"), FAULTY.values(), ids=FAULTY)
def test_faults_are_named(change, message):
    with pytest.raises(UserError) as refused:
        check_dataset_json(CLASSES | change, Path("folder/dataset.json"))
    assert message in str(refused.value)
    assert str(refused.value).startswith("folder/dataset.json: ")


@pytest.mark.parametrize("content", [[], None, 3])
def test_content_that_is_no_object_is_a_fault(content):
    with pytest.raises(UserError, match="does not contain an object"):
        check_dataset_json(content, Path("dataset.json"))


def test_region_order_is_accepted_exactly_if_a_perfect_prediction_gets_a_dice_of_1():
    """Exhaustive over all orders: the prediction is stored region by region, as nnU-Net's LabelManager does."""
    regions = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    reference = np.arange(4)
    for order in np.ndindex(4, 4, 4):
        stored = np.zeros_like(reference)
        for values, value in zip(regions.values(), order):
            stored[np.isin(reference, values)] = value
        is_perfect = all((np.isin(stored, v) == np.isin(reference, v)).all() for v in regions.values())
        content = CLASSES | {"labels": {"background": 0, **regions}, "regions_class_order": list(map(int, order))}
        assert is_perfect == (not list(dataset_json_faults(content))), order


def test_suggested_region_order_is_accepted_or_none_is_suggested():
    """Exhaustive over all pairs of regions with 2 of 3 labels, and a third region with one label."""
    names, pairs = ("a", "b", "c"), ((1, 2), (1, 3), (2, 3))
    suggested = 0
    for first, second, third in product(pairs, pairs, ((1,), (2,), (3,))):
        regions = dict(zip(names, (first, second, third)))
        valid = [
            list(order) for order in product(first, second, third) if not list(region_faults(regions, list(order)))
        ]
        (fault,) = region_faults(regions, [0, 0, 0])
        if valid:
            assert any(fault.endswith(f"change it to {order}") for order in valid), fault
            suggested += 1
        else:
            assert "list larger regions first" in fault
    assert suggested
