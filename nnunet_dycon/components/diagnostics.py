"""Diagnostics: names of the curves of a training, foreground of pseudo-labels, agreement of predictions."""

from collections.abc import Iterable

import torch

# The names of curves that are no terms of a loss. Pictures and log lines group the curves by them.
SCHEDULES = ("ramp", "beta")
FRACTIONS = ("pseudo_foreground", "ignored_patches", "kept_fraction")
AGREEMENTS = {
    "student_teacher_dice": "Dice of student and teacher",
    "students_dice": "Dice of both students",
    "views_dice": "Dice of strong and weak view",
}
AGREEMENT = "student_teacher_dice"
SECONDS = "seconds_"  # followed by a part of the step


@torch.no_grad()
def pseudo_label_diagnostics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    where: torch.Tensor | None = None,
    agreement: str = AGREEMENT,
) -> dict[str, torch.Tensor]:
    """How much foreground the teacher labels, and how far the student agrees.

    Args:
        student: (B, *spatial), the student's label maps of unlabeled images.
        teacher: (B, *spatial), the teacher's, the second student's, or of the weak view.
        where: (B, *spatial), True where both show an unlabeled image; None for everywhere.
        agreement: one of `AGREEMENTS`.

    Returns:
        "pseudo_foreground", the share of voxels that the teacher labels as foreground, and under the name of the
        agreement the Dice of both label maps pooled over foreground classes and batch; NaN if both are empty.
    """
    voxels: int | torch.Tensor = teacher.numel()
    if where is not None:
        student, teacher, voxels = student * where, teacher * where, where.sum()
    is_foreground = teacher > 0
    agreed = ((student == teacher) & is_foreground).sum()
    foreground = is_foreground.sum()
    return {"pseudo_foreground": foreground / voxels, agreement: 2 * agreed / (foreground + (student > 0).sum())}


@torch.no_grad()
def pseudo_region_diagnostics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    where: torch.Tensor | None = None,
    agreement: str = AGREEMENT,
) -> dict[str, torch.Tensor]:
    """The same of regions: where the teacher labels any of them, and the mean of their Dice.

    Args:
        student: (B, R, *spatial), boolean.
        teacher: (B, R, *spatial), boolean.
        where: (B, *spatial), as in `pseudo_label_diagnostics`.
        agreement: as in `pseudo_label_diagnostics`.

    Returns:
        As `pseudo_label_diagnostics`. Regions that are empty in both do not count.
    """
    voxels: int | torch.Tensor = teacher[:, 0].numel()
    if where is not None:
        student, teacher, voxels = student & where[:, None], teacher & where[:, None], where.sum()
    axes = (0, *range(2, teacher.ndim))
    dice = 2 * (student & teacher).sum(axes) / (student.sum(axes) + teacher.sum(axes))
    return {"pseudo_foreground": teacher.any(1).sum() / voxels, agreement: dice.nanmean()}


def terms_of_loss(names: Iterable[str]) -> list[str]:
    """Those names of curves that are terms of the loss."""
    others = {"loss", *SCHEDULES, *FRACTIONS, *AGREEMENTS}
    return [name for name in names if name not in others and not name.startswith(SECONDS)]
