"""Comparison of unlabeled with labeled cases, to detect wrong spacings, orientations and intensity units."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_dycon.data.image_reading import image_files, in_file_order, read_grid
from nnunet_dycon.errors import counted, explained

_CT = "CTNormalization"
_COMPARED = 10  # number of labeled cases that are compared
_NEAR = 0.01  # of the range between the clip limits; interpolation has blurred values at the limits
# Differences to the labeled cases that cause a warning. Patients and fields of view differ by less.
_MORE_ABOVE, _SPREAD_RATIO = 0.25, 0.1


@dataclass(frozen=True)
class Appearance:
    """Properties of a case that should be similar for labeled and unlabeled cases.

    Attributes:
        spacing: spacing along Z, Y, X in mm, as stored in the file.
        orientation: direction of increasing x, y, z, such as "LPS"; None if the format has none.
        intensities: for each CT channel, the fraction of voxels at nnU-Net's upper clip limit, and the standard
            deviation of the normalized intensities.
    """

    spacing: tuple[float, ...]
    orientation: str | None
    intensities: tuple[tuple[float, float], ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Appearance":
        intensities = tuple((above, spread) for above, spread in content["intensities"])
        return cls(tuple(content["spacing"]), content["orientation"], intensities)


def orientation_of(file: Path, plans: PlansManager) -> str | None:
    """Return the direction of increasing x, y, z in an image file, such as "LPS"; None if the format has none.

    Args:
        file: image file.
        plans: plans of the data set, which name the reader of the file.
    """
    reader = in_file_order(plans.image_reader_writer_class)
    if not issubclass(reader, (SimpleITKIO, NibabelIO)):
        return None
    affine = read_grid(file, reader).affine
    return None if affine is None else "".join(nibabel.orientations.aff2axcodes(affine))


def intensities_of(
    image: np.ndarray, plans: PlansManager, configuration: ConfigurationManager
) -> tuple[tuple[float, float], ...]:
    """Return (fraction of voxels at nnU-Net's upper clip limit, standard deviation of all voxels) for each CT channel.

    Args:
        image: preprocessed image (C, Z, Y, X), with normalized intensities.
        plans: plans of the data set, which define the clip limits.
        configuration: configuration in the plans, which defines the normalization of each channel.
    """
    found = []
    for channel, scheme in enumerate(configuration.normalization_schemes):
        if scheme != _CT:
            continue
        properties = plans.foreground_intensity_properties_per_channel[str(channel)]
        limits = [properties[key] for key in ("percentile_00_5", "percentile_99_5")]
        low, high = ((limit - properties["mean"]) / max(properties["std"], 1e-8) for limit in limits)
        margin, voxels = _NEAR * (high - low), image[channel]
        found.append((float((voxels >= high - margin).mean()), float(voxels.std())))
    return tuple(found)


def compare_with_labeled(
    unlabeled: Mapping[str, Appearance],
    plans: PlansManager,
    configuration: ConfigurationManager,
    preprocessed: Path,
    raw: Path,
    dataset_json: dict,
) -> list[str]:
    """Return warnings about unlabeled cases whose spacing, orientation or CT intensities are probably wrong.

    One warning is returned for each of the following that occurs in at least one unlabeled case:

    - The spacing is exactly 1 mm, but the median spacing of the labeled cases is not within 5 % of 1 mm along the two
      axes with the smallest spacing.
    - No labeled case has the same orientation (one warning per orientation). This is not checked if nnU-Net's reader
      reorients images.
    - The CT intensities vary much less than in each of the first 10 labeled cases.
    - Many more CT voxels are at nnU-Net's upper clip limit than in each of the first 10 labeled cases.

    Args:
        unlabeled: case identifier -> appearance.
        plans: plans of the data set.
        configuration: configuration of the preprocessed cases.
        preprocessed: folder of the preprocessed labeled cases.
        raw: folder imagesTr, which need not exist.
        dataset_json: content of dataset.json.

    Raises:
        UserError: a preprocessed labeled case cannot be read.
    """
    warnings = _spacing_warnings(unlabeled, plans)
    reorients = in_file_order(plans.image_reader_writer_class) is not plans.image_reader_writer_class
    if not reorients and (known := _labeled_orientations(raw, plans, dataset_json)):
        other = {case: its.orientation for case, its in unlabeled.items() if its.orientation not in {*known, None}}
        for orientation in sorted(set(filter(None, other.values()))):
            cases = [case for case, its in other.items() if its == orientation]
            warnings.append(
                counted(cases, f"unlabeled case has its axes in the order {orientation}", "unlabeled cases have their "
                        f"axes in the order {orientation}")
                + f"; labeled cases: {', '.join(sorted(known))}. Patches would be mirrored or turned; reorient them"
            )  # fmt: skip
    if _CT not in configuration.normalization_schemes:
        return warnings
    if labeled := [intensities_of(image, plans, configuration) for image in _labeled_images(preprocessed)]:
        warnings += _intensity_warnings({case: its.intensities for case, its in unlabeled.items()}, labeled)
    return warnings


def _spacing_warnings(unlabeled: Mapping[str, Appearance], plans: PlansManager) -> list[str]:
    usual = plans.original_median_spacing_after_transp
    if np.allclose(sorted(usual)[:2], 1, rtol=0.05):  # of the two axes that exist in 2D, too
        return []
    cases = [
        case for case, its in unlabeled.items() if set(its.spacing[-2:]) == {1.0} and its.spacing[0] in (1.0, 999.0)
    ]
    shown = " x ".join(f"{length:.3g}" for length in usual)
    one = "unlabeled case has a spacing of exactly 1 mm"
    many = "unlabeled cases have a spacing of exactly 1 mm"
    text = f"; labeled cases: {shown} mm. The true spacing is probably missing in their files"
    return [counted(cases, one, many) + text] if cases else []


def _labeled_orientations(raw: Path, plans: PlansManager, dataset_json: dict) -> set[str]:
    """Return the orientations of the labeled images, such as {"LPS"}.

    Reading stops without an error at the first case that cannot be read or has no orientation; the set then contains
    only the orientations found before. Without raw images, it is empty.
    """
    found: set[str] = set()
    with suppress(Exception):  # raw images are not required
        for files in image_files(raw, dataset_json, "labeled").values():
            if (orientation := orientation_of(files[0], plans)) is None:
                break
            found.add(orientation)
    return found


def _labeled_images(folder: Path) -> Iterable[np.ndarray]:
    for file in [file for file in sorted(folder.glob("*.b2nd")) if not file.stem.endswith("_seg")][:_COMPARED]:
        with explained(Exception, f"{file} cannot be read; remove its folder, and run nnUNetv2_preprocess again"):
            image = blosc2.open(str(file), mode="r")[:]
        yield image


def _intensity_warnings(
    unlabeled: Mapping[str, Collection[tuple[float, float]]],
    labeled: Sequence[Sequence[tuple[float, float]]],
) -> list[str]:
    above: dict[str, None] = {}  # in the order of the cases
    uniform: dict[str, None] = {}
    for case, channels in unlabeled.items():
        for channel, (high, spread) in enumerate(channels):
            highs, spreads = zip(*(its[channel] for its in labeled))
            if spread < _SPREAD_RATIO * min(spreads):
                uniform[case] = None
            elif high > max(highs) + _MORE_ABOVE:
                above[case] = None
    remedy = ", unlike in the labeled cases. Their intensities probably have another unit or offset; convert them to HU"
    range_of_labels = "most CT intensities above the range of the labels"
    found = (
        (uniform, "has almost equal CT intensities", "have almost equal CT intensities"),
        (above, f"has {range_of_labels}", f"have {range_of_labels}"),
    )
    return [
        counted(list(cases), f"unlabeled case {one}", f"unlabeled cases {many}") + remedy
        for cases, one, many in found
        if cases
    ]
