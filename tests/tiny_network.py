"""Network with two stages and its batches, to test methods without nnU-Net."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from nnunet_dycon.components.batches import LabeledBatch, StudentOutput, UnlabeledBatch
from nnunet_dycon.components.features import FeatureStage, FeatureTap
from nnunet_dycon.methods import CoTraining

STAGE = FeatureStage("encoder.stages.1", 6)
FULL_RESOLUTION = FeatureStage("decoder.stages.0", 4)  # as in the trainer


class TinyUNet(nn.Module):
    """Encoder with two stages, and a decoder with optional deep supervision."""

    def __init__(self, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.stages = nn.ModuleList([nn.Conv3d(1, width, 3, padding=1), nn.Conv3d(width, 6, 2, stride=2)])
        self.decoder = nn.Module()
        self.decoder.stages = nn.ModuleList([nn.Conv3d(width + 6, width, 1)])
        self.decoder.seg_layers = nn.ModuleList([nn.Conv3d(6, heads, 1), nn.Conv3d(width, heads, 1)])
        self.deep_supervision = True

    def forward(self, images):
        full = self.encoder.stages[0](images)
        half = self.encoder.stages[1](torch.relu(full))
        merged = self.decoder.stages[0](torch.cat([full, interpolate(half, scale_factor=2)], 1))
        lower = self.decoder.seg_layers[0](half)
        logits = [self.decoder.seg_layers[1](full + merged) + interpolate(lower, scale_factor=2), lower]
        return logits if self.deep_supervision else logits[0]


def supervised_loss(logits, targets):
    """Return the mean cross-entropy over resolutions."""
    return sum(cross_entropy(level, target[:, 0]) for level, target in zip(logits, targets)) / len(logits)


class Student:
    """Student that stores the images of each call."""

    def __init__(self, network: nn.Module, stage: FeatureStage | None = STAGE) -> None:
        self.network, self.images = network.train(), []
        self.tap = FeatureTap(network, stage.name) if stage else None

    def __call__(self, images):
        self.images.append(images)
        return StudentOutput(self.network(images), self.tap.take() if self.tap else None)


def both_outputs(method: CoTraining, student: Student, labeled, unlabeled) -> list[StudentOutput]:
    """Return the outputs of both students for the images of a step."""
    images = torch.cat([labeled.strong, unlabeled.strong])
    taps = (student.tap, method._second_tap)
    return [
        StudentOutput(network(images), tap.take() if tap else None)
        for network, tap in zip((student.network, method.second), taps)
    ]


def labeled_batch() -> LabeledBatch:
    """Return two labeled images with two classes, at two resolutions."""
    torch.manual_seed(1)
    strong = torch.randn(2, 1, 8, 8, 8)
    target = (torch.randn(2, 1, 4, 4, 4) > 0).long()
    full = target.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    return LabeledBatch(strong + 0.1, strong, [full, target], ("a", "b"))


def batch_of_regions(has_ignore_label: bool = False) -> LabeledBatch:
    """Return the same images with two nested regions and, if requested, a channel of ignored voxels."""
    batch = labeled_batch()
    targets = []
    for level in batch.targets:
        outer = level.bool()
        inner = outer & (torch.arange(outer.shape[-1]) < outer.shape[-1] // 2)
        ignored = (torch.arange(outer.shape[2]) >= outer.shape[2] * 3 // 4)[:, None, None].expand_as(outer)
        channels = [outer & ~ignored, inner & ~ignored, ignored] if has_ignore_label else [outer, inner]
        targets.append(torch.cat(channels, 1))
    return replace(batch, targets=targets)


def unlabeled_batch() -> UnlabeledBatch:
    """Return three unlabeled images."""
    torch.manual_seed(2)
    strong = torch.randn(3, 1, 8, 8, 8)
    return UnlabeledBatch(strong + 0.1, strong, ("c", "d", "e"))


class TinyQueries(nn.Module):
    """Network that returns logits and query distributions at two resolutions."""

    def __init__(self):
        super().__init__()
        self.segmentation, self.queries = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, images):
        levels = images, nn.functional.avg_pool3d(images, 2)
        return [self.segmentation(level) for level in levels], [self.queries(level) for level in levels]


class QueryStudent(Student):
    """Student for `TinyQueries`, whose output has queries."""

    def __call__(self, images):
        self.images.append(images)
        logits, queries = self.network(images)
        return StudentOutput(logits, queries=queries)
