"""Values of label maps."""

import numpy as np

_TOLERANCE = 1e-3


def rounded(label_map: np.ndarray) -> np.ndarray:
    """Return a label map in which values within 0.001 of an integer, as in rescaled files, are that integer."""
    if label_map.dtype.kind != "f":
        return label_map
    integers = np.rint(label_map)
    return np.where(abs(label_map - integers) <= _TOLERANCE, integers, label_map)
