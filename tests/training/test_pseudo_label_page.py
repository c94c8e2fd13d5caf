"""Tests of the page of pseudo-labels."""

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_dycon.training import pseudo_label_page
from nnunet_dycon.training.pseudo_label_page import label_names


@pytest.mark.parametrize(
    ("labels", "has_regions", "names"),
    [
        ({"b": 2, "background": 0, "a": 1, "ignore": 3}, False, ["background", "a", "b"]),
        ({"b": [2], "background": 0, "a": [1]}, False, ["background", "a", "b"]),
        ({"all": [1, 2], "inner": 2, "background": 0, "ignore": 3}, True, ["background", "all", "inner"]),
        ({"background": 0, "first": [2, 3], "second": [1, 2]}, True, ["background", "first", "second"]),
    ],
)
def test_label_names_are_in_the_order_of_the_drawn_values(labels, has_regions, names):
    dataset_json = {"labels": labels, "regions_class_order": [1, 2]}
    manager = LabelManager(labels, [1, 2] if has_regions else None)
    assert manager.has_regions == has_regions
    assert label_names(dataset_json, manager) == names
    assert len(names) == manager.num_segmentation_heads + has_regions


@pytest.fixture
def trainer(tmp_path) -> SimpleNamespace:
    """A stand-in for a trainer at the end of epoch 49."""
    lines: list[str] = []
    return SimpleNamespace(
        current_epoch=50,
        output_folder=tmp_path,
        disable_checkpointing=False,
        lines=lines,
        print_to_log_file=lines.append,
    )


@pytest.mark.parametrize(("labeler", "disabled"), [("teacher", False), (None, False), ("teacher", True)])
def test_page_is_drawn_only_with_a_labeler_and_enabled_checkpoints(trainer, tmp_path, monkeypatch, labeler, disabled):
    drawn = []
    monkeypatch.setattr(pseudo_label_page, "draw_page", lambda *arguments: drawn.append(arguments[2:]))
    trainer.disable_checkpointing = disabled
    datasets = SimpleNamespace()
    pseudo_label_page.draw(trainer, SimpleNamespace(labeler=labeler), datasets)
    if labeler is None or disabled:
        assert not drawn
    else:
        ((cases, epoch, file),) = drawn
        assert cases is datasets
        assert (epoch, file) == (49, tmp_path / "pseudo_labels_epoch_0049.png")
    assert not trainer.lines


def test_failed_page_logs_a_warning(trainer, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(pseudo_label_page, "draw_page", fail)
    pseudo_label_page.draw(trainer, SimpleNamespace(labeler="teacher"), SimpleNamespace())
    assert trainer.lines == ["WARNING: pseudo_labels_epoch_0049.png could not be drawn: no memory left"]
