"""Label maps as files, and their dataset.json."""

import json
import math

import numpy as np
import SimpleITK as sitk

SPACING = (3.0, 0.5, 0.8)  # Z, Y, X in mm
SHAPE = (6, 12, 10)
DIAGONAL = math.sqrt((6 * 3.0) ** 2 + (12 * 0.5) ** 2 + (10 * 0.8) ** 2)


def save(file, array, spacing=SPACING, origin=(0.0, 0.0, 0.0)):
    """Write an array (Z, Y, X) as a label map; spacing in mm, (Z, Y, X)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array).astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(file))


def declare(folder, labels, **entries):
    """Write a dataset.json with the labels and further entries."""
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **labels}, **entries}))
