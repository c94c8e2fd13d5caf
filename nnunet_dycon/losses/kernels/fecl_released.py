"""FeCL of the released DyCON code, computed in blocks of anchors, with a hand-written gradient."""

import torch

from nnunet_dycon.losses.kernels.fecl import blocks_of_anchors
from nnunet_dycon.losses.kernels.gradients import KeptGradient

_SMALLEST_DISTANCE = 1e-6


class FeCLReleased(KeptGradient):
    r"""Autograd function of `fecl_released_loss` for L2-normalised embeddings, with a hand-written gradient.

    The arguments of ``apply`` are the student's embeddings (B, N, D), the teacher's embeddings of the same shape or
    None, the labels (B, N), and the tuple (temperature, gamma, cross_threshold, cross_weight).

    The symbols d, m, N, P and S are those of `fecl_released_loss`. In addition, :math:`E_{ik} = e^{S_{ik} - m_k}`,
    :math:`n_i` is the sum of E over the negatives of i, and :math:`\ell_{ik}` is the contribution of the pair i, k to
    the first term of the loss. The derivatives of the first term with respect to the similarities S are

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
            d = exponential / total
            log_d = shifted - total.log()
            focal = (1.0 - d) ** gamma
            weight = 1.0 / (positive.sum(-1, keepdim=True).clamp(min=1) * anchors).to(student.dtype)
            loss -= (weight * torch.where(positive, focal * log_d, 0.0)).sum()
            if gradient is not None:
                slope = -focal
                if gamma != 0:
                    slope += gamma * (1.0 - d) ** (gamma - 1.0) * d * log_d
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
