"""Helpers of the reference implementations in these tests: softmax and entropy with the math module, voxel by voxel."""

import math
from collections.abc import Iterator

import torch


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    exponentials = [math.exp(value - largest) for value in values]
    return [exponential / sum(exponentials) for exponential in exponentials]


def entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def voxels(logits: torch.Tensor) -> Iterator[list[float]]:
    """Yield the softmax of each voxel of (B, C, *spatial), image by image."""
    for image in logits.detach().double():
        for values in image.flatten(1).T.tolist():
            yield softmax(values)


def some_logits(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_labels(*shape: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def regions(logits: torch.Tensor) -> Iterator[list[float]]:
    """Yield the sigmoid of all regions for each voxel of (B, R, *spatial), image by image."""
    for image in logits.detach().double():
        for values in image.flatten(1).T.tolist():
            yield [sigmoid(value) for value in values]


def of_regions(labels: torch.Tensor) -> Iterator[list]:
    """Yield the labels (B, R, *spatial) in the same order."""
    for image in labels:
        yield from image.flatten(1).T.tolist()


def as_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits of one region, (B, 1, *spatial), as logits of two classes."""
    return torch.cat([torch.zeros_like(logits), logits], 1)
