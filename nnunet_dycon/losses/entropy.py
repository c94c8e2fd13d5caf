"""The entropy of a softmax output, a network's own measure of its uncertainty."""

import torch

from nnunet_dycon.precision import at_least_float32


def softmax_and_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The softmax p of logits over their class axis, and its entropy :math:`H(p) = -\sum_c p_c \ln p_c` in nats.

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
    """The entropy alone: (B, *spatial) of logits (B, C, *spatial), in nats.

    >>> round(softmax_entropy(torch.zeros(1, 2, 1)).item(), 4)
    0.6931
    """
    return softmax_and_entropy(logits)[1]
