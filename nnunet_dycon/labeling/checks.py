"""Checks of the images of a case and of a label map for them, before a command moves or copies them."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from nnunet_dycon.data.image_checks import check_file
from nnunet_dycon.data.image_reading import Grid, Reader, grid_difference, read_voxels
from nnunet_dycon.errors import UserError, explained, some
from nnunet_dycon.system.label_maps import rounded


def check_images(images: Sequence[Path], reader: Reader) -> Grid:
    """Check that all images of a case are readable, and return the voxel grid of the first one.

    nnU-Net predicts on this grid; the grids of the other channels may differ slightly.

    Args:
        images: image files of the case, one per channel.
        reader: nnU-Net's reader of the images.

    Raises:
        UserError: an image is damaged, is 2D, or has several channels in one file.
    """
    grids = []
    for file in images:
        with explained(Exception, f"{file} cannot be read; repair or remove it"):  # the type depends on the reader
            check_file(file)
            grid = read_voxels(file, reader)[1]
        if grid.is_2d or grid.channels != 1:
            raise UserError(f"{file} is not a 3D image with one channel per file; convert the data set")
        grids.append(grid)
    return grids[0]


def read_label_map(file: Path, image: Grid, reader: Reader, values: Collection[int], remedy: str) -> np.ndarray:
    """Return the voxels of a label map (Z, Y, X), as whole numbers.

    Args:
        file: the label map.
        image: voxel grid that it must have.
        reader: nnU-Net's reader.
        values: label values that it may have.
        remedy: what to do if it has a fault, for the error message.

    Raises:
        UserError: the file is damaged, or has several channels, another voxel grid or other values.
    """
    with explained(Exception, f"{file} cannot be read; {remedy}"):  # the type depends on the reader
        check_file(file)
        voxels, grid = read_voxels(file, reader, is_label_map=True)
    if grid.channels != 1:
        raise UserError(f"{file} has {grid.channels} channels instead of 1; {remedy}")
    if (difference := grid_difference(grid, image)) is not None:
        raise UserError(f"{file} has another voxel grid than its image: {difference}; {remedy}")
    voxels = rounded(voxels[0])
    if unknown := sorted(set(np.unique(voxels).tolist()) - set(values)):
        shown = some([f"{value:g}" for value in unknown])
        raise UserError(f"{file} has values that dataset.json does not name: {shown}; {remedy}")
    return voxels
