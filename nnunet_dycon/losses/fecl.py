"""Focal entropy-aware contrastive loss (FeCL) between the patches of an image."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import normalize

from nnunet_dycon.losses.gradients import KeptGradient
from nnunet_dycon.precision import at_least_float32

# exp(-2/τ) is the smallest factor that occurs. At τ = 0.03 it is 1e-29, still a normal float32.
_LOWEST_TEMPERATURE = 0.03
# Entries of a block of the similarity matrix (anchors × N patches): 2^20 are 4 MiB in float32.
_BLOCK_ENTRIES = {"cpu": 2**20, "cuda": 2**22}


@at_least_float32
def fecl_loss(
    embedding: torch.Tensor,
    patch_labels: torch.Tensor,
    *,
    teacher_embedding: torch.Tensor | None = None,
    anchor_entropy: torch.Tensor | None = None,
    temperature: float = 0.6,
    gamma: float = 2.0,
    top_k: int = 5,
    ignore_label: int = -1,
) -> torch.Tensor:
    r"""Return the contrastive loss of DyCON, which attracts patches of one class and repels those of different classes.

    .. math::
        L = \operatorname*{mean}_{i} \frac{1}{|P(i)|} \sum_{k \in P(i)} -F^+_{ik} \log
            \frac{e^{S_{ik}}}{\sum_{k' \in P(i)} e^{S_{ik'}} + \sum_{q \in N(i)} F^-_{iq} \left(e^{S_{iq}} + h_i\right)}

    The positives P(i) of an anchor i are the other patches of its image with the same label, the negatives N(i) those
    with a different label. The mean is over the anchors of the batch that have both. Patches with the ignored label
    are excluded everywhere. With the L2-normalised embeddings z and :math:`c_{ij} = z_i \cdot z_j`:

    - :math:`S_{ij} = c_{ij} / \tau`;
    - :math:`F^+_{ik} = (1 - c^*_{ik})^\gamma e^{H(i)}` and :math:`F^-_{iq} = (c^*_{iq})^\gamma`, with c* the cosine
      clamped to [0, 1] and H(i) the anchor's entropy;
    - :math:`h_i` is the mean of :math:`e^{z_i \cdot z^t_l / \tau}` over the ``top_k`` (or |N(i)|, if fewer) patches l
      of N(i) whose teacher embedding z^t is most similar to the anchor; 0 without a teacher.

    DyCON, Eqs. 3-6 (arXiv:2504.04566). Gradients reach only the student's embeddings, through S, F and h.

    The focal weights reward a collapse: if all embeddings of an image are equal, F⁺ and the loss are 0 whatever the
    classes are, and a projection head reaches this state within tens of steps. With ``gamma=0`` all F⁻ are 1, F⁺ is
    :math:`e^{H(i)}`, and the loss separates the classes.

    Deviations:

    - ``top_k`` and the clamp are our reading; the available version of the paper specifies neither;
    - the released code (commit 69c1384) has one positive at a time in the denominator, no weights F on the negatives,
      and a threshold term instead of h, see `fecl_released_loss`.

    The loss is computed in blocks of anchors, so no N × N matrix is stored. The forward pass also computes the gradient
    and keeps only that, (B, N, D), for the backward pass.

    Args:
        embedding: (B, N, D), the student's embeddings of N patches; they are L2-normalised here.
        patch_labels: (B, N), integers.
        teacher_embedding: (B, N, D), the teacher's embeddings; they are L2-normalised and detached here.
        anchor_entropy: (B, N), H in nats; it is detached here. None: 0.
        temperature: τ, at least 0.03.
        gamma: γ, 0 (no focal weights) or at least 1, so that the gradient is finite everywhere.
        top_k: the number of hard negatives from the teacher, at least 1.
        ignore_label: the label of patches to exclude.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if no anchor has positives and negatives.

    Raises:
        ValueError: the shapes do not match, or a constant is out of range.

    >>> embedding = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    >>> round(fecl_loss(embedding, torch.tensor([[0, 0, 1]]), gamma=2.0).item(), 4)
    0.0511
    """
    _check(embedding, patch_labels, teacher_embedding, anchor_entropy, temperature, gamma, top_k)
    batch, patches, _ = embedding.shape
    student = normalize(embedding, dim=-1)
    teacher = None if teacher_embedding is None else normalize(teacher_embedding.detach().to(student.dtype), dim=-1)
    if anchor_entropy is None:
        anchor_entropy = student.new_zeros(batch, patches)
    entropy_weight = anchor_entropy.detach().to(student.dtype).exp()
    participates = patch_labels != ignore_label

    constants = (temperature, gamma, top_k)
    return _FeCL.apply(student, teacher, patch_labels, participates, entropy_weight, constants)


def blocks_of_anchors(embedding: torch.Tensor) -> Iterator[slice]:
    """Yield the slices of anchors to process together; they depend only on B and N of the embedding (B, N, D)."""
    batch, patches, _ = embedding.shape
    entries = _BLOCK_ENTRIES.get(embedding.device.type, 2**20)
    rows = max(16, entries // (batch * patches) // 16 * 16)  # a multiple of 16 suits matrix units
    for first in range(0, patches, rows):
        yield slice(first, min(first + rows, patches))


class _FeCL(KeptGradient):
    """FeCL of normalised embeddings, with a hand-written gradient."""

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
    """A block of anchors of each image (rows R) and their pairs with all patches of the image (columns N)."""

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
        """Set h, shifted by 1/τ, (B, R, 1), and the values that its gradient needs."""
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
        r"""Add the gradient of `loss` to the gradient (B, N, D) of all embeddings.

        With the denominator d and :math:`a_i = \frac{1}{|P(i)|\, d_i} \sum_{k \in P(i)} F^+_{ik}`, the derivatives
        with respect to the cosines are

        .. math::
            \frac{\partial L}{\partial c_{ik}} &= -\frac{1}{|P(i)|} \left(\frac{F^+_{ik}}{\tau}
                + \dot F^+_{ik} \log\frac{e^{S_{ik}}}{d_i}\right) + a_i \frac{e^{S_{ik}}}{\tau}, \quad k \in P(i) \\
            \frac{\partial L}{\partial c_{iq}} &= a_i \left(\dot F^-_{iq} (e^{S_{iq}} + h_i)
                + F^-_{iq} \frac{e^{S_{iq}}}{\tau}\right), \quad q \in N(i)
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


