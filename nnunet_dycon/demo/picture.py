"""The picture of the demo: held-out cases with the predictions of both trainings."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.special import entr

from nnunet_dycon.system.pictures import in_default_style, new_figure, outline, overlay, save

_REFERENCE, _LOWER, _OURS = "#1faa59", "#1c7ed6", "#e8590c"  # colors
DPI = 90
_TITLES = {
    "image": "black",
    "reference": _REFERENCE,
    "nnU-Net, labeled only": _LOWER,
    "with unlabeled cases": _OURS,
    "uncertainty": "black",
}


@dataclass(frozen=True)
class Example:
    """A case of the test set with the predictions of both trainings, to be drawn as one row of the picture.

    In label maps, 1 is lesion.

    Attributes:
        name: the name of the case.
        image: the intensities (Z, Y, X).
        reference: the reference label map (Z, Y, X).
        predictions: the label maps (Z, Y, X) predicted by the lower bound and by the recommended trainer.
        dice: the Dice of both label maps.
        entropy: the entropy of the class probabilities of the recommended trainer per voxel (Z, Y, X), in nats.
    """

    name: str
    image: np.ndarray
    reference: np.ndarray
    predictions: tuple[np.ndarray, np.ndarray]
    dice: tuple[float, float]
    entropy: np.ndarray


def read_examples(raw: Path, lower: Path, ours: Path, scores: Path, limit: int) -> list[Example]:
    """Return the first held-out cases with their images, reference and predicted label maps, and scores.

    Args:
        raw: nnUNet_raw/DatasetXXX_Name.
        lower: folder with the predictions of the lower bound.
        ours: folder with the predictions of the recommended trainer, and their class probabilities.
        scores: comparison.csv from `nnunet_dycon compare`, where the names of the folders are those of the methods.
        limit: the largest number of cases to return.
    """

    def read(file: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))

    with scores.open(encoding="utf-8", newline="") as table:
        dice = {(row["method"], row["case"]): float(row["dice"]) for row in csv.DictReader(table)}
    examples = []
    for name in [case for method, case in dice if method == ours.name][:limit]:
        with np.load(ours / f"{name}.npz") as archive:
            entropy = entr(archive["probabilities"].astype(float)).sum(0)  # nnU-Net saves (K, Z, Y, X)
        reference, *predictions = (read(folder / f"{name}.nii.gz") for folder in (raw / "labelsTs", lower, ours))
        image = read(raw / "imagesTs" / f"{name}_0000.nii.gz")
        of_both = dice[lower.name, name], dice[ours.name, name]
        examples.append(Example(name, image, reference, (predictions[0], predictions[1]), of_both, entropy))
    return examples


@in_default_style
def draw(examples: Sequence[Example], file: Path) -> None:
    """Write a picture with one row per case, in the slice along z in which the reference has the most lesion voxels.

    The columns are the image, the reference, both predictions with their Dice in the whole case, and the entropy of the
    prediction of the recommended trainer. The outline of the reference is drawn in the last three columns.

    Args:
        examples: the cases to draw, one per row.
        file: PNG file to write.
    """
    figure = new_figure(11.6, 0.4 + 1.95 * len(examples), dpi=DPI)
    rows = figure.subplots(len(examples), len(_TITLES), squeeze=False)
    for axes, (title, color) in zip(rows[0], _TITLES.items()):
        axes.set_title(title, color=color, fontsize=11, fontweight="bold")
    for row, example in zip(rows, examples):
        z = int(example.reference.sum((1, 2)).argmax())
        reference = example.reference[z] > 0
        darkest, brightest = np.percentile(example.image, (0.5, 99.8))
        for axes in row[:4]:
            axes.imshow(example.image[z], cmap="gray", vmin=darkest, vmax=brightest, interpolation="bilinear")
        overlay(row[1], reference, _REFERENCE)
        for axes, prediction, color, dice in zip(row[2:4], example.predictions, (_LOWER, _OURS), example.dice):
            overlay(axes, prediction[z] > 0, color)
            axes.set_xlabel(f"Dice {dice:.2f}", color=color, fontsize=11, fontweight="bold", labelpad=3)
        heat = row[4].imshow(
            example.entropy[z], cmap="magma", vmin=0, vmax=np.log(2), interpolation="bilinear"
        )  # of two classes
        for axes in row[2:]:
            outline(axes, reference, _REFERENCE)
        row[0].set_ylabel(f"{example.name}\nslice {z}", fontsize=10)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    figure.colorbar(heat, ax=rows[:, 4], label="entropy [nats], at most ln 2", shrink=0.8)
    save(figure, file)
