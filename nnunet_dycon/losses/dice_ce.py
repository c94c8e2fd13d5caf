"""nnU-Net's Dice and cross-entropy loss for classes or regions, with a weight for each voxel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from nnunet_dycon.system.distributed import sum_over_ranks
from nnunet_dycon.system.precision import at_least_float32

_SMOOTH = 1e-5  # nnU-Net's


def _dice(overlap: torch.Tensor, predicted: torch.Tensor, labeled: torch.Tensor, batch_dice: bool) -> torch.Tensor:
    """Return the soft Dice of each class or region from weighted sums over voxels.

    Without ``batch_dice``, the sums are over the voxels of each image, and the sums and the result have the shape
    (B, C) for C classes or regions. With ``batch_dice``, the sums are over the batch of this rank, and the shape is
    (C,). This function then adds the sums of all ranks.

    Args:
        overlap: sum of weight × predicted probability × label (0 or 1).
        predicted: sum of weight × predicted probability.
        labeled: sum of weight × label.
        batch_dice: compute one Dice per class over the batch of all ranks.
    """
    if batch_dice:
        overlap, predicted, labeled = sum_over_ranks(torch.stack([overlap, predicted, labeled]))
    return (2 * overlap + _SMOOTH) / (predicted + labeled + _SMOOTH)


@at_least_float32
def weighted_dice_ce_loss(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, *, batch_dice: bool = False
) -> torch.Tensor:
    r"""Return the weighted cross-entropy minus the weighted soft Dice.

    .. math::
        L = \frac{\sum_i w_i \left(-\ln p_{i y_i}\right)}{\sum_i w_i}
            - \operatorname*{mean}_{b,\,c > 0}
              \frac{2 \sum_{i \in b} w_i p_{ic} [y_i = c] + \epsilon}
                   {\sum_{i \in b} w_i p_{ic} + \sum_{i \in b} w_i [y_i = c] + \epsilon}

    with the softmax output p, the weight w of each voxel i, and ε = 1e-5. The Dice is averaged over the foreground
    classes c and over the images b whose weights are not all 0. If all weights are 1, this is nnU-Net's loss. If the
    weights are 0 and 1, it is nnU-Net's loss with the ignore label where the weight is 0 (except that nnU-Net counts a
    completely ignored image as a Dice of 1).

    Args:
        logits: (B, C, *spatial), before the softmax.
        target: (B, *spatial), the class of each voxel, integers in [0, C).
        weight: (B, *spatial), the weight of each voxel, not negative.
        batch_dice: compute one Dice per class over the batch of all ranks instead of one per class and image.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if all weights are 0.

    Raises:
        ValueError: the shapes do not match.

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
    # An image whose weights are all 0 has a Dice of 1 and is excluded from the mean.
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
    r"""Return the weighted binary cross-entropy minus the weighted soft Dice of regions.

    .. math::
        L = -\frac{\sum_{i,r} w_{ir} \left(y_{ir} \ln p_{ir} + (1 - y_{ir}) \ln (1 - p_{ir})\right)}
                  {\sum_{i,r} w_{ir}}
            - \operatorname*{mean}_{b,\,r}
              \frac{2 \sum_{i \in b} w_{ir} p_{ir} y_{ir} + \epsilon}
                   {\sum_{i \in b} w_{ir} p_{ir} + \sum_{i \in b} w_{ir} y_{ir} + \epsilon}

    with the sigmoid output p, the label y, the weight w of each voxel i and region r, and ε = 1e-5. The Dice is
    averaged over the pairs of image b and region r whose weights are not all 0.

    If all weights are 1, this is nnU-Net's loss for regions. If ``summed`` is set and the weights are 0 for ignored
    voxels and 1 for the others, it is nnU-Net's loss with the ignore label (except that nnU-Net counts a completely
    ignored image as a Dice of 1).

    Args:
        logits: (B, R, *spatial), before the sigmoid.
        target: (B, R, *spatial), whether each voxel is inside each region: boolean, or 0 and 1.
        weight: (B, R, *spatial), the weight of each voxel and region, not negative.
        batch_dice: compute one Dice per region over the batch of all ranks instead of one per region and image.
        summed: sum the cross-entropy over regions instead of averaging it, as nnU-Net does if the dataset has an ignore
            label.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if all weights are 0.

    Raises:
        ValueError: the shapes do not match.

    >>> logits = torch.tensor([[[0.0, 100.0]]])  # one image, one region, two voxels
    >>> round(weighted_dice_bce_loss(logits, torch.tensor([[[0, 1]]]), torch.tensor([[[0.0, 1.0]]])).item(), 4)
    -1.0
    """
    if logits.ndim < 3 or not logits.shape == target.shape == weight.shape:
        raise ValueError(
            "logits, target and weight must have the same shape (B, R, *spatial), got "
            f"{tuple(logits.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}"
        )
    weight, target = weight.detach(), target.to(logits.dtype)
    total = weight.sum()
    cross_entropy = binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / total.clamp(min=1e-8)

    axes = (0, *range(2, logits.ndim)) if batch_dice else tuple(range(2, logits.ndim))
    weighted = weight * logits.sigmoid()
    overlap, predicted, labeled = (volume.sum(axes) for volume in (weighted * target, weighted, weight * target))
    dice = _dice(overlap, predicted, labeled, batch_dice)
    # A region whose weights are all 0 has a Dice of 1 and is excluded from the mean.
    total = weight.sum(axes)
    counts = (sum_over_ranks(total) if batch_dice else total) > 0
    dice = (dice * counts).sum() / counts.sum().clamp(min=1)
    return (logits.shape[1] if summed else 1) * cross_entropy - dice


