"""Tests of the supervision of a method, from the loss and the labels of a trainer."""

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_dycon.components.label_space import ClassLabels, RegionLabels
from nnunet_dycon.training.supervision import make_supervision

CLASSES = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
REGIONS = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


def trainer(labels: LabelManager, deep_supervision: bool) -> SimpleNamespace:
    loss = SimpleNamespace(weight_factors=[0.75, 0.25]) if deep_supervision else SimpleNamespace()
    return SimpleNamespace(
        loss=loss,
        enable_deep_supervision=deep_supervision,
        label_manager=labels,
        configuration_manager=SimpleNamespace(batch_dice=True),
    )


@pytest.mark.parametrize(
    ("labels", "label_space"), [(CLASSES, ClassLabels(ignore_label=2)), (REGIONS, RegionLabels(has_ignore_label=False))]
)
def test_label_space_of_classes_and_regions(labels, label_space):
    assert make_supervision(trainer(labels, True)).label_space == label_space


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_loss_is_the_trainers_with_or_without_deep_supervision(deep_supervision):
    owner = trainer(CLASSES, deep_supervision)
    supervision = make_supervision(owner)
    owner.loss = lambda logits, targets: (logits, targets)
    levels, target = [torch.zeros(1), torch.ones(1)], torch.zeros(1)
    logits, _ = supervision.loss(levels, target)
    assert logits is (levels if deep_supervision else levels[0])
