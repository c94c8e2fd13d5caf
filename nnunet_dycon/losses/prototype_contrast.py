"""Contrastive loss between uncertain voxels and class prototypes."""

import torch
from torch.nn.functional import cross_entropy, normalize

from nnunet_dycon.system.distributed import sum_over_ranks
from nnunet_dycon.system.precision import at_least_float32

# The lower bound of the norm that features are divided by. Without it the gradient would overflow in float16.
_SMALLEST_NORM = 1e-3
_CLASSES_AT_A_TIME = 8  # limits the memory of the (classes, voxels) membership masks


def _equation(
    anchors: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, present: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the InfoNCE loss of each anchor, (M,), before `prototype_contrast_loss` averages over the anchors.

    Args:
        anchors: (M, F), features of M uncertain voxels.
        labels: (M,), the class of each anchor, integers in [0, K).
        prototypes: (K, F), the mean feature of each class.
        present: (K,), boolean mask of the classes that have a prototype.
        temperature: τ, positive.
    """
    cosine = normalize(anchors, dim=1, eps=_SMALLEST_NORM) @ normalize(prototypes, dim=1).T
    similarity = (cosine / temperature).masked_fill(~present, torch.finfo(cosine.dtype).min)
    return cross_entropy(similarity, labels, reduction="none")


@torch.no_grad()
def class_prototypes(
    features: torch.Tensor, labels: torch.Tensor, reliable: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean feature of each class over its reliable voxels on all ranks, without gradient.

    Args:
        features: (B, F, *spatial), the feature vector of each voxel in the batch of this rank.
        labels: (B, *spatial), the class (label or pseudo-label) of each voxel, integers in [0, K).
        reliable: (B, *spatial), boolean, True for the voxels to average.
        classes: K, the number of classes.

    Returns:
        The mean features (prototypes), (K, F) of at least float32, and a boolean mask (K,) of the classes that have at
        least one reliable voxel. The prototypes of the other classes are 0.

    Raises:
        ValueError: the shapes do not match.

    >>> features = torch.tensor([[[1.0, 3.0, 9.0]]])  # one image, one channel, three voxels
    >>> class_prototypes(features, torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, False]]), 2)
    (tensor([[2.],
            [0.]]), tensor([ True, False]))
    """
    if labels.shape != (features.shape[0], *features.shape[2:]) or reliable.shape != labels.shape:
        raise ValueError(
            "features must be (B, F, *spatial), labels and reliable (B, *spatial), got "
            f"{tuple(features.shape)}, {tuple(labels.shape)} and {tuple(reliable.shape)}"
        )
    of_classes = []
    for of_class in torch.arange(classes, device=labels.device)[:, None].split(_CLASSES_AT_A_TIME):
        sums = counts = torch.zeros((), device=labels.device)
        for image, label, is_reliable in zip(features, labels, reliable):  # one at a time: upcasting needs memory
            member = (label.flatten() == of_class) & is_reliable.flatten()  # (K, N)
            sums = sums + _sums(member, image.flatten(1))
            counts = counts + member.sum(1)
        of_classes.append(torch.cat([sums, counts[:, None].to(sums.dtype)], 1))
    total = torch.cat(of_classes)
    # Do not spread non-finite features to other ranks, so that only the rank they come from reports its cases.
    total = sum_over_ranks(torch.where(total.isfinite().all(), total, 0))
    sums, counts = total[:, :-1], total[:, -1]
    return sums / counts[:, None].clamp(min=1), counts > 0


@at_least_float32
def _sums(member: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return the sum of features (F, N) over the voxels of each class, (K, F); ``member`` (K, N) marks these voxels."""
    return member.to(features.dtype) @ features.T


@at_least_float32
def prototype_contrast_loss(
    anchors: torch.Tensor,
    labels: torch.Tensor,
    prototypes: torch.Tensor,
    present: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    *,
    temperature: float = 0.1,
) -> torch.Tensor:
    r"""Return the InfoNCE loss of anchor features with the prototypes of all classes.

    .. math::
        L = \operatorname*{mean}_{i} -\ln \frac{e^{\cos(z_i, \mu_{y_i}) / \tau}}{\sum_c e^{\cos(z_i, \mu_c) / \tau}}

    The mean is over the valid anchors i whose class has a prototype, and the sum is over the classes c that have one.
    An anchor is an uncertain voxel with the feature z. The loss attracts z to the prototype μ of its class, and repels
    it from the other prototypes. Only the anchors receive a gradient, because uncertain voxels should not change the
    prototypes, which are means of reliable voxels.

    The loss replaces the feature alignment loss of arXiv:2509.13084. The alignment loss in the released code
    (AIPMLab/Semi-supervised-Segmentation) is the sum of the distances of the anchors to their prototype and the
    distance between the two prototypes. None of these distances has a gradient, so the loss has no effect in the
    released code. Deviations:

    - with a gradient, the loss of the release would attract the classes to each other, because it contains the distance
      between the prototypes. Here, the other prototypes repel an anchor;
    - any number of classes is supported;
    - if all features are equal, the loss here is the logarithm of the number of prototypes, which is not its minimum.
      The loss of the release would be 0, its minimum.

    Args:
        anchors: (M, F), features of M uncertain voxels.
        labels: (M,), the class (label or pseudo-label) of each anchor, integers in [0, K).
        prototypes: (K, F), the mean feature of each class, see `class_prototypes`.
        present: (K,), boolean mask of the classes that have a prototype; None for all.
        valid: (M,), boolean mask of the anchors to use; None for all.
        temperature: τ, positive.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if no valid anchor belongs to a class with a
        prototype, or if only one class has a prototype.

    Raises:
        ValueError: the shapes do not match, or the temperature is not positive.

    >>> anchors, prototypes = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    >>> round(prototype_contrast_loss(anchors, torch.tensor([0]), prototypes, temperature=1.0).item(), 4)
    0.3133
    """
    present = torch.ones(len(prototypes), dtype=torch.bool, device=anchors.device) if present is None else present
    valid = torch.ones(len(anchors), dtype=torch.bool, device=anchors.device) if valid is None else valid
    fits = anchors.ndim == prototypes.ndim == 2 and anchors.shape[1] == prototypes.shape[1]
    if not fits or not len(labels) == len(valid) == len(anchors) or len(present) != len(prototypes):
        raise ValueError(
            "anchors must be (M, F), labels and valid (M,), prototypes (K, F) and present (K,), got "
            f"anchors {tuple(anchors.shape)}, labels {tuple(labels.shape)}, valid {tuple(valid.shape)}, "
            f"prototypes {tuple(prototypes.shape)} and present {tuple(present.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    counts = valid & present[labels]
    each = _equation(anchors, labels, prototypes.detach().to(anchors.dtype), present, temperature)
    return torch.where(counts, each, 0).sum() / counts.sum().clamp(min=1)
