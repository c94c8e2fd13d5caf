"""Tests of the diagnostics of a training."""

import math

import pytest
import torch

from nnunet_dycon.components.diagnostics import pseudo_label_diagnostics, pseudo_region_diagnostics, terms_of_loss


def label_map(*labels: int) -> torch.Tensor:
    return torch.tensor(labels).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("student", "teacher", "foreground", "dice"),
    [
        ((0, 1, 2, 2), (0, 1, 2, 2), 0.75, 1.0),
        ((0, 1, 2, 1), (0, 1, 2, 2), 0.75, 4 / 6),  # different foreground classes do not agree
        ((0, 0, 0, 0), (0, 0, 1, 1), 0.5, 0.0),
        ((1, 1, 0, 0), (0, 0, 0, 0), 0.0, 0.0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0, math.nan),
    ],
)
def test_foreground_and_agreement_of_pseudo_labels(student, teacher, foreground, dice):
    found = pseudo_label_diagnostics(label_map(*student), label_map(*teacher))
    assert found["pseudo_foreground"].item() == pytest.approx(foreground)
    assert found["student_teacher_dice"].item() == pytest.approx(dice, nan_ok=True)


def test_pseudo_label_diagnostics_use_only_the_voxels_of_the_mask():
    where = label_map(1, 1, 0, 0).bool()
    found = pseudo_label_diagnostics(label_map(1, 0, 1, 1), label_map(1, 0, 0, 1), where)
    assert found["pseudo_foreground"].item() == 0.5
    assert found["student_teacher_dice"].item() == 1.0


def regions(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool).reshape(1, len(rows), -1, 1, 1)


@pytest.mark.parametrize(
    ("student", "teacher", "foreground", "dice"),
    [
        (((1, 1, 0, 0), (1, 0, 0, 0)), ((1, 1, 0, 0), (1, 0, 0, 0)), 0.5, 1.0),
        (((1, 1, 0, 0), (1, 1, 0, 0)), ((1, 1, 1, 0), (1, 0, 0, 0)), 0.75, (4 / 5 + 2 / 3) / 2),
        (((1, 1, 0, 0), (0, 0, 0, 0)), ((0, 1, 0, 0), (0, 0, 0, 0)), 0.25, 2 / 3),  # the second region is empty in both
        (((1, 1, 0, 0), (0, 0, 0, 0)), ((1, 1, 0, 0), (0, 0, 0, 1)), 0.75, 0.5),  # the second region is empty in one
        (((0, 0, 0, 0), (0, 0, 0, 0)), ((0, 0, 0, 0), (0, 0, 0, 0)), 0.0, math.nan),
    ],
)
def test_foreground_and_agreement_of_pseudo_labeled_regions(student, teacher, foreground, dice):
    found = pseudo_region_diagnostics(regions(*student), regions(*teacher))
    assert found["pseudo_foreground"].item() == pytest.approx(foreground)
    assert found["student_teacher_dice"].item() == pytest.approx(dice, nan_ok=True)


def test_pseudo_region_diagnostics_use_only_the_voxels_of_the_mask():
    where = label_map(1, 1, 0, 0).bool()
    student, teacher = regions((1, 0, 1, 1), (0, 0, 1, 1)), regions((1, 0, 0, 1), (0, 0, 0, 1))
    found = pseudo_region_diagnostics(student, teacher, where, "students_dice")
    assert found["pseudo_foreground"].item() == 0.5
    assert found["students_dice"].item() == 1.0


def test_terms_of_the_loss_exclude_diagnostics():
    assert terms_of_loss(["loss", "supervised", "ramp", "x", "seconds_data", "ignored_patches"]) == ["supervised", "x"]
