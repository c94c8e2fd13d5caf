"""DyCON with the losses of its released code."""

from dataclasses import replace

from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON


class nnUNetTrainerDyCON_released(nnUNetTrainerDyCON):
    """The losses of the released code (commit 69c1384) without its label leak.

    UnCL on all samples and the released FeCL on the unlabeled half, both from the first step. Deviations from the
    release:

    - The teacher's prediction classes the patches, where the release takes the ground truth of unlabeled images.
    - The threshold of the cross term ramps from 0.3 to 0.5 over the whole training; in the release over its first
      1,500 passes of the labeled cases, a part of the training that depends on their number.
    - The release's third term, a mean squared error with a weight of nearly 0, is left out.
    - Patches are classed by the area of their foreground, of which half or more counts as foreground; the release
      looks at the central 2 x 2 x 2 voxels.
    """

    method_settings = replace(
        nnUNetTrainerDyCON.method_settings,
        fecl_form="released",
        rampup=0.0,
        foreground_fraction=0.5,
        background_fraction=0.5,
    )
