"""Focal entropy-aware contrastive loss (FeCL) in blocks of anchors, without a matrix of all pairs of patches.

The forward pass also computes the gradient.
"""

from collections.abc import Iterator

import torch

from nnunet_dycon.losses.kernels.gradients import KeptGradient

# Entries of a block of the similarity matrix (anchors × N patches): 2^20 are 4 MiB in float32.
_BLOCK_ENTRIES = {"cpu": 2**20, "cuda": 2**22}


def blocks_of_anchors(embedding: torch.Tensor) -> Iterator[slice]:
    """Yield slices that divide the N patches of an embedding (B, N, D) into blocks of anchors.

    The losses compare the R patches of a block, the anchors, with all N patches of their image. R depends on B and N,
    to limit the memory of the similarities, (B, R, N).
    """
    batch, patches, _ = embedding.shape
    entries = _BLOCK_ENTRIES.get(embedding.device.type, 2**20)
    rows = max(16, entries // (batch * patches) // 16 * 16)  # a multiple of 16 suits matrix units
    for first in range(0, patches, rows):
        yield slice(first, min(first + rows, patches))


class FeCL(KeptGradient):
    """Autograd function of `fecl_loss` for L2-normalised embeddings, with a hand-written gradient.

    The arguments of ``apply`` are the student's embeddings (B, N, D), the teacher's embeddings of the same shape or
    None, the labels (B, N), a boolean mask (B, N) that is False for ignored patches, exp(H) (B, N) with the entropy H
    of each patch, and the tuple (temperature, gamma, top_k).
    """

    @staticmethod
    def forward(ctx, student, teacher, patch_labels, participates, entropy_weight, constants):
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total, anchors = student.new_zeros(()), student.new_zeros(())
        for rows in blocks_of_anchors(student):
            block = _Block(rows, student, teacher, patch_labels, participates, entropy_weight, *constants)
            total += block.loss()
            anchors += block.valid.sum()
            if gradient is not None:
                block.add_gradient(gradient)
        anchors = anchors.clamp(min=1)
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(anchors))
        return total / anchors


