"""The contrastive loss that the released DyCON code computes, which is not the paper's."""

import torch
from torch import nn
from torch.nn.functional import normalize

from nnunet_dycon.losses.precision import at_least_float32

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
    r"""Number for number what `FeCLoss` of the released code gives (utils/dycon_losses.py, commit 69c1384).

    .. math::
        L = \operatorname*{mean}_i \frac{1}{|P(i)|} \sum_{k \in P(i)} -(1 - d_{ik})^\gamma \log d_{ik}
            + \lambda \operatorname*{mean}_{i,\, q \in N(i):\, c^{st}_{iq} > t} -\log(1 - c^{st}_{iq}),
        \qquad d_{ik} = \frac{e^{S_{ik} - m_k}}{e^{S_{ik} - m_k} + \sum_{q \in N(i)} e^{S_{iq} - m_q}}

    over all patches i of the batch, with P(i) the other patches of the image with the label of i, N(i) those with
    another label, :math:`S_{ik} = z_i \cdot z_k / \tau` (0 for i = k), :math:`m_k = \max_i S_{ik}` without gradient,
    and :math:`c^{st}_{iq} = z_i \cdot z^t_q` the cosine with the teacher's embedding.

    That the maximum is taken over the anchors instead of over the patches of each sum is the release's: it does not
    cancel. Its threshold t follows from the epoch: 0.3 + 0.2 exp(-5 (1 - epoch/1500)²).

    Deviations from the released code: where it gives NaN, this does not. A patch that is alone in its class adds 0
    instead of 0/0, a batch without a hit has no second term, and 1 - c is at least 1e-6.

    Args:
        embedding: (B, N, D), the student's; L2-normalised inside.
        patch_labels: (B, N), integers; every patch takes part.
        teacher_embedding: (B, N, D), L2-normalised inside, detached; None leaves the second term out.
        temperature: τ, positive.
        gamma: γ of the focal weight.
        use_focal: False leaves the weight (1 - d)^γ out.
        cross_threshold: t.
        cross_weight: λ.

    Raises:
        ValueError: the shapes do not fit, or τ is not positive.

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
            f"teacher_embedding must be {tuple(embedding.shape)} as embedding, got {tuple(teacher_embedding.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student = normalize(embedding, dim=-1)
    same = patch_labels[:, :, None] == patch_labels[:, None, :]
    itself = torch.eye(embedding.shape[1], dtype=torch.bool, device=embedding.device)
    # i = anchor, k = patch: (B, i, k)
    similarity = torch.einsum("bid,bkd->bik", student, student).masked_fill(itself, 0.0) / temperature
    exponential = torch.exp(similarity - similarity.detach().amax(1, keepdim=True))
    negatives = torch.where(same, 0.0, exponential).sum(-1, keepdim=True)
    share = exponential / (exponential + negatives)
    per_pair = -share.log()
    if use_focal:
        per_pair = per_pair * (1.0 - share) ** gamma
    positive = same & ~itself
    loss = (torch.where(positive, per_pair, 0.0).sum(-1) / positive.sum(-1).clamp(min=1)).mean()
    if teacher_embedding is None:
        return loss
    teacher = normalize(teacher_embedding.detach().to(student.dtype), dim=-1)
    cosine = torch.einsum("bid,bkd->bik", student, teacher)
    hit = ~same & (cosine > cross_threshold)
    distance = torch.where(hit, 1.0 - cosine, 1.0).clamp(min=_SMALLEST_DISTANCE)
    return loss + cross_weight * -distance.log().sum() / hit.sum().clamp(min=1)


class FeCLReleasedLoss(nn.Module):
    """`fecl_released_loss` with its constants; the threshold grows with training and comes with each call."""

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
