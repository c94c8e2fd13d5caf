"""nnU-Net's losses, Dice and cross-entropy of classes or of regions, with a weight for each voxel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from nnunet_dycon.precision import at_least_float32
from nnunet_dycon.ranks import sum_over_ranks

_SMOOTH = 1e-5  # nnU-Net's


@at_least_float32
def weighted_dice_ce_loss(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, *, batch_dice: bool = False
) -> torch.Tensor:
    r"""Cross-entropy minus soft Dice, in both of which a voxel counts as much as its weight says.

    .. math::
        L = \frac{\sum_i w_i \left(-\ln p_{i y_i}\right)}{\sum_i w_i}
            - \operatorname*{mean}_{b,\,c > 0}
              \frac{2 \sum_{i \in b} w_i p_{ic} [y_i = c] + \epsilon}
                   {\sum_{i \in b} w_i p_{ic} + \sum_{i \in b} w_i [y_i = c] + \epsilon}

    with the voxels i of those images b in which any has a weight, the softmax output p, and ε = 1e-5. With all weights
    1 it is nnU-Net's loss, with weights of 0 and 1 nnU-Net's loss with the ignore label where the weight is 0 (which
    counts an image that is ignored altogether as a Dice of 1).

    Args:
        logits: (B, C, *spatial), before the softmax.
        target: (B, *spatial), integers in [0, C).
        weight: (B, *spatial), not negative.
        batch_dice: take the sums of the Dice over the batch, that of all ranks, not over each image.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 where all weights are 0.

    Raises:
        ValueError: a shape does not fit.

    >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 100.0]]])  # one image, two classes, two voxels
    >>> round(weighted_dice_ce_loss(logits, torch.tensor([[0, 1]]), torch.tensor([[0.0, 1.0]])).item(), 4)
    -1.0
    """
    if logits.ndim < 3 or target.shape != (logits.shape[0], *logits.shape[2:]) or weight.shape != target.shape:
        raise ValueError(
            "logits must be (B, C, *spatial), target and weight (B, *spatial), got "
            f"{tuple(logits.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}"
        )
    weight = weight.detach()
    total = weight.sum()
    log_probabilities = torch.log_softmax(logits, 1)
    target = target.long()[:, None]
    cross_entropy = -(weight * log_probabilities.gather(1, target)[:, 0]).sum() / total.clamp(min=1e-8)

    axes = (0, *range(2, logits.ndim)) if batch_dice else tuple(range(2, logits.ndim))
    weighted = weight[:, None] * log_probabilities.exp()
    is_class = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target, True)
    overlap = torch.where(is_class, weighted, 0).sum(axes)[..., 1:]
    predicted = weighted.sum(axes)[..., 1:]
    labeled = (weight[:, None] * is_class).sum(axes)[..., 1:]
    dice = _dice(overlap, predicted, labeled, batch_dice)
    # An image without any weight has a Dice of 1, and nothing to say.
    counts = (sum_over_ranks(total) > 0) if batch_dice else (weight.flatten(1).sum(1) > 0)
    dice = (dice.mean(-1) * counts).sum() / counts.sum().clamp(min=1)
    return cross_entropy - dice


@at_least_float32
def weighted_dice_bce_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    *,
    batch_dice: bool = False,
    summed: bool = False,
) -> torch.Tensor:
    r"""Binary cross-entropy minus soft Dice of regions, in both of which a voxel counts as much as its weight says.

    .. math::
        L = -\frac{\sum_{i,r} w_{ir} \left(y_{ir} \ln p_{ir} + (1 - y_{ir}) \ln (1 - p_{ir})\right)}
                  {\sum_{i,r} w_{ir}}
            - \operatorname*{mean}_{b,\,r}
              \frac{2 \sum_{i \in b} w_{ir} p_{ir} y_{ir} + \epsilon}
                   {\sum_{i \in b} w_{ir} p_{ir} + \sum_{i \in b} w_{ir} y_{ir} + \epsilon}

    with those regions r of an image b in which any voxel i has a weight, the sigmoid output p, and ε = 1e-5. With all
    weights 1 it is nnU-Net's loss of regions, with weights of 0 and 1 nnU-Net's loss with the ignore label where the
    weight is 0 (which counts an image that is ignored altogether as a Dice of 1), if ``summed`` is as it says.

    Args:
        logits: (B, R, *spatial), before the sigmoid.
        target: (B, R, *spatial), boolean, or 0 and 1.
        weight: (B, R, *spatial), not negative.
        batch_dice: take the sums of the Dice over the batch, that of all ranks, not over each image.
        summed: count the cross-entropy R times. nnU-Net takes its mean over regions, but where the data set has an
            ignore label its sum over them.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 where all weights are 0.

    Raises:
        ValueError: a shape does not fit.

    >>> logits = torch.tensor([[[0.0, 100.0]]])  # one image, one region, two voxels
    >>> round(weighted_dice_bce_loss(logits, torch.tensor([[[0, 1]]]), torch.tensor([[[0.0, 1.0]]])).item(), 4)
    -1.0
    """
    if logits.ndim < 3 or not logits.shape == target.shape == weight.shape:
        raise ValueError(
            "logits, target and weight must be (B, R, *spatial) of one shape, got "
            f"{tuple(logits.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}"
        )
    weight, target = weight.detach(), target.to(logits.dtype)
    total = weight.sum()
    cross_entropy = binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / total.clamp(min=1e-8)

    axes = (0, *range(2, logits.ndim)) if batch_dice else tuple(range(2, logits.ndim))
    weighted = weight * logits.sigmoid()
    overlap, predicted, labeled = (volume.sum(axes) for volume in (weighted * target, weighted, weight * target))
    dice = _dice(overlap, predicted, labeled, batch_dice)
    # A region without any weight has a Dice of 1, and nothing to say.
    total = weight.sum(axes)
    counts = (sum_over_ranks(total) if batch_dice else total) > 0
    dice = (dice * counts).sum() / counts.sum().clamp(min=1)
    return (logits.shape[1] if summed else 1) * cross_entropy - dice


def _dice(overlap: torch.Tensor, predicted: torch.Tensor, labeled: torch.Tensor, batch_dice: bool) -> torch.Tensor:
    """Of sums over an image, or over a batch: then over that of all ranks, as nnU-Net's."""
    if batch_dice:
        overlap, predicted, labeled = sum_over_ranks(torch.stack([overlap, predicted, labeled]))
    return (2 * overlap + _SMOOTH) / (predicted + labeled + _SMOOTH)


