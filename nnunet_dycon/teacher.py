"""The EMA teacher: the exponential moving average of a student's weights."""

from copy import deepcopy

import torch
from torch import nn

from nnunet_dycon.batches import StudentOutput
from nnunet_dycon.features import FeatureStage, FeatureTap, ProjectionHead


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of DistributedDataParallel and torch.compile."""
    return _unwrapped(module)[0]


def _unwrapped(module: nn.Module) -> tuple[nn.Module, bool]:
    """The module inside, and whether it is compiled."""
    is_compiled = False
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif (compiled := module._modules.get("_orig_mod")) is not None:
            module, is_compiled = compiled, True
        else:
            return module, is_compiled


class EMATeacher(nn.Module):
    r"""Averages a student network, and its projection head if there is one.

    .. math:: \theta^t_{n} = \alpha_n \theta^t_{n-1} + (1 - \alpha_n)\,\theta^s_n,
        \qquad \alpha_n = \min\left(1 - \frac{1}{n + 1}, \alpha\right)

    for the n-th update, n = 0, 1, ...: the first update copies the student, and the average is a plain mean until the
    decay α is reached (Mean Teacher, arXiv:1703.01780; as in the released DyCON). Buffers are copied, not averaged.

    An update is one fused operation over all weights, and the host does not wait for it: torch's own `AveragedModel`
    copies its counter to the device each time, which does.

    Args:
        network: the student; may be wrapped by DDP or torch.compile. If it is compiled, so is the teacher. Hooks on it
            are copied: tap it afterwards.
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
        student, is_compiled = _unwrapped(network)
        # In tuples, so that neither the student nor what is compiled becomes a part of the teacher.
        self._students = (student,) if head is None else (student, unwrap(head))
        self._averages = nn.ModuleList(map(deepcopy, self._students)).requires_grad_(False)
        self._decay = decay
        self.updates = 0  # how often the teacher was updated
        self._tap = None if head is None or stage is None else FeatureTap(self.network, stage.name, always=True)
        self._forward = (torch.compile(self.network) if is_compiled else self.network,)
        self.eval()

    @property
    def network(self) -> nn.Module:
        """The teacher's network."""
        return self._averages[0]

    def get_extra_state(self) -> torch.Tensor:
        """What torch saves beside the weights; a tensor, as all of a state dict."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """The reverse."""
        self.updates = int(state)

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in eval mode, whatever is asked for: a teacher uses no dropout and no batch statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> StudentOutput:
        """Logits at full resolution only, and features where a head was given; without gradient."""
        logits = StudentOutput.of(self._forward[0](images)).logits
        return StudentOutput(logits[:1], None if self._tap is None else self._tap.take())

    @torch.no_grad()
    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """The averaged head's embedding of features."""
        return self._averages[1](features)

    @torch.no_grad()
    def update(self) -> None:
        """Average in the student as it is now: once after each step of its optimizer."""
        weight = 1 - min(1 - 1 / (self.updates + 1), self._decay)
        for student, average in zip(self._students, self._averages):
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), weight)
            if buffers := list(average.buffers()):
                torch._foreach_copy_(buffers, list(student.buffers()))
        self.updates += 1

    def synchronize(self) -> None:
        """Become equal to the student, with nothing averaged yet."""
        self.updates = 0
        self.update()
        self.updates = 0
