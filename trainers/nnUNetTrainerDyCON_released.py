"""Trainer with the losses of DyCON's released code."""

from dataclasses import replace

from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON


class nnUNetTrainerDyCON_released(nnUNetTrainerDyCON):
    """DyCON with the losses of the released code (commit 69c1384), but without ground truth of unlabeled images.

    The uncertainty-aware consistency loss (UnCL) is computed on all images. The focal entropy-aware contrastive loss
    (FeCL) is computed on the unlabeled images, between patches (cells of the feature grid). Both losses have their full
    weight from the first step.

    Deviations from the release:

    - The class of a patch is taken from the teacher's prediction instead of the ground truth.
    - FeCL's second term compares the student's embedding of a patch with the teacher's embeddings of patches of other
      classes. It penalizes each pair whose cosine exceeds a threshold. Here the threshold increases from 0.3 to 0.5
      over the whole training. In the release it increases over the first 1,500 passes over the labeled cases, so the
      number of steps depends on the number of these cases.
    - The release's third loss, a mean squared error with a weight of nearly 0, is omitted.
    - A patch is foreground if at least half of its voxels are foreground. The release uses the central 2 x 2 x 2 voxels
      of the patch.
    """

    method_settings = replace(
        nnUNetTrainerDyCON.method_settings,
        fecl_form="released",
        rampup=0.0,
        foreground_fraction=0.5,
        background_fraction=0.5,
    )