@dataclass(frozen=True)
class WeightedDiceCELoss:
    """`weighted_dice_ce_loss` at all levels of a network with deep supervision.

    Attributes:
        level_weights: how much each level counts, highest resolution first.
        batch_dice: as in the plans.
    """

    level_weights: tuple[float, ...] = (1.0,)
    batch_dice: bool = False

    def __call__(self, logits: Sequence[torch.Tensor], target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of (B, C, *spatial) each, and target and weight (B, *spatial) at the highest resolution.

        They are scaled as nnU-Net scales targets: the nearest voxel.
        """
        loss = partial(weighted_dice_ce_loss, batch_dice=self.batch_dice)
        return _of_levels(loss, self.level_weights, logits, target, weight)


@dataclass(frozen=True)
class WeightedDiceBCELoss:
    """`weighted_dice_bce_loss` at all levels of a network with deep supervision.

    Attributes:
        level_weights: how much each level counts, highest resolution first.
        batch_dice: as in the plans.
        summed: whether the data set has an ignore label.
    """

    level_weights: tuple[float, ...] = (1.0,)
    batch_dice: bool = False
    summed: bool = False

    def __call__(self, logits: Sequence[torch.Tensor], target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of (B, R, *spatial) each, and target and weight so at the highest resolution, which are scaled as above."""
        loss = partial(weighted_dice_bce_loss, batch_dice=self.batch_dice, summed=self.summed)
        return _of_levels(loss, self.level_weights, logits, target, weight)


def _of_levels(
    loss: Callable[..., torch.Tensor],
    level_weights: Sequence[float],
    logits: Sequence[torch.Tensor],
    target: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    losses = []
    for level, level_weight in zip(logits, level_weights, strict=True):
        if level_weight == 0:
            continue
        scaled = (_scaled(volume, level.shape[2:]) for volume in (target, weight))
        losses.append(level_weight * loss(level, *scaled))
    return torch.stack(losses).sum()


def _scaled(volume: torch.Tensor, spatial: torch.Size) -> torch.Tensor:
    """(B, [R,] *size) to (B, [R,] *spatial)."""
    axes = len(spatial)
    if volume.shape[-axes:] == spatial:
        return volume
    channels = volume.float().reshape(len(volume), -1, *volume.shape[-axes:])
    scaled = interpolate(channels, spatial, mode="nearest-exact")
    return scaled.reshape(*volume.shape[:-axes], *spatial)
