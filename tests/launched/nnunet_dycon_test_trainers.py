"""Trainers for tests with torchrun, which add this folder to nnUNet_extTrainer.

In attempt 0 of torchrun, the last rank receives SIGKILL in the middle of epoch 1; in attempt 1, it receives SIGTERM in
the middle of epoch 2. Attempts and epochs are counted from 0.
"""

import os
import signal
from dataclasses import replace

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from nnunet_dycon.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_dycon.training import plots, pseudo_label_page

_ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
EPOCHS, STEPS = 4, 3


def _is_hit(trainer: nnUNetTrainer, attempt: int, epoch: int) -> bool:
    return attempt == _ATTEMPT and trainer.current_epoch == epoch and trainer.local_rank == dist.get_world_size() - 1


class nnUNetTrainerHit(nnUNetTrainerMeanTeacher):
    """A short Mean Teacher training that receives both signals."""

    training_settings = replace(
        nnUNetTrainerMeanTeacher.training_settings,
        num_epochs=EPOCHS,
        num_iterations_per_epoch=STEPS,
        num_val_iterations_per_epoch=1,
    )

    def initialize(self):
        super().initialize()
        self.save_every = 1
        plots.draw_curves = pseudo_label_page.draw = lambda *arguments: None
        self.logger.plot_progress_png = lambda *arguments: None

    def train_step(self, batch):
        done = super().train_step(batch)
        print(f"attempt {_ATTEMPT} rank {self.local_rank} epoch {self.current_epoch} step {self._step_in_epoch}")
        if self._step_in_epoch == 1 and _is_hit(self, 0, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._step_in_epoch == 1 and _is_hit(self, 1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    def perform_actual_validation(self, save_probabilities=False):
        """Skip the final validation, which takes longer than training."""


class nnUNetTrainerPlainHit(nnUNetTrainer):
    """A short training with nnU-Net's own trainer that receives SIGKILL; with final validation."""

    def initialize(self):
        super().initialize()
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = EPOCHS, STEPS, 1
        self.save_every = 1

    def on_train_epoch_end(self, train_outputs):
        if _is_hit(self, 0, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_train_epoch_end(train_outputs)
