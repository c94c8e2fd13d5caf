"""Batches of a training step and outputs of a network. Unlabeled batches have no field for labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Targets = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True)
class LabeledBatch:
    """Batch of patches of labeled cases.

    Attributes:
        weak: (B, C, *spatial), with spatial and mirror augmentation only.
        strong: (B, C, *spatial), the same patches, voxel by voxel, with nnU-Net's intensity augmentation as well.
        targets: (B, T, *spatial), nnU-Net's targets: a label map (T = 1), or a channel for each region and one more for
            ignored voxels (see `LabelSpace`). With deep supervision a list, highest resolution first.
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
        """Target at full resolution, (B, T, *spatial)."""
        return self.targets[0] if isinstance(self.targets, list) else self.targets


@dataclass(frozen=True)
class UnlabeledBatch:
    """Batch of patches of unlabeled cases: two views, no target.

    Attributes:
        weak: (B, C, *spatial), with spatial and mirror augmentation only.
        strong: (B, C, *spatial), the same patches, voxel by voxel, with nnU-Net's intensity augmentation as well.
        keys: the B case identifiers.
    """

    weak: torch.Tensor
    strong: torch.Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.strong)


@dataclass(frozen=True)
class StudentOutput:
    """Output of a network for a batch of images.

    Attributes:
        logits: (B, K, *spatial) each, highest resolution first; more than one with deep supervision.
        features: (B, F, *grid) of the tapped encoder stage, or None if no stage is tapped.
        queries: (B, K, *spatial) each, the query distribution of a mask transformer as logits, at the resolutions of
            ``logits``; empty for other networks.
    """

    logits: list[torch.Tensor]
    features: torch.Tensor | None = None
    queries: Sequence[torch.Tensor] = ()

    @classmethod
    def of(
        cls, returned: torch.Tensor | Sequence[torch.Tensor], features: torch.Tensor | None = None
    ) -> "StudentOutput":
        """Build the output from the return value of a network: logits, or with deep supervision a list of them."""
        return cls([returned] if isinstance(returned, torch.Tensor) else list(returned), features)

    def __getitem__(self, samples: slice) -> "StudentOutput":
        """Return the output for a slice of the samples of the batch."""
        return StudentOutput(
            [level[samples] for level in self.logits],
            None if self.features is None else self.features[samples],
            [level[samples] for level in self.queries],
        )
