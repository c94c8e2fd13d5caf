"""Entropy of a network's output, used as a measure of uncertainty."""

import torch

from nnunet_dycon.losses.two_classes import as_two_classes
from nnunet_dycon.system.precision import at_least_float32


def softmax_and_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return the softmax p over the class axis and its entropy :math:`H(p) = -\sum_c p_c \ln p_c` in nats.

    Args:
        logits: (B, C, *spatial).

    Returns:
        p: (B, C, *spatial), and H: (B, *spatial).
    """
    log_probabilities = torch.log_softmax(logits, 1)
    probabilities = log_probabilities.exp()
    return probabilities, -(probabilities * log_probabilities).sum(1)


@at_least_float32
def softmax_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats, (B, *spatial), of the softmax of logits (B, C, *spatial).

    >>> round(softmax_entropy(torch.zeros(1, 2, 1)).item(), 4)
    0.6931
    """
    return softmax_and_entropy(logits)[1]


@at_least_float32
def sigmoid_entropy(logits: torch.Tensor) -> torch.Tensor:
    r"""Return the binary entropy of each region in nats.

    .. math:: h(p) = -p \ln p - (1 - p) \ln(1 - p), \qquad p = \sigma(z)

    Args:
        logits: (B, R, *spatial), before the sigmoid.

    Returns:
        (B, R, *spatial), each at most ln 2.

    >>> [round(value, 4) for value in sigmoid_entropy(torch.tensor([[[0.0, 2.0, -2.0]]])).flatten().tolist()]
    [0.6931, 0.3653, 0.3653]
    """
    return softmax_and_entropy(as_two_classes(logits))[1]