@dataclass(frozen=True)
class WeightedDiceCELoss:
    """Weighted sum of `weighted_dice_ce_loss` over the resolutions of a network with deep supervision.

    Attributes:
        level_weights: the weight of each resolution, highest resolution first.
        batch_dice: compute one Dice per class over the batch of all ranks instead of one per class and image; nnU-Net's
            plans contain the value.
    """

    level_weights: tuple[float, ...] = (1.0,)
    batch_dice: bool = False

    def __call__(self, logits: Sequence[torch.Tensor], target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the losses at all resolutions.

        Args:
            logits: (B, C, *spatial) for each resolution, highest first.
            target: (B, *spatial), the classes at the highest resolution. This method downsamples them to the other
                resolutions as nnU-Net does (nearest voxel).
            weight: (B, *spatial), the weight of each voxel; downsampled in the same way.
        """
        loss = partial(weighted_dice_ce_loss, batch_dice=self.batch_dice)
        return _of_levels(loss, self.level_weights, logits, target, weight)


@dataclass(frozen=True)
class WeightedDiceBCELoss:
    """Weighted sum of `weighted_dice_bce_loss` over the resolutions of a network with deep supervision.

    Attributes:
        level_weights: the weight of each resolution, highest resolution first.
        batch_dice: compute one Dice per region over the batch of all ranks instead of one per region and image;
            nnU-Net's plans contain the value.
        summed: sum the cross-entropy over regions instead of averaging it; True if the dataset has an ignore label.
    """

    level_weights: tuple[float, ...] = (1.0,)
    batch_dice: bool = False
    summed: bool = False

    def __call__(self, logits: Sequence[torch.Tensor], target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the losses at all resolutions.

        Args:
            logits: (B, R, *spatial) for each resolution, highest first.
            target: (B, R, *spatial), the regions at the highest resolution. This method downsamples them to the other
                resolutions as nnU-Net does (nearest voxel).
            weight: (B, R, *spatial), the weight of each voxel and region; downsampled in the same way.
        """
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
    """Resize a volume (B, [R,] *size) to the shape (B, [R,] *spatial) by nearest-neighbor interpolation."""
    axes = len(spatial)
    if volume.shape[-axes:] == spatial:
        return volume
    channels = volume.float().reshape(len(volume), -1, *volume.shape[-axes:])
    scaled = interpolate(channels, spatial, mode="nearest-exact")
    return scaled.reshape(*volume.shape[:-axes], *spatial)
