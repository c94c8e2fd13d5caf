"""The EMA teacher: the exponential moving average of a student's weights."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nnunet_dycon.batches import StudentOutput
from nnunet_dycon.features import FeatureStage, FeatureTap, ProjectionHead

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif (compiled := module._modules.get("_orig_mod")) is not None:
            module = compiled
        else:
            return module


class EMATeacher(nn.Module):
    r"""Averages a student network, and its projection head if there is one.

    .. math:: \theta^t_{n} = \alpha_n \theta^t_{n-1} + (1 - \alpha_n)\,\theta^s_n,
        \qquad \alpha_n = \min\left(1 - \frac{1}{n + 1}, \alpha\right)

    for the n-th update, n = 0, 1, ...: the first update copies the student, and the average is a plain mean until the
    decay α is reached (Mean Teacher, arXiv:1703.01780; as in the released DyCON). Buffers are copied, not averaged.

    The averaging is torch's `AveragedModel`. Its counter stays on the CPU, where it is read at each update, so a
    teacher must not be moved: build it from modules that are already on their device.

    Args:
        network: the student; may be wrapped by DDP or torch.compile. Hooks on it are copied: tap it afterwards.
        head: the student's projection head, or None.
        stage: where to tap the features that the head embeds; needed with a head.
        decay: α.
    """

    def __init__(
        self,
        network: nn.Module,
        head: ProjectionHead | None = None,
        stage: FeatureStage | None = None,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        # In a tuple, so that the student does not become a part of the teacher.
        self._students = (network,) if head is None else (network, head)
        self._decay = decay
        self._average: Any = AveragedModel(self._student(), multi_avg_fn=self._lerp_with_warmup, use_buffers=False)
        self._average.requires_grad_(False)
        self._tap = None if head is None or stage is None else FeatureTap(self.network, stage, always=True)
        self.eval()

    @property
    def network(self) -> nn.Module:
        """The teacher's network."""
        return self._average.module[0]

    @property
    def updates(self) -> int:
        """How often the teacher was updated."""
        return int(self._average.n_averaged)

    def _student(self) -> nn.ModuleList:
        return nn.ModuleList(unwrap(module) for module in self._students)

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in eval mode, whatever is asked for: a teacher uses no dropout and no batch statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> StudentOutput:
        """Logits at full resolution only, and features where a head was given; without gradient."""
        logits = self.network(images)
        highest = logits[0] if isinstance(logits, (list, tuple)) else logits
        return StudentOutput([highest], None if self._tap is None else self._tap.take())

    @torch.no_grad()
    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """The averaged head's embedding of features."""
        return self._average.module[1](features)

    def _lerp_with_warmup(self, averages: Tensors, students: Tensors, updates: torch.Tensor | int) -> None:
        # AveragedModel passes its counter moved to the device; reading it there would wait for the device.
        weight = 1 - min(1 - 1 / (self.updates + 1), self._decay)
        torch._foreach_lerp_(averages, students, weight)

    def update(self) -> None:
        """Average in the student as it is now: once after each step of its optimizer."""
        self._average.update_parameters(self._student())

    def synchronize(self) -> None:
        """Become equal to the student, with nothing averaged yet."""
        self._average.n_averaged.zero_()
        self.update()
        self._average.n_averaged.zero_()
