"""Supervised losses and label space of a method, from the configuration of nnU-Net's trainer."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.components.batches import Targets
from nnunet_dycon.components.label_space import ClassLabels, RegionLabels
from nnunet_dycon.methods import Supervision


def make_supervision(trainer: nnUNetTrainer) -> Supervision:
    """Return the supervised losses and the label space (exclusive classes or regions) of nnU-Net's trainer.

    The losses are nnU-Net's loss and the same loss with a weight for each label. They use deep supervision if the
    trainer does.
    """

    def loss(logits: list[torch.Tensor], targets: Targets) -> torch.Tensor:
        return trainer.loss(logits if trainer.enable_deep_supervision else logits[0], targets)

    level_weights = tuple(trainer.loss.weight_factors) if trainer.enable_deep_supervision else (1.0,)
    labels = trainer.label_manager
    label_space = RegionLabels(labels.has_ignore_label) if labels.has_regions else ClassLabels(labels.ignore_label)
    return Supervision(
        loss, label_space.weighted_loss(level_weights, trainer.configuration_manager.batch_dice), label_space
    )
