"""DyCON with co-training, one of two frameworks in the DyCON paper. The class `DyCON` uses the other, Mean Teacher."""

import torch
from torch import nn

from nnunet_dycon.components.batches import LabeledBatch, StudentOutput
from nnunet_dycon.components.co_training import CoTraining, each_with_peer
from nnunet_dycon.components.features import IGNORED_PATCH, FeatureStage, ProjectionHead
from nnunet_dycon.components.method import Supervision, Terms
from nnunet_dycon.methods.dycon import DyCONTerms


class DyCONCoTraining(CoTraining):
    r"""DyCON (arXiv:2504.04566) with co-training: a second student, the peer, replaces the EMA teacher.

    .. math::
        L = \sum_s \left[ L_{sup}(s) + r(t) \left( w_u L_{UnCL}(s, \bar{s}) + w_f L_{FeCL}(s, \bar{s}) \right) \right]

    The sum is over both students s. :math:`\bar{s}` is the other student, the peer of s. r is the ramp-up factor, and w
    are the weights. :math:`L_{sup}` is nnU-Net's loss on labeled images; for the losses UnCL and FeCL see `DyCONTerms`.
    The class of a patch in FeCL is taken from the ground truth for labeled images and from the peer's prediction for
    unlabeled images. The hard negatives are embeddings of the peer.

    Deviations from the paper, which describes this framework only briefly and releases no code for it:

    - the deviations of `DyCON`, except those that concern the EMA teacher and mixing, which are not used here;
    - both students see the same strong view;
    - both students share one projection head, so that their embeddings are comparable. The loss of one student has a
      gradient with respect to its own network and the head, but not with respect to the peer's network.

    Args:
        supervision: the losses between logits and labels, and the label space.
        settings: see `DyCONTerms`.
        second: the second network; the first network is the student.
        stage: the encoder stage of both networks whose features FeCL uses; not needed if the weight of FeCL is 0.
    """

    head: ProjectionHead | None

    def __init__(
        self, supervision: Supervision, settings: DyCONTerms, second: nn.Module, stage: FeatureStage | None = None
    ) -> None:
        head = settings.build_head(second, stage)
        super().__init__(supervision, settings, second, None if head is None else stage)
        self.head = head

    def weights(self, ramp: float) -> dict[str, float]:
        weights = {"uncl": self.settings.uncl_weight, "fecl": self.settings.fecl_weight}
        return {name: ramp * weight for name, weight in weights.items()}

    def mutual_losses(
        self, first: StudentOutput, second: StudentOutput, labeled: LabeledBatch, progress: float
    ) -> tuple[Terms, Terms, Terms]:
        settings, label_space, half = self.settings, self.supervision.label_space, len(labeled)
        first_losses: Terms = {}
        second_losses: Terms = {}
        diagnostics: Terms = {}
        if settings.uncl_weight != 0:
            beta = diagnostics["beta"] = settings.beta(progress)
            for terms, (own, peer) in zip((first_losses, second_losses), each_with_peer(first, second)):
                terms["uncl"] = settings.consistency(label_space, own.logits[0], peer.logits[0], beta)
        if self.head is not None:
            ignored = []
            truth, known = label_space.truth(labeled)
            # One call for both networks: DDP would synchronise the gradients once per call.
            embeddings = self.head(torch.cat([first.features, second.features])).chunk(2)
            for terms, (own, peer), (embedding, peer_embedding) in zip(
                (first_losses, second_losses), each_with_peer(first, second), (embeddings, embeddings[::-1])
            ):
                pseudo = label_space.labels(peer.logits[0][half:])
                everywhere = torch.cat([known, torch.ones_like(pseudo, dtype=torch.bool)])
                patches = settings.patches(label_space, torch.cat([truth, pseudo]), everywhere, own)
                terms["fecl"] = settings.contrast(label_space, own, embedding, peer_embedding, patches)
                ignored.append((patches == IGNORED_PATCH).float().mean())
            diagnostics["ignored_patches"] = torch.stack(ignored).mean()
        return first_losses, second_losses, diagnostics
