"""What the probabilities say that nnU-Net saves: of labels that exclude each other, or of regions that overlap."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import entr


class Probabilities(Protocol):
    """How to read probabilities (K, Z, Y, X); what they are of is called labels here, regions or not."""

    def of_labels(self, probabilities: np.ndarray) -> np.ndarray:
        """Those of each label but the background: (L, Z, Y, X)."""

    def found(self, probabilities: np.ndarray) -> np.ndarray:
        """Where each label but the background is predicted: (L, Z, Y, X)."""

    def foreground(self, probabilities: np.ndarray) -> np.ndarray:
        """How probable any label but the background is: (Z, Y, X)."""

    def error(self, probabilities: np.ndarray) -> np.ndarray:
        """How probable it is that what is predicted is wrong: (Z, Y, X)."""

    def entropy(self, probabilities: np.ndarray) -> np.ndarray:
        """In nats: (Z, Y, X)."""

    def segmentation(self, probabilities: np.ndarray) -> np.ndarray:
        """The label map that nnU-Net makes of them: (Z, Y, X)."""

    def fault(self, probabilities: np.ndarray) -> str | None:
        """Why they cannot be such probabilities, or None."""


class Exclusive:
    """Each voxel has one label, the first of which is the background."""

    def of_labels(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities[1:]

    def found(self, probabilities: np.ndarray) -> np.ndarray:
        labels = np.arange(1, len(probabilities)).reshape(-1, *[1] * (probabilities.ndim - 1))
        return probabilities.argmax(0) == labels

    def foreground(self, probabilities: np.ndarray) -> np.ndarray:
        return 1 - probabilities[0]

    def error(self, probabilities: np.ndarray) -> np.ndarray:
        return 1 - probabilities.max(0)

    def entropy(self, probabilities: np.ndarray) -> np.ndarray:
        # Rounding may leave a probability a little above 1, whose term is below 0.
        return entr(probabilities).sum(0).clip(0)

    def segmentation(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.argmax(0)

    def fault(self, probabilities: np.ndarray) -> str | None:
        # Asked in this way, NaN is noticed, too.
        if (abs(probabilities.sum(0, dtype=np.float32) - 1) < 0.01).all():
            return None
        return "do not add up to 1, as they do where labels exclude each other"


@dataclass(frozen=True)
class Overlapping:
    """A voxel may be in several regions, each with a probability of its own. There is no background among them.

    Attributes:
        values: of the regions in a label map, as regions_class_order has them: the last one that a voxel is in counts.
    """

    values: tuple[int, ...]

    def of_labels(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities

    def found(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities > 0.5

    def foreground(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.max(0)

    def error(self, probabilities: np.ndarray) -> np.ndarray:
        return np.minimum(probabilities, 1 - probabilities).mean(0)

    def entropy(self, probabilities: np.ndarray) -> np.ndarray:
        return (entr(probabilities) + entr(1 - probabilities)).mean(0)

    def segmentation(self, probabilities: np.ndarray) -> np.ndarray:
        labels = np.zeros(probabilities.shape[1:], int)
        for inside, value in zip(self.found(probabilities), self.values):
            labels[inside] = value
        return labels

    def fault(self, probabilities: np.ndarray) -> str | None:
        return None if ((probabilities >= 0) & (probabilities <= 1)).all() else "are not all between 0 and 1"
