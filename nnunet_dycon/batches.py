"""What goes into a method's step and what a network gives back. Unlabeled batches have no place for a label."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Targets = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True)
class LabeledBatch:
    """Patches of labeled cases.

    Attributes:
        weak: (B, C, *spatial), with spatial and mirror augmentation only.
        strong: (B, C, *spatial), the same patches, voxel by voxel, with nnU-Net's intensity augmentation as well.
        targets: (B, T, *spatial), as nnU-Net gives them: a label map, T = 1, or a channel for each region, and one more
            for what is ignored (`nnunet_dycon.label_kinds`). With deep supervision a list, highest resolution first.
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
        """(B, T, *spatial), the target at full resolution."""
        return self.targets[0] if isinstance(self.targets, list) else self.targets


@dataclass(frozen=True)
class UnlabeledBatch:
    """Patches of unlabeled cases: two views, and no target.

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
    """What a network says about a batch of images.

    Attributes:
        logits: (B, K, *spatial) each, highest resolution first; more than one with deep supervision.
        features: (B, F, *grid) of the tapped encoder stage, or None where no stage is tapped.
        queries: (B, K, *spatial) each, as logits: the query distribution of a mask transformer at the resolutions of
            the logits; empty for other networks.
    """

    logits: list[torch.Tensor]
    features: torch.Tensor | None = None
    queries: Sequence[torch.Tensor] = ()

    @classmethod
    def of(
        cls, returned: torch.Tensor | Sequence[torch.Tensor], features: torch.Tensor | None = None
    ) -> "StudentOutput":
        """Of what a network returns: the logits, or with deep supervision a list of them."""
        return cls([returned] if isinstance(returned, torch.Tensor) else list(returned), features)

    def __getitem__(self, samples: slice) -> "StudentOutput":
        """The same for some samples of the batch."""
        return StudentOutput(
            [level[samples] for level in self.logits],
            None if self.features is None else self.features[samples],
            [level[samples] for level in self.queries],
        )
