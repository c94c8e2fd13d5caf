"""DyCON as published."""

from nnunet_dycon.methods import DyCON, DyCONSettings
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer


class nnUNetTrainerDyCON(SemiSupervisedTrainer):
    """DyCON with the losses and weights of the paper (CVPR 2025, arXiv:2504.04566); nothing is mixed.

    The method is `nnunet_dycon.methods.dycon`, its losses are `nnunet_dycon.losses.uncl` and
    `nnunet_dycon.losses.fecl`. Deviations from the paper and from the released code (commit 69c1384):

    Host

    - Network, optimizer, learning rate, patch size, augmentation and deep supervision of the supervised loss are
      nnU-Net's. The teacher sees the view without intensity augmentation, in eval mode; in the release it sees added
      noise and keeps its dropout.
    - FeCL reads the encoder stage with the stride nearest to 8; the release reads features upsampled from stride 16.
    - No label of an unlabeled image exists. The release classes the patches of unlabeled images by their ground truth;
      here the teacher's prediction does.

    Both losses

    - Ramp-up over the first 40 % of the training. The release has both terms fully on from the first step.
    - The release's third term, a mean squared error with a weight of nearly 0, is left out.

    UnCL

    - β falls from 5 to 0.5, as in the released code; the text of the paper has been quoted with 1 to 0.1.
    - Entropies come from log_softmax instead of log(p + 1e-6).

    FeCL

    - The focal weights take the cosine c, clamped to [0, 1], where the source has S = c/τ.
    - The loss is the mean over valid anchors, those with at least one positive and one negative. The release takes the
      mean over all anchors, with zeros for the others.
    - The number of hard negatives, k = 5, and the clamp are our reading.
    - The projection head has layer norm instead of batch norm, and lacks the release's final normalisation layer.
    - The class of a patch follows the area of its foreground, with a band that is ignored (0.05 to 0.25); the release
      looks at the central 2 x 2 x 2 voxels.
    - The entropy of an anchor is the mean over its patch of the entropy of the student's softmax; the paper's
      "gambling softmax" equals a softmax.
    """

    method_settings = DyCONSettings()

    def build_method(self, network, supervision) -> DyCON:
        stage = self.feature_stage() if self.method_settings.fecl_weight != 0 else None
        return DyCON(network, supervision, self.method_settings, stage)