class _Block:
    """Loss and gradient of `fecl_loss` for a block of R anchors of each image.

    The terms of the loss are tensors (B, R, N), for the pairs of an anchor and a patch of its image.

    Args:
        block: the slice of the R anchors among the N patches.
        student: (B, N, D), the student's L2-normalised embeddings.
        teacher: (B, N, D), the teacher's L2-normalised embeddings, or None.
        patch_labels: (B, N), the class of each patch.
        participates: (B, N), boolean, False for ignored patches.
        entropy_weight: (B, N), exp(H) with the entropy H of each patch.
        temperature: the temperature τ.
        gamma: the exponent γ of the focal weights.
        top_k: the number of hard negatives of each anchor.
    """

    def __init__(self, block, student, teacher, patch_labels, participates, entropy_weight, temperature, gamma, top_k):
        self.block, self.student, self.teacher = block, student, teacher
        self.temperature, self.gamma = temperature, gamma
        both = participates[:, block, None] & participates[:, None, :]
        same = patch_labels[:, block, None] == patch_labels[:, None, :]
        self.negative = both & ~same
        self.positive = both & same
        columns = torch.arange(student.shape[1], device=student.device)
        self.positive &= columns[block, None] != columns  # an anchor is not its own positive
        positives = self.positive.sum(-1, keepdim=True)
        self.valid = (positives > 0) & self.negative.any(-1, keepdim=True)
        self.share = self.valid.to(student.dtype) / positives.clamp(min=1)  # of a positive in its anchor's mean

        self.cosine = student[:, block] @ student.transpose(1, 2)
        # |S| ≤ 1/τ, so subtracting 1/τ prevents an overflow without searching for the maximum of each row.
        self.similarity = (self.cosine - 1.0) / temperature
        self.exponential = self.similarity.exp()
        clamped = self.cosine.clamp(0.0, 1.0)
        self.entropy_weight = entropy_weight[:, block, None]
        self.positive_weight = _power(1.0 - clamped, gamma) * self.entropy_weight
        self.negative_weight = torch.where(self.negative, _power(clamped, gamma), 0.0)
        self.hard = 0.0
        if teacher is not None:
            self._find_hard_negatives(top_k)
        denominator = torch.where(self.positive, self.exponential, 0.0).sum(-1, keepdim=True)
        denominator += (self.negative_weight * (self.exponential + self.hard)).sum(-1, keepdim=True)
        # Anchors without positives or negatives: any positive denominator avoids log(0).
        self.denominator = torch.where(self.valid, denominator, 1.0)
        self.log_ratio = self.similarity - self.denominator.log()

    def _find_hard_negatives(self, top_k: int) -> None:
        """Compute the hard-negative term h of `fecl_loss`, and set the attributes that loss and gradient require.

        - ``hard``, (B, R, 1): h exp(-1/τ). All exponentials of the block have this factor, which prevents overflows;
        - ``hardest``, (B, R, top_k): the indices of the hard negatives of each anchor;
        - ``hard_parts``, (B, R, top_k): the contribution of each hard negative to ``hard``.
        """
        similar = self.student[:, self.block] @ self.teacher.transpose(1, 2)
        similar.masked_fill_(~self.negative, -torch.inf)
        cosines, self.hardest = similar.topk(min(top_k, similar.shape[-1]), dim=-1)
        # If there are fewer than top_k negatives, the remaining entries are -inf and add 0.
        number = cosines.isfinite().sum(-1, keepdim=True).clamp(min=1)
        self.hard_parts = ((cosines - 1.0) / self.temperature).exp() / number
        self.hard = self.hard_parts.sum(-1, keepdim=True)

    def loss(self) -> torch.Tensor:
        """Return the loss summed over the anchors of the block."""
        per_pair = torch.where(self.positive, self.positive_weight * self.log_ratio, 0.0)
        return -(self.share * per_pair.sum(-1, keepdim=True)).sum()

    def add_gradient(self, gradient: torch.Tensor) -> None:
        r"""Add the gradient of `loss` with respect to the student's embeddings to ``gradient``, (B, N, D), in place.

        The symbols are those of `fecl_loss`; L is the sum over the anchors of the block. In addition, :math:`d_i` is
        the denominator of the fraction, :math:`\dot F` is the derivative of F with respect to the cosine c, and
        :math:`a_i = \frac{1}{|P(i)|\, d_i} \sum_{k \in P(i)} F^+_{ik}`. The derivatives with respect to the cosines
        and the hard-negative term are

        .. math::
            \frac{\partial L}{\partial c_{ik}} &= -\frac{1}{|P(i)|} \left(\frac{F^+_{ik}}{\tau}
                + \dot F^+_{ik} \log\frac{e^{S_{ik}}}{d_i}\right) + a_i \frac{e^{S_{ik}}}{\tau}, \quad k \in P(i) \\
            \frac{\partial L}{\partial c_{iq}} &= a_i \left(\dot F^-_{iq} (e^{S_{iq}} + h_i)
                + F^-_{iq} \frac{e^{S_{iq}}}{\tau}\right), \quad q \in N(i) \\
            \frac{\partial L}{\partial h_i} &= a_i \sum_{q \in N(i)} F^-_{iq}

        The gradient with respect to the embeddings follows from these by the chain rule.
        """
        tau, student = self.temperature, self.student
        summed = torch.where(self.positive, self.positive_weight, 0.0).sum(-1, keepdim=True)
        pull = self.share * summed / self.denominator
        positive = pull * self.exponential / tau - self.share * self.positive_weight / tau
        negative = self.negative_weight * self.exponential / tau
        if self.gamma != 0:
            # The derivative of the clamp is 0 outside [0, 1].
            inside = (self.cosine >= 0.0) & (self.cosine <= 1.0)
            clamped = self.cosine.clamp(0.0, 1.0)
            slope = torch.where(inside, self.gamma * _power(1.0 - clamped, self.gamma - 1.0), 0.0)
            positive += self.share * self.entropy_weight * slope * self.log_ratio
            slope = torch.where(inside, self.gamma * _power(clamped, self.gamma - 1.0), 0.0)
            negative += slope * (self.exponential + self.hard)
        by_cosine = torch.where(self.positive, positive, torch.where(self.negative, pull * negative, 0.0))
        gradient.baddbmm_(by_cosine.transpose(1, 2), student[:, self.block])
        gradient[:, self.block] += by_cosine @ student
        if self.teacher is not None:
            by_hard = pull * self.negative_weight.sum(-1, keepdim=True) * self.hard_parts / tau
            images = torch.arange(len(student), device=student.device)[:, None, None]
            gradient[:, self.block] += (by_hard[..., None] * self.teacher[images, self.hardest]).sum(-2)


def _power(base: torch.Tensor, gamma: float) -> torch.Tensor:
    return torch.ones_like(base) if gamma == 0 else base.pow(gamma)
