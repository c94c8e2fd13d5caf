"""Data classes for the batches of a training step and the output of a network.

Unlabeled batches have no field for labels, so no method can use labels of unlabeled cases by mistake.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Targets = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True)
class LabeledBatch:
    """Batch of patches of labeled cases.

    Attributes:
        weak: (B, C, *spatial), the patches with spatial and mirror augmentation only.
        strong: (B, C, *spatial), the same patches with nnU-Net's intensity augmentation in addition. Both views are
            spatially aligned: they have the same spatial and mirror transforms.
        targets: (B, T, *spatial), nnU-Net's targets: a label map (T = 1) for classes; for regions one channel per
            region and, if the data set has an ignore label, a last channel that marks ignored voxels. With deep
            supervision a list with one target per resolution, highest first.
        keys: the B case identifiers.
    """

    weak: torch.Tensor
    strong: torch.Tensor
    targets: Targets
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.strong)

    @property
    def full_resolution(self) -> torch.Tensor:
        """The target at full resolution, (B, T, *spatial), with the T channels that ``targets`` describes."""
        return self.targets[0] if isinstance(self.targets, list) else self.targets


@dataclass(frozen=True)
class UnlabeledBatch:
    """Batch of patches of unlabeled cases: two views of each patch, no target.

    Attributes:
        weak: (B, C, *spatial), the patches with spatial and mirror augmentation only.
        strong: (B, C, *spatial), the same patches with nnU-Net's intensity augmentation in addition. Both views are
            spatially aligned: they have the same spatial and mirror transforms.
        keys: the B case identifiers.
    """

    weak: torch.Tensor
    strong: torch.Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.strong)


@dataclass(frozen=True)
class StudentOutput:
    """Output of a network (student, teacher or second network) for a batch of images.

    Attributes:
        logits: (B, K, *spatial) at each resolution, highest first, for K classes or regions. Without deep supervision,
            the list contains only the highest resolution.
        features: (B, F, *grid), the F feature channels of the network stage on which a `FeatureTap` (a forward hook) is
            registered, on the grid of this stage; None if no hook is registered.
        queries: for a kMaX mask transformer, (B, K, *spatial) at each resolution of ``logits``: for each class, the
            log-probability that the voxel is assigned to a query of this class (see `KMaXOutput`). Empty for other
            networks.
    """

    logits: list[torch.Tensor]
    features: torch.Tensor | None = None
    queries: Sequence[torch.Tensor] = ()

    @classmethod
    def of(
        cls, returned: torch.Tensor | Sequence[torch.Tensor], features: torch.Tensor | None = None
    ) -> "StudentOutput":
        """Convert the return value of a network, with or without deep supervision, to a `StudentOutput`.

        Args:
            returned: the logits or, with deep supervision, a list with the logits at each resolution, highest first.
            features: (B, F, *grid), the output of a network stage, read by a `FeatureTap` (a forward hook); None
                without a `FeatureTap`.
        """
        return cls([returned] if isinstance(returned, torch.Tensor) else list(returned), features)

    def __getitem__(self, samples: slice) -> "StudentOutput":
        """Return the output for a slice of the samples of the batch."""
        return StudentOutput(
            [level[samples] for level in self.logits],
            None if self.features is None else self.features[samples],
            [level[samples] for level in self.queries],
        )
