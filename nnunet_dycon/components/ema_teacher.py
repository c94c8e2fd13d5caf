"""EMA teacher: the exponential moving average of a student's weights."""

from copy import deepcopy

import torch
from torch import nn

from nnunet_dycon.components.batches import StudentOutput
from nnunet_dycon.components.features import FeatureStage, FeatureTap, ProjectionHead
from nnunet_dycon.components.wrappers import compiled, is_compiled, unwrap


class EMATeacher(nn.Module):
    r"""Exponential moving average of a student network and, if given, its projection head.

    .. math:: \theta^t_{n} = \alpha_n \theta^t_{n-1} + (1 - \alpha_n)\,\theta^s_n,
        \qquad \alpha_n = \min\left(1 - \frac{1}{n + 1}, \alpha\right)

    Here θ are the weights of the teacher (t) and the student (s), and n = 0, 1, ... is the number of previous updates.
    The first update copies the student. Until :math:`\alpha_n` reaches the decay α, the teacher is the arithmetic mean
    of the student's weights so far (Mean Teacher, arXiv:1703.01780; as in the released DyCON). Buffers are copied, not
    averaged.

    An update is a fused operation over all weights that does not synchronize host and device. PyTorch's `AveragedModel`
    synchronizes them, because it copies its number of updates to the device.

    Args:
        network: the student; may be wrapped by DDP or torch.compile. If it is compiled, the teacher is compiled, too.
            The teacher is a deep copy, including forward hooks. So register hooks that read the student's features,
            such as `FeatureTap`, only after the teacher is created.
        head: the student's projection head, or None.
        stage: the encoder stage whose features are the input of the head; required with a head.
        decay: α, in [0, 1).

    Raises:
        ValueError: the decay is not in [0, 1).
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
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        # Tuples keep the student and the compiled network from being registered as submodules of the teacher.
        self._students = (unwrap(network),) if head is None else (unwrap(network), unwrap(head))
        self._averages = nn.ModuleList(map(deepcopy, self._students)).requires_grad_(False)
        self._decay = decay
        self.updates = 0  # number of updates so far
        self._tap = None if head is None or stage is None else FeatureTap(self.network, stage.name, always=True)
        self._forward = (compiled(self.network) if is_compiled(network) else self.network,)
        self.eval()

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._averages[0]

    def get_extra_state(self) -> torch.Tensor:
        """Return the number of updates as a tensor, for the state dict."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restore the number of updates from a state dict."""
        self.updates = int(state)

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in eval mode regardless of ``mode``, so that the teacher uses no dropout and no batch statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> StudentOutput:
        """Return the teacher's logits (B, K, *spatial) for images (B, C, *spatial), only at full resolution.

        With a projection head, the output also contains the features (B, F, *grid) that are the input of the head. No
        gradient is computed.
        """
        logits = StudentOutput.of(self._forward[0](images)).logits
        return StudentOutput(logits[:1], None if self._tap is None else self._tap.take())

    @torch.no_grad()
    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of features (B, F, *grid), computed with the averaged `ProjectionHead`.

        The shape of the embeddings is (B, N, D), with N cells of the grid and the embedding dimension D.
        """
        return self._averages[1](features)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the student's current weights; to be called after each optimizer step."""
        weight = 1 - min(1 - 1 / (self.updates + 1), self._decay)
        for student, average in zip(self._students, self._averages):
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), weight)
            if buffers := list(average.buffers()):
                torch._foreach_copy_(buffers, list(student.buffers()))
        self.updates += 1

    def synchronize(self) -> None:
        """Copy the student's weights, and set the number of updates to 0."""
        self.updates = 0
        self.update()
        self.updates = 0
