"""Focal entropy-aware contrastive loss between the patches of an image."""

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from nnunet_dycon.losses.precision import at_least_float32

# exp(-2/τ), the smallest factor that occurs, is 1e-29 at 0.03: still a normal float32.
_LOWEST_TEMPERATURE = 0.03
# Similarities of a block of anchors with all N patches: 2^22 entries are 16 MiB a matrix in float32.
_BLOCK_ENTRIES = 2**22


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
    r"""Pull patches of one class together and push those of different classes apart, hard ones first.

    .. math::
        L = \operatorname*{mean}_{i} \frac{1}{|P(i)|} \sum_{k \in P(i)} -F^+_{ik} \log
            \frac{e^{S_{ik}}}{\sum_{k' \in P(i)} e^{S_{ik'}} + \sum_{q \in N(i)} F^-_{iq} \left(e^{S_{iq}} + h_i\right)}

    over the anchors i of the batch that have both P(i), the other patches of their image with their label, and N(i),
    those with another label; patches with the ignored label take part nowhere. With z the L2-normalised embeddings and
    :math:`c_{ij} = z_i \cdot z_j`:

    - :math:`S_{ij} = c_{ij} / \tau`;
    - :math:`F^+_{ik} = (1 - c^*_{ik})^\gamma e^{H(i)}` and :math:`F^-_{iq} = (c^*_{iq})^\gamma`, with c* the cosine
      clamped to [0, 1] and H(i) the anchor's entropy;
    - :math:`h_i` is the mean of :math:`e^{z_i \cdot z^t_l / \tau}` over the ``top_k`` (or |N(i)|, if fewer) patches l
      of N(i) whose teacher embedding z^t is most similar to the anchor; 0 without a teacher.

    DyCON, Eqs. 3-6 (arXiv:2504.04566). Gradients flow to the student's embeddings through S, F and h, and nowhere else.

    The focal weights reward a collapse: where all embeddings of an image are equal, F⁺ is 0 and with it the loss,
    whatever the classes, and a projection head gets there within tens of steps. With ``gamma=0`` the weights are 1 and
    the loss tells classes apart.

    Deviations: ``top_k`` and the clamp are our reading, since the paper gives neither in the form at hand. The released
    code (commit 69c1384) has one positive at a time in the denominator, no weights F on the negatives, and a threshold
    term in place of h.

    Matrices of N × N never exist: anchors are taken in blocks, and the backward pass computes each block again.

    Args:
        embedding: (B, N, D), the student's embeddings of N patches; L2-normalised inside.
        patch_labels: (B, N), integers.
        teacher_embedding: (B, N, D), the teacher's; L2-normalised inside, detached.
        anchor_entropy: (B, N), in nats, detached; 0 if not given.
        temperature: τ, at least 0.03.
        gamma: γ, 0 (no focal weights) or at least 1, so that the gradient is finite everywhere.
        top_k: how many hard negatives of the teacher count, at least 1.
        ignore_label: the label of patches to leave out.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if no anchor has both.

    Raises:
        ValueError: a shape or a constant does not fit.

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

    total = student.new_zeros(())
    anchors = student.new_zeros(())
    # The block follows from N alone. It is a whole multiple of 16 rows for the sake of matrix units.
    rows = max(16, _BLOCK_ENTRIES // (batch * patches) // 16 * 16)
    for first in range(0, patches, rows):
        block = slice(first, min(first + rows, patches))
        constants = (student, teacher, patch_labels, participates, entropy_weight, temperature, gamma, top_k)
        block_total, block_anchors = checkpoint(_anchor_block, block, *constants, use_reentrant=False)
        total = total + block_total
        anchors = anchors + block_anchors
    return total / anchors.clamp(min=1)


def _anchor_block(
    block: slice,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    patch_labels: torch.Tensor,
    participates: torch.Tensor,
    entropy_weight: torch.Tensor,
    temperature: float,
    gamma: float,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over the anchors of a block, and their number. Rows r are anchors, columns n all patches."""
    both = participates[:, block, None] & participates[:, None, :]
    same = patch_labels[:, block, None] == patch_labels[:, None, :]
    columns = torch.arange(student.shape[1], device=student.device)
    itself = columns[block, None] == columns[None, :]
    positive = both & same & ~itself
    negative = both & ~same
    positives = positive.sum(-1)
    negatives = negative.sum(-1)
    valid = (positives > 0) & (negatives > 0)

    cosine = torch.einsum("brd,bnd->brn", student[:, block], student)
    # |S| ≤ 1/τ, so 1/τ is a shift that serves every row: no maximum has to be found, and nothing overflows.
    exponential = torch.exp((cosine - 1.0) / temperature)
    clamped = cosine.clamp(0.0, 1.0)
    positive_weight = _power(1.0 - clamped, gamma) * entropy_weight[:, block, None]
    negative_term = exponential
    if teacher is not None:
        negative_term = negative_term + _hard_negatives(student[:, block], teacher, negative, temperature, top_k)
    denominator = torch.where(positive, exponential, 0.0).sum(-1)
    denominator = denominator + torch.where(negative, _power(clamped, gamma) * negative_term, 0.0).sum(-1)
    # Anchors that do not take part have no denominator: give them one that has a logarithm.
    log_denominator = torch.where(valid, denominator, 1.0).log()

    log_ratio = (cosine - 1.0) / temperature - log_denominator[..., None]
    per_anchor = torch.where(positive, -positive_weight * log_ratio, 0.0).sum(-1) / positives.clamp(min=1)
    return torch.where(valid, per_anchor, 0.0).sum(), valid.sum().to(student.dtype)


def _hard_negatives(
    anchors: torch.Tensor, teacher: torch.Tensor, negative: torch.Tensor, temperature: float, top_k: int
) -> torch.Tensor:
    """h with the shift of 1/τ: (B, R, 1), for anchors (B, R, D), teacher (B, N, D) and negative (B, R, N)."""
    similarity = torch.einsum("brd,bnd->brn", anchors, teacher)
    hardest = similarity.masked_fill(~negative, -torch.inf).topk(min(top_k, teacher.shape[1]), dim=-1).indices
    counts = negative.gather(-1, hardest)
    values = torch.exp((similarity.gather(-1, hardest) - 1.0) / temperature)
    return torch.where(counts, values, 0.0).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)


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
            f"teacher_embedding must be {tuple(embedding.shape)} as embedding, got {tuple(teacher_embedding.shape)}"
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
    """`fecl_loss` with its constants."""

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
