"""FeCL as computed by the released DyCON code, which differs from the paper."""

import torch
from torch import nn
from torch.nn.functional import normalize

from nnunet_dycon.losses.fecl import blocks_of_anchors
from nnunet_dycon.losses.gradients import KeptGradient
from nnunet_dycon.precision import at_least_float32

_SMALLEST_DISTANCE = 1e-6


@at_least_float32
def fecl_released_loss(
    embedding: torch.Tensor,
    patch_labels: torch.Tensor,
    *,
    teacher_embedding: torch.Tensor | None = None,
    temperature: float = 0.6,
    gamma: float = 2.0,
    use_focal: bool = True,
    cross_threshold: float = 0.3,
    cross_weight: float = 1.0,
) -> torch.Tensor:
    r"""Return the value of `FeCLoss` of the released code (utils/dycon_losses.py, commit 69c1384).

    .. math::
        L = \operatorname*{mean}_i \frac{1}{|P(i)|} \sum_{k \in P(i)} -(1 - d_{ik})^\gamma \log d_{ik}
            + \lambda \operatorname*{mean}_{i,\, q \in N(i):\, c^{st}_{iq} > t} -\log(1 - c^{st}_{iq}),
        \qquad d_{ik} = \frac{e^{S_{ik} - m_k}}{e^{S_{ik} - m_k} + \sum_{q \in N(i)} e^{S_{iq} - m_q}}

    over all patches i of the batch, with P(i) the other patches of the image with the label of i, N(i) those with a
    different label, :math:`S_{ik} = z_i \cdot z_k / \tau` (0 for i = k), :math:`m_k = \max_i S_{ik}` without gradient,
    and :math:`c^{st}_{iq} = z_i \cdot z^t_q` the cosine with the teacher's embedding.

    As in the release, the maximum m is taken over the anchors instead of over the patches of each sum, so it does not
    cancel. The release computes its threshold t from the epoch: 0.3 + 0.2 exp(-5 (1 - epoch/1500)²).

    Deviations from the released code, only where it gives NaN: a patch that is alone in its class adds 0 instead of
    0/0, a batch without a cosine above t has no second term, and 1 - c is at least 1e-6.

    As in `fecl_loss`, no N × N matrix is stored.

    Args:
        embedding: (B, N, D), the student's embeddings; they are L2-normalised here.
        patch_labels: (B, N), integers; no patch is ignored.
        teacher_embedding: (B, N, D), L2-normalised and detached here; None omits the second term.
        temperature: τ, positive.
        gamma: γ of the focal weight, 0 (none) or at least 1, so that the gradient is finite everywhere.
        use_focal: False omits the weight (1 - d)^γ.
        cross_threshold: t.
        cross_weight: λ.

    Returns:
        The loss, a scalar of at least float32.

    Raises:
        ValueError: the shapes do not match, or a constant is out of range.

    >>> embedding = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    >>> round(fecl_released_loss(embedding, torch.tensor([[0, 0, 1]])).item(), 4)
    0.0653
    """
    if embedding.ndim != 3 or patch_labels.shape != embedding.shape[:2]:
        raise ValueError(
            f"embedding must be (B, N, D) and patch_labels (B, N), got {tuple(embedding.shape)} and "
            f"{tuple(patch_labels.shape)}"
        )
    if teacher_embedding is not None and teacher_embedding.shape != embedding.shape:
        raise ValueError(
            f"teacher_embedding must have the shape of embedding, {tuple(embedding.shape)}, got "
            f"{tuple(teacher_embedding.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not (gamma == 0 or gamma >= 1):
        raise ValueError(f"gamma must be 0 or at least 1, got {gamma}")
    student = normalize(embedding, dim=-1)
    teacher = None if teacher_embedding is None else normalize(teacher_embedding.detach().to(student.dtype), dim=-1)
    constants = (temperature, gamma if use_focal else 0.0, cross_threshold, cross_weight)
    return _FeCLReleased.apply(student, teacher, patch_labels, constants)


class _FeCLReleased(KeptGradient):
    r"""The released FeCL of normalised embeddings, with a hand-written gradient.

    With the exponentials E, their sum n over negatives, and the loss ℓ of a pair, the derivatives of the first term
    with respect to the similarities are

    .. math::
        \frac{\partial L}{\partial S_{ik}} = n_i s_{ik},\ k \in P(i), \qquad
        \frac{\partial L}{\partial S_{iq}} = -E_{iq} \sum_{k \in P(i)} s_{ik},\ q \in N(i), \qquad
        s_{ik} = \frac{\partial \ell_{ik}}{\partial d_{ik}} \frac{d_{ik}}{E_{ik} + n_i}.
    """

    @staticmethod
    def forward(ctx, student, teacher, patch_labels, constants):
        temperature, gamma, threshold, cross_weight = constants
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        anchors = patch_labels.numel()
        loss, cross, hits = (student.new_zeros(()) for _ in range(3))
        cross_gradient = None if gradient is None or teacher is None else torch.zeros_like(student)
        maximum = _column_maximum(student, temperature)
        for rows in blocks_of_anchors(student):
            same = patch_labels[:, rows, None] == patch_labels[:, None, :]
            positive = same & ~_itself(student, rows)
            shifted = _similarity(student, rows, temperature) - maximum[:, None, :]
            exponential = shifted.exp()
            negatives = torch.where(same, 0.0, exponential).sum(-1, keepdim=True)
            total = exponential + negatives
            share = exponential / total
            log_share = shifted - total.log()
            focal = (1.0 - share) ** gamma
            weight = 1.0 / (positive.sum(-1, keepdim=True).clamp(min=1) * anchors).to(student.dtype)
            loss -= (weight * torch.where(positive, focal * log_share, 0.0)).sum()
            if gradient is not None:
                slope = -focal
                if gamma != 0:
                    slope += gamma * (1.0 - share) ** (gamma - 1.0) * share * log_share
                slope = torch.where(positive, weight * slope / total, 0.0)
                by_similarity = torch.where(same, slope * negatives, -exponential * slope.sum(-1, keepdim=True))
                by_cosine = by_similarity / temperature
                gradient.baddbmm_(by_cosine.transpose(1, 2), student[:, rows])
                gradient[:, rows] += by_cosine @ student
            if teacher is None:
                continue
            cosine = student[:, rows] @ teacher.transpose(1, 2)
            hit = ~same & (cosine > threshold)
            distance = torch.where(hit, 1.0 - cosine, 1.0).clamp(min=_SMALLEST_DISTANCE)
            cross -= distance.log().sum()
            hits += hit.sum()
            if cross_gradient is not None:
                moves = hit & (1.0 - cosine >= _SMALLEST_DISTANCE)
                cross_gradient[:, rows] += torch.where(moves, 1.0 / distance, 0.0) @ teacher
        per_hit = cross_weight / hits.clamp(min=1)
        if gradient is not None:
            ctx.save_for_backward(gradient if cross_gradient is None else gradient + per_hit * cross_gradient)
        return loss + per_hit * cross


def _column_maximum(student: torch.Tensor, temperature: float) -> torch.Tensor:
    # S is symmetric: it is the maximum of the row.
    return torch.cat([_similarity(student, rows, temperature).amax(-1) for rows in blocks_of_anchors(student)], 1)


def _similarity(student: torch.Tensor, rows: slice, temperature: float) -> torch.Tensor:
    cosine = student[:, rows] @ student.transpose(1, 2)
    return cosine.masked_fill_(_itself(student, rows), 0.0).div_(temperature)


def _itself(student: torch.Tensor, rows: slice) -> torch.Tensor:
    columns = torch.arange(student.shape[1], device=student.device)
    return columns[rows, None] == columns


class FeCLReleasedLoss(nn.Module):
    """`fecl_released_loss` as a module that stores its constants; the threshold is passed to each call."""

    def __init__(
        self, temperature: float = 0.6, gamma: float = 2.0, use_focal: bool = True, cross_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.constants = {
            "temperature": temperature, "gamma": gamma, "use_focal": use_focal, "cross_weight": cross_weight
        }  # fmt: skip

    def forward(
        self,
        embedding: torch.Tensor,
        patch_labels: torch.Tensor,
        teacher_embedding: torch.Tensor | None = None,
        cross_threshold: float = 0.3,
    ) -> torch.Tensor:
        return fecl_released_loss(
            embedding,
            patch_labels,
            teacher_embedding=teacher_embedding,
            cross_threshold=cross_threshold,
            **self.constants,
        )
