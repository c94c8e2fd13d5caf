"""Tests of split files and of copies of one scan, which must not be on different sides of a split."""

import pytest

from nnunet_dycon.dataset_conversion.la import DUPLICATES
from tests.dataset_conversion.la_sources import convert, record, stems

FIRST, SECOND = DUPLICATES


@pytest.mark.parametrize(
    ("order", "count", "labeled", "unlabeled"),
    [
        ([FIRST, SECOND, "Z"], 1, [FIRST], ["Z"]),  # labeled and unlabeled
        ([SECOND, FIRST, "Z"], 1, [FIRST], ["Z"]),  # reverse order: still one labeled case
        ([FIRST, SECOND, "Z"], 2, [FIRST, "Z"], []),  # both labeled: two folds would share a scan
    ],
)
def test_second_duplicate_is_left_out(nrrd_source, target, capsys, order, count, labeled, unlabeled):
    source = nrrd_source(order)
    (source / "train.list").write_text("\n".join(order))
    assert convert(source, "--labeled", count) == 0
    assert (record(target)["labeled"], record(target)["unlabeled"]) == (labeled, unlabeled)
    assert record(target)["left_out"] == [SECOND]
    assert f"case {SECOND} is left out: it is a copy of {FIRST}" in capsys.readouterr().out


def test_second_duplicate_is_left_out_of_test_cases(nrrd_source, target):
    source = nrrd_source([FIRST])
    nrrd_source([SECOND, "T"], folder="Testing Set")
    assert convert(source) == 0
    assert (record(target)["test"], record(target)["left_out"]) == (["T"], [SECOND])


def test_duplicates_on_one_side_are_kept(nrrd_source, target, capsys):
    source = nrrd_source(["A", FIRST, SECOND])
    (source / "train.list").write_text("\n".join(["A", FIRST, SECOND]))
    assert convert(source, "--labeled", 1) == 0
    assert record(target)["unlabeled"] == [FIRST, SECOND]
    assert "copy" not in capsys.readouterr().out


def test_split_file_with_duplicates_on_different_sides_raises(nrrd_source, split_file, raw, capsys):
    split = split_file({"labeled": ["A"], "unlabeled": [SECOND], "test": [FIRST]})
    assert convert(nrrd_source(["A", FIRST, SECOND]), "--split", split) == 1
    error = capsys.readouterr().err
    assert f"{FIRST} (test) and {SECOND} (unlabeled) are copies" in error
    assert f"remove {SECOND} from the lists" in error
    assert not raw.exists()


def test_split_file_with_both_duplicates_labeled_warns(nrrd_source, split_file, target, capsys):
    split = split_file({"labeled": [FIRST, SECOND], "unlabeled": ["A"]})
    assert convert(nrrd_source(["A", FIRST, SECOND]), "--split", split) == 0
    assert record(target)["labeled"] == [FIRST, SECOND]
    assert f"warning: the labeled cases {FIRST} and {SECOND} are copies" in capsys.readouterr().out


def test_split_file_assigns_all_roles(nrrd_source, split_file, target):
    split = split_file({"labeled": ["E"], "unlabeled": ["A"], "val": ["B"], "test": ["C"]})
    assert convert(nrrd_source("ABCDE"), "--split", split) == 0
    folders = {folder: stems(target / folder) for folder in ("imagesTr", "imagesUn", "imagesVal", "imagesTs")}
    assert folders == {"imagesTr": ["E"], "imagesUn": ["A"], "imagesVal": ["B"], "imagesTs": ["C"]}
    assert [stems(target / folder) for folder in ("labelsTr", "labelsVal", "labelsTs")] == [["E"], ["B"], ["C"]]
    assert not (target / "labelsUn").exists()
    assert record(target)["left_out"] == ["D"]
