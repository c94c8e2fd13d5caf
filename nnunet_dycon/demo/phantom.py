"""Phantoms: random 3D images with lesions of very different sizes, and a data set of phantoms in nnU-Net's raw format.

Phantoms imitate no particular organ, but have some difficulties of real scans: lesions differ in size and contrast,
other structures are equally bright, and borders are blurred.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from scipy.ndimage import distance_transform_edt, gaussian_filter

from nnunet_dycon.dataset_conversion.writer import FILE_ENDING, FOLDERS
from nnunet_dycon.system.files import new_folder

SHAPE = (32, 48, 56)
LESION_RADII = (2.0, 8.0)  # voxels


def phantom(
    rng: np.random.Generator,
    shape: tuple[int, int, int] = SHAPE,
    lesion_radii: tuple[float, float] = LESION_RADII,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a random image and the label map of its lesions.

    The image shows an organ in front of a darker background. The organ contains up to 5 lesions, and vessels of similar
    brightness. Outside the organ there are bright lumps that are about as large as lesions. Therefore, neither
    intensity nor shape alone identifies lesions.

    Args:
        rng: the random number generator.
        shape: the shape of the image (Z, Y, X) in voxels.
        lesion_radii: the smallest and the largest lesion radius in voxels. The border is made irregular afterwards, so
            the largest lesions can exceed this radius.

    Returns:
        The image (Z, Y, X), float32 in arbitrary units, and the label map (Z, Y, X), uint8, where 1 is lesion.
    """
    center = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    organ = _blob(rng, shape, center, np.array(shape) * rng.uniform(0.36, 0.44, 3), roughness=0.08)
    lesions = _lesions(rng, organ, lesion_radii)
    vessels = organ & ~lesions & (_noise(rng, shape, 5) ** 2 + _noise(rng, shape, 5) ** 2 < 0.07)
    lumps = _lumps(rng, ~organ, lesion_radii)

    texture = 0.1 * sum(_noise(rng, shape, scale) for scale in (1, 2, 5))
    contrast = rng.uniform(0.8, 1.2)  # of lesions and similar structures; differs between cases
    image = rng.uniform(0.8, 1.2) * organ * (1 + texture) + 0.5 * texture
    for structure, factor in ((lesions, 1.0), (vessels, 1.1), (lumps, 1.8)):
        image += factor * contrast * gaussian_filter(structure.astype(float), 0.7)  # blurred: partial volume
    image *= np.exp(0.15 * _noise(rng, shape, 16))  # bias field
    image += rng.normal(scale=rng.uniform(0.05, 0.15), size=shape)
    return (100 * image).astype(np.float32), lesions.astype(np.uint8)


def write_dataset(
    folder: Path,
    seed: int,
    counts: Mapping[str, int],
    *,
    shape: tuple[int, int, int] = SHAPE,
    lesion_radii: tuple[float, float] = LESION_RADII,
) -> None:
    """Write a data set of phantoms in nnU-Net's raw format.

    The n-th case, counted from 0, is `phantom(default_rng([seed, n]), shape, lesion_radii)`. Labels of unlabeled cases
    are not written.

    Args:
        folder: DatasetXXX_Name, which must not exist or must be empty. After an error, no partly written data set
            remains.
        seed: the seed of the data set.
        counts: number of cases for each of "labeled", "unlabeled", "val" and "test", of which only "labeled" is
            required. Cases are numbered in the order of the keys.
        shape: the shape of each image (Z, Y, X) in voxels.
        lesion_radii: the smallest and the largest lesion radius in voxels, see `phantom`.
    """
    roles = [role for role, count in counts.items() for _ in range(count)]
    with new_folder(folder) as partial:
        for index, role in enumerate(roles):
            image, label = phantom(np.random.default_rng([seed, index]), shape, lesion_radii)
            images, labels = FOLDERS[role]
            _write(image, partial / images / f"phantom_{index:03d}_0000{FILE_ENDING}")
            if labels is not None:
                _write(label, partial / labels / f"phantom_{index:03d}{FILE_ENDING}")
        generate_dataset_json(
            str(partial),
            {"0": "phantom"},
            {"background": 0, "lesion": 1},
            counts["labeled"],
            FILE_ENDING,
            dataset_name="Phantom",
            description=f"random phantoms, seed {seed}",
            license="none needed",
            converted_by="nnunet_dycon demo",
        )


def _write(array: np.ndarray, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file), useCompression=True)  # spacing 1 mm


def _lesions(rng: np.random.Generator, organ: np.ndarray, lesion_radii: tuple[float, float]) -> np.ndarray:
    """Return a mask (Z, Y, X) of up to 5 lesions, with radii drawn uniformly on a logarithmic scale.

    Lesions for which the organ has no space left are omitted.

    Args:
        rng: the random number generator.
        organ: mask (Z, Y, X) of the organ, which contains the lesions.
        lesion_radii: the smallest and the largest radius in voxels.
    """
    lesions = np.zeros_like(organ)
    smallest, largest = np.log(lesion_radii)
    radii = np.exp(rng.uniform(smallest, largest, size=rng.integers(1, 6)))
    for radius in sorted(radii, reverse=True):  # large ones first, while there is space
        free = distance_transform_edt(organ & ~lesions)
        candidates = np.argwhere(free > radius + 2)
        if len(candidates):
            half_axes = radius * rng.uniform(0.8, 1.25, 3)
            lesions |= organ & _blob(rng, organ.shape, rng.choice(candidates), half_axes, roughness=0.15)
    return lesions


def _lumps(rng: np.random.Generator, outside: np.ndarray, lesion_radii: tuple[float, float]) -> np.ndarray:
    """Return a mask (Z, Y, X) of 8 possibly overlapping lumps outside the organ.

    Args:
        rng: the random number generator.
        outside: mask (Z, Y, X) of the voxels outside the organ.
        lesion_radii: the smallest and the largest lesion radius in voxels. The half axes of lumps are drawn uniformly
            from this range and multiplied by 0.6.
    """
    lumps = np.zeros_like(outside)
    for center in rng.choice(np.argwhere(distance_transform_edt(outside) > 3), 8):
        lumps |= _blob(rng, outside.shape, center, rng.uniform(*lesion_radii, 3) * 0.6, roughness=0.15)
    return lumps & outside


def _blob(
    rng: np.random.Generator, shape: tuple[int, ...], center: np.ndarray, radii: np.ndarray, roughness: float
) -> np.ndarray:
    """Return a mask (Z, Y, X) of an ellipsoid with an irregular border.

    Args:
        rng: the random number generator.
        shape: the shape of the mask (Z, Y, X).
        center: center of the ellipsoid (z, y, x) in voxels.
        radii: half axes of the ellipsoid (z, y, x) in voxels.
        roughness: standard deviation of the border's random displacement, as a fraction of the radii.
    """
    offsets = np.moveaxis(np.indices(shape), 0, -1) - center
    distance = np.linalg.norm(offsets / radii, axis=-1)
    return distance + roughness * _noise(rng, shape, max(1.0, np.min(radii) / 2)) < 1


def _noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Return smooth noise (Z, Y, X) with mean 0 and standard deviation 1.

    Args:
        rng: the random number generator.
        shape: (Z, Y, X).
        scale: sigma of the Gaussian filter that smooths the noise, in voxels.
    """
    noise = gaussian_filter(rng.normal(size=shape), scale, mode="wrap")
    return (noise - noise.mean()) / noise.std()
