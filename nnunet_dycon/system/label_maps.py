"""Correction of label maps whose values are not exactly integers."""

import numpy as np

_TOLERANCE = 1e-3


def rounded(label_map: np.ndarray) -> np.ndarray:
    """Return a label map in which values within 0.001 of an integer are replaced by this integer.

    Other values are unchanged. Values near an integer occur in files that store values with a scale factor, such as
    scl_slope in NIfTI.
    """
    if label_map.dtype.kind != "f":
        return label_map
    integers = np.rint(label_map)
    return np.where(abs(label_map - integers) <= _TOLERANCE, integers, label_map)
