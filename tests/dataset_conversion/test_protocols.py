"""Tests of published splits: counts, disjointness, names in the registry, and inclusion in the wheel."""

import json
import zipfile
from pathlib import Path

import pytest

import nnunet_dycon.dataset_conversion
from nnunet_dycon.dataset_conversion.protocols import Protocol, published, published_names
from nnunet_dycon.dataset_conversion.roles import Case, assign_by_protocol
from nnunet_dycon.registry import CONVERTERS

PROTOCOLS = [(name, protocol) for name in CONVERTERS for protocol in published_names(name)]
COUNTS = {
    "la_uamt": (80, 0, 20),
    "isles22_dycon": (200, 25, 25),
    "isles22_dycon_fold1": (200, 25, 25),
    "isles22_dycon_fold2": (200, 25, 25),
    "brats19_ssl4mis": (250, 25, 60),
    "pancreas_ct_dycon": (62, 0, 20),
    "pancreas_ct_dycon_fold1": (62, 0, 20),
    "pancreas_ct_dycon_fold2": (61, 0, 21),
    "pancreas_ct_dycon_fold3": (61, 0, 21),
    "pancreas_ct_mcnet": (62, 0, 20),
}
SPLITS = Path(__file__).parents[2].parent / "shared" / "splits"


def names():
    return [f"{converter}_{protocol}" for converter, protocol in PROTOCOLS]


def test_registry_names_all_published_splits():
    folder = Path(nnunet_dycon.dataset_conversion.__file__).parent / "published_splits"
    assert sorted(file.stem for file in folder.glob("*.json")) == sorted(names())


@pytest.mark.parametrize(("converter", "name"), PROTOCOLS)
def test_lists_are_complete_and_disjoint(converter, name):
    protocol = published(converter, name)
    assert (len(protocol.train), len(protocol.val), len(protocol.test)) == COUNTS[f"{converter}_{name}"]
    assert len(set(protocol.identifiers)) == len(protocol.identifiers)
    assert protocol.published_labeled
    assert protocol.faults
    assert protocol.source


LISTS = [
    ("la", "uamt", ("LA_train.list", None, "LA_test.list")),
    ("isles22", "dycon", ("ISLES2022_train.list", "ISLES2022_val.list", "ISLES2022_test.list")),
    ("brats19", "ssl4mis", ("BraTS2019_train.txt", "BraTS2019_val.txt", "BraTS2019_test.txt")),
    ("pancreas_ct", "dycon", ("Pancreas_train.list", None, "Pancreas_test.list")),
    ("pancreas_ct", "dycon_fold3", ("Pancreas_train3.list", None, "Pancreas_test3.list")),
    ("pancreas_ct", "mcnet", ("MCNet_Pancreas_train.list", None, "MCNet_Pancreas_test.list")),
]


@pytest.mark.parametrize(("converter", "name", "files"), [row for row in LISTS if row[0] in CONVERTERS])
@pytest.mark.skipif(not SPLITS.is_dir(), reason="the published lists next to the repository are missing")
def test_lists_equal_the_published_lists_in_order(converter, name, files):
    protocol = published(converter, name)
    for list_name, ours in zip(files, (protocol.train, protocol.val, protocol.test)):
        lines = (SPLITS / list_name).read_text().split() if list_name else []
        theirs = [line.removesuffix(".h5").replace("image", "PANCREAS_") for line in lines]
        assert list(ours) == theirs


def test_wheel_contains_the_lists(wheel):
    shipped = {Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if "published_splits/" in name}
    assert shipped == set(names())
    archive = zipfile.ZipFile(wheel)
    content = json.loads(archive.read("nnunet_dycon/dataset_conversion/published_splits/la_uamt.json"))
    assert len(content["train"]) == 80


def test_missing_cases_are_reported_and_cases_without_label_are_left_out():
    protocol = Protocol("p", "us", (2,), (), train=tuple("abcd"), val=("e", "f"), test=("g", "h", "i"))
    cases = [Case(name, (Path(name),), None if name in "bh" else Path(name)) for name in "xcbagfeh"]
    assignment = assign_by_protocol(cases, protocol, 2, {"e": "empty", "a": "empty"}, {"i": "a copy"})
    roles = {role: "".join(assignment.identifiers(role)) for role in assignment.cases}
    assert roles == {"labeled": "ac", "unlabeled": "b", "val": "f", "test": "g"}
    assert assignment.left_out == {"x": "in no list of protocol p", "e": "empty", "h": "test case without a label"}
    assert assignment.warnings == (
        "1 of the 9 cases of protocol p is absent: d",
        "1 training case has no label and is unlabeled: b",
    )
