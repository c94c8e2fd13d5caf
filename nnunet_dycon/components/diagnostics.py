"""Diagnostics of pseudo-labels, and the names of the logged training curves.

The diagnostics are the foreground fraction of pseudo-labels and their Dice with the student's predictions.
"""

from collections.abc import Iterable

import torch

# Names of curves that are not terms of the loss. Plots and log lines group the curves by these names.
SCHEDULES = ("ramp", "beta")
FRACTIONS = ("pseudo_foreground", "ignored_patches", "kept_fraction")
AGREEMENTS = {
    "student_teacher_dice": "Dice of student and teacher",
    "students_dice": "Dice of both students",
    "views_dice": "Dice of strong and weak view",
}
AGREEMENT = "student_teacher_dice"
SECONDS = "seconds_"  # prefix; followed by the name of a part of the step


@torch.no_grad()
def pseudo_label_diagnostics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    where: torch.Tensor | None = None,
    agreement: str = AGREEMENT,
) -> dict[str, torch.Tensor]:
    """Return the foreground fraction of pseudo-labels and their Dice with the student's label maps.

    Args:
        student: (B, *spatial), the student's label maps of unlabeled images.
        teacher: (B, *spatial), the pseudo-labels: label maps that are predicted by the teacher, by the other network
            (in co-training), or by the student itself for the weakly augmented view.
        where: (B, *spatial), boolean, True for the voxels to use, such as the voxels from unlabeled images in a mixed
            batch; None for all voxels.
        agreement: the key of the Dice in the returned dict. It names the compared predictions: "student_teacher_dice",
            "students_dice" (both networks in co-training) or "views_dice" (strong and weak view).

    Returns:
        A dict with two entries. "pseudo_foreground" is the fraction of voxels whose pseudo-label is foreground.
        ``agreement`` is the micro-averaged Dice: all foreground classes and images are counted together. It is NaN if
        neither the pseudo-labels nor the student's label maps contain foreground.
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
    """Return the foreground fraction of region pseudo-labels and their Dice with the student's regions.

    Args:
        student: (B, R, *spatial), boolean, the student's regions in unlabeled images.
        teacher: (B, R, *spatial), boolean, the pseudo-labels.
        where: (B, *spatial), boolean, True for the voxels to use; None for all voxels.
        agreement: the key of the Dice in the returned dict, see `pseudo_label_diagnostics`.

    Returns:
        A dict with two entries. "pseudo_foreground" is the fraction of voxels that are in at least one region of the
        pseudo-labels. ``agreement`` is the mean Dice over the regions; the Dice of a region is computed over all images
        together. A region that is empty in both ``student`` and ``teacher`` is left out of the mean. If all regions are
        left out, the mean is NaN.
    """
    voxels: int | torch.Tensor = teacher[:, 0].numel()
    if where is not None:
        student, teacher, voxels = student & where[:, None], teacher & where[:, None], where.sum()
    axes = (0, *range(2, teacher.ndim))
    dice = 2 * (student & teacher).sum(axes) / (student.sum(axes) + teacher.sum(axes))
    return {"pseudo_foreground": teacher.any(1).sum() / voxels, agreement: dice.nanmean()}


def terms_of_loss(names: Iterable[str]) -> list[str]:
    """Select the names of loss terms, such as "supervised", from the names of logged curves; the order is kept.

    The other curves have a fixed name or prefix, defined in this module: the total loss ("loss"), schedules,
    diagnostics and computing times.
    """
    others = {"loss", *SCHEDULES, *FRACTIONS, *AGREEMENTS}
    return [name for name in names if name not in others and not name.startswith(SECONDS)]
