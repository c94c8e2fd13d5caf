"""Focal entropy-aware contrastive loss (FeCL) as computed by the released DyCON code, which differs from the paper."""

import torch
from torch.nn.functional import normalize

from nnunet_dycon.losses.kernels.fecl_released import FeCLReleased
from nnunet_dycon.system.precision import at_least_float32


def fecl_released_reference(
    z: torch.Tensor,
    labels: torch.Tensor,
    z_t: torch.Tensor,
    tau: float,
    gamma: float,
    threshold: float,
    cross_weight: float,
) -> torch.Tensor:
    """Return the value of `fecl_released_loss`, computed literally with N × N matrices.

    Tests compare `fecl_released_loss` with this function. The second term is not protected: it is NaN if no cosine
    exceeds the threshold.

    Args:
        z: (B, N, D), the student's L2-normalised embeddings.
        labels: (B, N), the class of each patch.
        z_t: (B, N, D), the teacher's L2-normalised embeddings.
        tau: the temperature τ.
        gamma: the exponent γ of the focal weight.
        threshold: t; a negative is penalised if the cosine of its teacher embedding and the anchor's z exceeds t.
        cross_weight: λ, the weight of the second term, which penalises such negatives.
    """
    itself = torch.eye(z.shape[1], dtype=torch.bool)
    similarity = (z @ z.transpose(1, 2)).masked_fill(itself, 0) / tau
    exponential = torch.exp(similarity - similarity.amax(1, keepdim=True).detach())
    same = labels[:, :, None] == labels[:, None, :]
    positive = same & ~itself
    d = exponential / (exponential + torch.where(same, 0, exponential).sum(2, keepdim=True))
    per_pair = torch.where(positive, -((1 - d) ** gamma) * torch.log(d), 0)
    cosine = z @ z_t.transpose(1, 2)
    cross = -torch.log(1 - cosine[~same & (cosine > threshold)])
    return (per_pair.sum(2) / positive.sum(2).clamp(min=1)).mean() + cross_weight * cross.mean()


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
    r"""Return the contrastive loss of the released DyCON code (`FeCLoss` in utils/dycon_losses.py, commit 69c1384).

    The loss compares the embeddings of patches, the cells of a feature grid:

    .. math::
        L = \operatorname*{mean}_i \frac{1}{|P(i)|} \sum_{k \in P(i)} -(1 - d_{ik})^\gamma \log d_{ik}
            + \lambda \operatorname*{mean}_{i,\, q \in N(i):\, c^{st}_{iq} > t} -\log(1 - c^{st}_{iq}),
        \qquad d_{ik} = \frac{e^{S_{ik} - m_k}}{e^{S_{ik} - m_k} + \sum_{q \in N(i)} e^{S_{iq} - m_q}}

    The first term attracts positives and repels negatives. Its mean is over all patches i of the batch, the anchors.
    The positives P(i) are the other patches of the image of i with the label of i. The negatives N(i) are the patches
    of this image with a different label. The second term penalises negatives whose teacher embedding is too similar to
    the anchor. Its mean is over all pairs of an anchor i and a negative q whose cosine exceeds the threshold t. The
    symbols are, for the L2-normalised embeddings z of the student and :math:`z^t` of the teacher:

    - S, the similarity: :math:`S_{ik} = z_i \cdot z_k / \tau` for i ≠ k, and :math:`S_{ii} = 0`;
    - m, the maximum of the similarity over anchors: :math:`m_k = \max_i S_{ik}`, without gradient. It differs between
      the patches k and q, so it does not cancel from the fraction;
    - :math:`c^{st}`, the cosine with the teacher's embedding: :math:`c^{st}_{iq} = z_i \cdot z^t_q`.

    The release computes the threshold t from the epoch: 0.3 + 0.2 exp(-5 (1 - epoch/1500)²).

    Deviations from the released code, to avoid NaN and infinity:

    - a patch that is alone in its class adds 0 instead of 0/0;
    - the second term is 0 if no cosine is above t;
    - the argument of the logarithm in the second term is at least 1e-6.

    `fecl_released_reference` computes the equation literally. This function uses
    `nnunet_dycon.losses.kernels.fecl_released`, which stores no N × N matrices.

    Args:
        embedding: (B, N, D), the student's embeddings; they are L2-normalised here.
        patch_labels: (B, N), integers, the class of each patch; no patch is ignored.
        teacher_embedding: (B, N, D), the teacher's embeddings; they are L2-normalised and detached here. None omits the
            second term.
        temperature: τ, positive.
        gamma: γ of the focal weight (1 - d)^γ: 0 (no weight) or at least 1, so that the gradient is finite everywhere.
        use_focal: whether to use the focal weight; False is equal to γ = 0.
        cross_threshold: t, the cosine above which a negative enters the second term.
        cross_weight: λ, the weight of the second term.

    Returns:
        The loss, a scalar of at least float32.

    Raises:
        ValueError: the shapes do not match, or temperature or gamma is outside of its range.

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
    return FeCLReleased.apply(student, teacher, patch_labels, constants)
