"""Tests of losses of half-precision logits up to the limit of float16, against float32."""

import pytest
import torch

from nnunet_dycon.losses import (
    WeightedDiceBCELoss,
    WeightedDiceCELoss,
    consistency_loss,
    entropy_filtered_loss,
    mistake_region_loss,
    query_distribution_loss,
    rectified_cross_pseudo_loss,
    uncl_loss,
)

SHAPE = (2, 3, 6, 6, 6)
LIMIT = 6e4  # float16 ends at 65504


def labels(kind: str) -> torch.Tensor:
    """Return (B, *spatial): all background, or with one foreground voxel, or random."""
    found = torch.zeros(SHAPE[0], *SHAPE[2:], dtype=torch.long)
    if kind == "one voxel":
        found[0, 1, 2, 3] = 2
    if kind == "random":
        found = torch.randint(0, SHAPE[1], found.shape, generator=torch.Generator().manual_seed(1))
    return found


LOGITS = {
    "up to 6e4": lambda g: LIMIT * torch.randn(SHAPE, generator=g).sign(),
    "both scales": lambda g: torch.randn(SHAPE, generator=g) * 10 ** (4 * torch.rand(SHAPE, generator=g)),
    "equal": lambda g: torch.full(SHAPE, LIMIT),
    "zero": lambda g: torch.zeros(SHAPE),
}
WEIGHT = torch.ones(SHAPE[0], *SHAPE[2:])
LOSSES = {
    "UnCL": lambda x, other, y: uncl_loss(x, other, 1.0),
    "UnCL of regions": lambda x, other, y: uncl_loss(x, other, 1.0, sigmoid=True),
    "consistency": lambda x, other, y: consistency_loss(x, other),
    "consistency of regions": lambda x, other, y: consistency_loss(x, other, sigmoid=True),
    "cross pseudo": lambda x, other, y: rectified_cross_pseudo_loss(x, other),
    "Dice and CE": lambda x, other, y: WeightedDiceCELoss()([x], y, WEIGHT),
    "Dice and BCE": lambda x, other, y: WeightedDiceBCELoss()(
        [x], torch.nn.functional.one_hot(y, 3).movedim(-1, 1), WEIGHT[:, None].expand(SHAPE)
    ),
    "entropy filter": lambda x, other, y: entropy_filtered_loss(x, y, y >= 0),
    "mistakes": lambda x, other, y: mistake_region_loss(x, other, y),
    "query distribution": lambda x, other, y: query_distribution_loss(x, y),
}


@pytest.mark.parametrize("kind", ["background", "one voxel", "random"])
@pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_loss_of_float16_logits_equals_that_of_the_same_float32_logits(loss, make, kind):
    """The inputs are the same numbers, so only the computation could differ."""
    generator = torch.Generator().manual_seed(0)
    x, other = (make(generator).half().clamp(-LIMIT, LIMIT) for _ in range(2))
    half, full = x.clone().requires_grad_(), x.float().requires_grad_()
    result, expected = loss(half, other, labels(kind)), loss(full, other.float(), labels(kind))
    assert result.dtype == torch.float32
    assert torch.isfinite(expected)
    torch.testing.assert_close(result, expected)
    result.backward()
    expected.backward()
    assert torch.isfinite(full.grad).all()
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=1e-3, atol=1e-6)
