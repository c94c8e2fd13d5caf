"""The page of pseudo-labels."""

from types import SimpleNamespace

import pytest
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
def test_names_are_in_the_order_of_the_values_drawn(labels, has_regions, names):
    dataset_json = {"labels": labels, "regions_class_order": [1, 2]}
    manager = LabelManager(labels, [1, 2] if has_regions else None)
    assert manager.has_regions == has_regions
    assert label_names(dataset_json, manager) == names
    assert len(names) == manager.num_segmentation_heads + has_regions


@pytest.mark.parametrize("labeler", ["teacher", None])
def test_a_page_is_drawn_for_methods_with_a_labeler(tmp_path, monkeypatch, labeler):
    drawn, lines = [], []
    monkeypatch.setattr(
        pseudo_label_page, "draw_page", lambda trainer, method, cases, *rest: drawn.append((cases, rest))
    )
    trainer = SimpleNamespace(current_epoch=50, output_folder=tmp_path, print_to_log_file=lines.append)
    unlabeled = SimpleNamespace(folder=tmp_path, identifiers=lambda: ["b", "a"])
    pseudo_label_page.draw(trainer, SimpleNamespace(labeler=labeler), unlabeled)
    if labeler is None:
        assert not drawn
    else:
        ((cases, rest),) = drawn
        assert cases.identifiers == ["a", "b"]
        assert rest == (49, tmp_path / "pseudo_labels_epoch_0049.png")
    assert not lines
