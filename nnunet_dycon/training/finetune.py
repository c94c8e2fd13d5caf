"""Fine-tuning of pretrained weights: a lower learning rate, its warm-up, and an encoder that is frozen at first.

The trainers named _finetune have a tenth of the learning rate, and a warm-up over 5 % of the epochs. Source: nnU-Net
fine-tunes checkpoints of nnssl with a maximum learning rate of 1e-3, where training from scratch has 1e-2, and a
warm-up over 50 of 1000 epochs (PretrainedTrainer in MIC-DKFZ/nnUNet, commit 3605eea1, newer than version 2.8.1).
Deviations: batch size and deep supervision are not changed, and the warm-up is a fraction of the training.

In co-training, only the first network starts from pretrained weights. All networks have the lower rate and the warm-up;
only the encoder of the first one is frozen.

Everything depends only on the settings and the number of the epoch, so a resumed training needs no further state.
"""

import math
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.components.wrappers import unwrap
from nnunet_dycon.errors import NotSupported
from nnunet_dycon.training.settings import TrainingSchedule


class WarmUpSchedule:
    r"""Learning rate of each epoch: a linear warm-up, then nnU-Net's polynomial decay over the remaining epochs.

    .. math:: \eta(e) = \eta_{max}\,\frac{e + 1}{W} \text{ for } e < W, \qquad
        \eta(e) = \eta_{max} \left(1 - \frac{e - W}{E - W}\right)^{0.9} \text{ otherwise}

    with the epoch e, counted from 0, E epochs in total and W epochs of warm-up. It is the schedule with which nnU-Net
    fine-tunes checkpoints of nnssl (its Lin_incr_LRScheduler and PolyLRScheduler_offset).

    Args:
        optimizer: the optimizer; all its parameter groups get the same learning rate.
        learning_rate: the maximum learning rate.
        epochs: number of epochs of the training.
        warmup: number of epochs of the warm-up, less than `epochs`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, learning_rate: float, epochs: int, warmup: int) -> None:
        self._optimizer, self._learning_rate, self._warmup = optimizer, learning_rate, warmup
        self._decay = PolyLRScheduler(optimizer, learning_rate, epochs - warmup)

    def step(self, epoch: int) -> None:
        """Set the learning rate of an epoch, as nnU-Net's trainer does at the start of the epoch."""
        if epoch >= self._warmup:
            self._decay.step(epoch - self._warmup)
            return
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * (epoch + 1) / self._warmup


def schedule(trainer: nnUNetTrainer, settings: TrainingSchedule) -> None:
    """Change the learning rates of an initialized trainer and freeze its encoder, as defined in the settings.

    Without a lower rate, warm-up or frozen encoder in the settings, nothing is changed.

    In the epochs with a frozen encoder, the optimizer is given no gradients of it, so weights, weight decay and
    momentum of the encoder start with the first other epoch. The gradients are computed nevertheless, because in
    distributed training the set of trained parameters must not change; they count in the norm that limits the step.

    Args:
        trainer: the trainer, whose optimizer contains all parameters.
        settings: its training settings.

    Raises:
        NotSupported: the encoder is to be frozen, but the network has no encoder.
    """
    if (settings.learning_rate_factor, settings.warmup) != (1.0, 0.0):
        trainer.initial_lr *= settings.learning_rate_factor
        warmup = min(math.ceil(settings.warmup * trainer.num_epochs), trainer.num_epochs - 1)
        trainer.lr_scheduler = WarmUpSchedule(trainer.optimizer, trainer.initial_lr, trainer.num_epochs, warmup)
    frozen = math.ceil(settings.frozen_encoder * trainer.num_epochs)
    if frozen == 0:
        return
    encoder: Any = getattr(unwrap(trainer.network), "encoder", None)
    if encoder is None:
        raise NotSupported(
            f"{type(trainer).__name__} cannot freeze the encoder, because {type(unwrap(trainer.network)).__name__} "
            "has none; set frozen_encoder to 0"
        )
    parameters = list(encoder.parameters())

    def drop_gradients(*_: Any) -> None:
        if trainer.current_epoch < frozen:
            for parameter in parameters:
                parameter.grad = None

    trainer.optimizer.register_step_pre_hook(drop_gradients)
