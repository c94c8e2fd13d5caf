"""Trainer with the losses of DyCON's released code."""

from dataclasses import replace

from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON


class nnUNetTrainerDyCON_released(nnUNetTrainerDyCON):
    """DyCON with the losses of the released code (commit 69c1384), but without ground truth of unlabeled images.

    UnCL is computed on all images, the released form of FeCL on the unlabeled half of the batch. Both losses have their
    full weight from the first step. Deviations from the release:

    - The class of an unlabeled patch is taken from the teacher's prediction instead of the ground truth.
    - The threshold of FeCL's cross term increases from 0.3 to 0.5 over the whole training. In the release it increases
      over the first 1,500 passes over the labeled cases, so the end of the increase depends on their number.
    - The release's third term, a mean squared error with a weight of nearly 0, is omitted.
    - A patch is foreground if at least half of its voxels are; the release uses the central 2 x 2 x 2 voxels.
    """

    method_settings = replace(
        nnUNetTrainerDyCON.method_settings,
        fecl_form="released",
        rampup=0.0,
        foreground_fraction=0.5,
        background_fraction=0.5,
    )
