"""Trainer with DyCON as published."""

from nnunet_dycon.methods import DyCON, DyCONSettings
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer


class nnUNetTrainerDyCON(SemiSupervisedTrainer):
    """DyCON with the losses and weights of the paper (CVPR 2025, arXiv:2504.04566), without mixing of images.

    Its losses are UnCL, the uncertainty-aware consistency loss (`nnunet_dycon.losses.uncl`), and FeCL, the focal
    entropy-aware contrastive loss between patches (`nnunet_dycon.losses.fecl`). A patch is a cell of the feature grid.
    See `nnunet_dycon.methods.dycon` for the method. "The release" is the released code, commit 69c1384.

    Deviations from the paper and the release:

    Framework

    - Network, optimizer, learning rate, patch size, augmentation and deep supervision of the supervised loss are
      nnU-Net's.
    - The teacher is in eval mode and its input has no intensity augmentation. The release adds noise to the teacher's
      input and keeps the teacher's dropout active.
    - FeCL uses the features of the encoder stage with the stride nearest to 8. The release upsamples features of stride
      16.
    - The class of a patch of an unlabeled image is taken from the teacher's prediction. The release takes it from the
      ground truth, which is not available here.

    Both losses (UnCL and FeCL)

    - The weights of both losses are ramped up over the first 40 % of the training. In the release they have their final
      values from the first step.
    - The release's third term, a mean squared error with a weight of nearly 0, is omitted.

    UnCL

    - The factor β of the entropies decreases from 5 to 0.5, as in the release. The paper's text, as quoted by others,
      gives 1 to 0.1.
    - Entropies are computed with log_softmax instead of log(p + 1e-6).

    FeCL

    - The focal weights are computed from the cosine similarity c of two patches, clamped to [0, 1], instead of S = c/τ
      with the temperature τ.
    - The loss is the mean over anchors with at least one positive and one negative patch. The release takes the mean
      over all anchors, in which the other anchors count as 0.
    - The number of hard negatives, k = 5, and the clamping of c are our interpretation of the paper.
    - The projection head has layer norm instead of batch norm and, unlike in the release, no final normalization layer.
    - The class of a patch depends on its foreground fraction, and patches with a fraction between 0.05 and 0.25 are
      ignored. The release uses the central 2 x 2 x 2 voxels of the patch.
    - The entropy of an anchor is the entropy of the student's softmax, averaged over the voxels of the patch. The
      paper's "gambling softmax" is equal to a softmax.
    """

    method_settings = DyCONSettings()

    def build_method(self, network, supervision) -> DyCON:
        stage = self.feature_stage() if self.method_settings.fecl_weight != 0 else None
        return DyCON(network, supervision, self.method_settings, stage)