def _check(embedding, patch_labels, teacher_embedding, anchor_entropy, temperature, gamma, top_k) -> None:
    if embedding.ndim != 3:
        raise ValueError(f"embedding must be (B, N, D), got {tuple(embedding.shape)}")
    if patch_labels.shape != embedding.shape[:2]:
        raise ValueError(f"patch_labels must be (B, N) = {tuple(embedding.shape[:2])}, got {tuple(patch_labels.shape)}")
    if patch_labels.is_floating_point():
        raise ValueError(f"patch_labels must be integers, got {patch_labels.dtype}")
    if teacher_embedding is not None and teacher_embedding.shape != embedding.shape:
        raise ValueError(
            f"teacher_embedding must have the shape of embedding, {tuple(embedding.shape)}, got "
            f"{tuple(teacher_embedding.shape)}"
        )
    if anchor_entropy is not None and anchor_entropy.shape != embedding.shape[:2]:
        raise ValueError(
            f"anchor_entropy must be (B, N) = {tuple(embedding.shape[:2])}, got {tuple(anchor_entropy.shape)}"
        )
    if not temperature >= _LOWEST_TEMPERATURE:
        raise ValueError(f"temperature must be at least {_LOWEST_TEMPERATURE}, got {temperature}")
    if not (gamma == 0 or gamma >= 1):
        raise ValueError(f"gamma must be 0 or at least 1, got {gamma}")
    if not top_k >= 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")


class FeCLLoss(nn.Module):
    """`fecl_loss` as a module that stores its constants."""

    def __init__(self, temperature: float = 0.6, gamma: float = 2.0, top_k: int = 5, ignore_label: int = -1) -> None:
        super().__init__()
        self.constants = {"temperature": temperature, "gamma": gamma, "top_k": top_k, "ignore_label": ignore_label}

    def forward(
        self,
        embedding: torch.Tensor,
        patch_labels: torch.Tensor,
        teacher_embedding: torch.Tensor | None = None,
        anchor_entropy: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return fecl_loss(
            embedding,
            patch_labels,
            teacher_embedding=teacher_embedding,
            anchor_entropy=anchor_entropy,
            **self.constants,
        )
