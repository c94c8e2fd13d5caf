"""Focal entropy-aware contrastive loss (FeCL) between the patches (cells of a feature grid) of an image."""

import torch
from torch.nn.functional import normalize

from nnunet_dycon.losses.kernels.fecl import FeCL
from nnunet_dycon.system.precision import at_least_float32

# exp(-2/τ) is the smallest factor that occurs. At τ = 0.03 it is 1e-29, still a normal float32.
_LOWEST_TEMPERATURE = 0.03


def fecl_reference(
    z: torch.Tensor,
    labels: torch.Tensor,
    z_t: torch.Tensor,
    entropy: torch.Tensor,
    tau: float,
    gamma: float,
    top_k: int,
) -> torch.Tensor:
    """Return the FeCL of DyCON (Eqs. 3-6) for the N patches of one image, written as in the paper.

    Tests compare `fecl_loss` with this function. `fecl_loss` is faster and supports batches and ignored patches. The
    symbols are those of `fecl_loss`.

    Args:
        z: (N, D), the student's L2-normalised embeddings.
        labels: (N,), the class of each patch.
        z_t: (N, D), the teacher's L2-normalised embeddings.
        entropy: (N,), the entropy H of each patch in nats; each patch is an anchor.
        tau: the temperature τ.
        gamma: the exponent γ of the focal weights.
        top_k: the number of hard negatives of each anchor.
    """
    cosine = z @ z.T
    positive = (labels[:, None] == labels) & ~torch.eye(len(z), dtype=torch.bool)
    negative = labels[:, None] != labels
    exponential = torch.exp(cosine / tau)
    hardest = (z @ z_t.T).masked_fill(~negative, -torch.inf).topk(min(top_k, len(z))).values
    hard = torch.exp(hardest / tau).sum(1, keepdim=True) / hardest.isfinite().sum(1, keepdim=True).clamp(min=1)
    focal_positive = (1 - cosine.clamp(0, 1)) ** gamma * torch.exp(entropy)[:, None]
    focal_negative = cosine.clamp(0, 1) ** gamma
    denominator = (positive * exponential + negative * focal_negative * (exponential + hard)).sum(1, keepdim=True)
    per_pair = -focal_positive * torch.log(exponential / denominator)
    valid = positive.any(1) & negative.any(1)
    return (torch.where(positive, per_pair, 0).sum(1) / positive.sum(1))[valid].mean()


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
    r"""Return the focal entropy-aware contrastive loss (FeCL) of DyCON between patches, the cells of a feature grid.

    The loss attracts the embeddings of patches of the same class and repels the embeddings of patches of different
    classes:

    .. math::
        L = \operatorname*{mean}_{i} \frac{1}{|P(i)|} \sum_{k \in P(i)} -F^+_{ik} \log
            \frac{e^{S_{ik}}}{\sum_{k' \in P(i)} e^{S_{ik'}} + \sum_{q \in N(i)} F^-_{iq} \left(e^{S_{iq}} + h_i\right)}

    These are Eqs. 3-6 of DyCON (arXiv:2504.04566). The positives P(i) of an anchor patch i are the other patches of its
    image with the same label. The negatives N(i) are the patches of its image with a different label. The mean is over
    the anchors of the batch that have positives and negatives. Patches with the ignored label are neither anchors nor
    positives nor negatives. z are the student's L2-normalised embeddings, and :math:`c_{ij} = z_i \cdot z_j` is the
    cosine of two of them. The other symbols are:

    - S, the similarity: :math:`S_{ij} = c_{ij} / \tau`;
    - F, the focal weights: :math:`F^+_{ik} = (1 - c^*_{ik})^\gamma e^{H(i)}` for positives and
      :math:`F^-_{iq} = (c^*_{iq})^\gamma` for negatives, with c* the cosine clamped to [0, 1] and H(i) the entropy of
      the anchor;
    - h, the hard-negative term: the mean of :math:`e^{z_i \cdot z^t_l / \tau}` over the ``top_k`` patches l of N(i)
      (or all, if there are fewer) whose teacher embedding :math:`z^t_l` is most similar to the anchor. It is 0 without
      a teacher.

    The gradient with respect to the student's embeddings includes the derivatives of S, F and h. The teacher receives
    no gradient.

    The focal weights allow a collapse: if all embeddings of an image are equal, F⁺ and the loss are 0, regardless of
    the classes. A projection head reaches this state within tens of steps. With ``gamma=0``, F⁻ is 1 and F⁺ is
    :math:`e^{H(i)}`. The loss then separates the classes.

    Deviations:

    - the available version of the paper specifies neither ``top_k`` nor the clamp. Both are our choice;
    - the released code (commit 69c1384) has only one positive in the denominator of each pair, no focal weights of
      negatives, and a threshold term instead of h, see `fecl_released_loss`.

    `fecl_reference` computes the equation literally. This function uses `nnunet_dycon.losses.kernels.fecl`, which
    processes blocks of anchors and keeps only the gradient, (B, N, D), for the backward pass.

    Args:
        embedding: (B, N, D), the student's embeddings of N patches; they are L2-normalised here.
        patch_labels: (B, N), integers, the class of each patch.
        teacher_embedding: (B, N, D), the teacher's embeddings; they are L2-normalised and detached here.
        anchor_entropy: (B, N), the entropy H of each patch in nats; it is detached here. None means an entropy of 0.
        temperature: τ, at least 0.03.
        gamma: γ, 0 (no focal weights) or at least 1, so that the gradient is finite everywhere.
        top_k: the number of hard negatives from the teacher, at least 1.
        ignore_label: the label of patches to exclude.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if no anchor has positives and negatives.

    Raises:
        ValueError: the shapes do not match, labels are not integers, or temperature, gamma or top_k is too small.

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
    return FeCL.apply(student, teacher, patch_labels, participates, entropy_weight, constants)


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
