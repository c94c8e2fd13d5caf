"""DyCON between two students: the second of the two frameworks that the paper puts its losses into."""

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, StudentOutput
from nnunet_dycon.features import IGNORED_PATCH, FeatureStage, ProjectionHead
from nnunet_dycon.methods.dycon import DyCONTerms
from nnunet_dycon.methods.method import Supervision, Terms
from nnunet_dycon.methods.two_students import TwoStudents, each_with_the_other


class DyCONCoTraining(TwoStudents):
    r"""DyCON (arXiv:2504.04566) with co-training in place of Mean Teacher: each student is the other's teacher.

    .. math::
        L = \sum_s L_{sup}(s) + r(t) \left[ w_u L_{UnCL}(s, \bar{s}) + w_f L_{FeCL}(s, \bar{s}) \right]

    A patch's class comes from the ground truth in the labeled half, and from what the other student says in the
    unlabeled one; its hard negatives are the other's.

    Deviations from the paper, which says little of this host, and releases no code for it: as DyCON's; both students
    see the same strong view; they share one projection head, so that embeddings of one can be compared with those of
    the other. What one learns by the other's embeddings moves the head, but not the other.

    Args:
        supervision: how to learn from labels.
        settings: the constants.
        second: the second network.
        stage: the encoder stage that FeCL looks at, of either network; not needed without FeCL.
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

    def lessons(
        self, first: StudentOutput, second: StudentOutput, labeled: LabeledBatch, progress: float
    ) -> tuple[Terms, Terms, Terms]:
        settings, kind, half = self.settings, self.supervision.kind, len(labeled)
        of_first: Terms = {}
        of_second: Terms = {}
        monitors: Terms = {}
        if settings.uncl_weight != 0:
            beta = monitors["beta"] = settings.beta(progress)
            for terms, (own, other) in zip((of_first, of_second), each_with_the_other(first, second)):
                terms["uncl"] = settings.consistency(kind, own.logits[0], other.logits[0], beta)
        if self.head is not None:
            ignored = []
            truth, known = kind.truth(labeled)
            # One call for both: DDP would synchronise the gradients of each.
            embeddings = self.head(torch.cat([first.features, second.features])).chunk(2)
            for terms, (own, other), (embedding, of_other) in zip(
                (of_first, of_second), each_with_the_other(first, second), (embeddings, embeddings[::-1])
            ):
                pseudo = kind.labels(other.logits[0][half:])
                everywhere = torch.cat([known, torch.ones_like(pseudo, dtype=torch.bool)])
                patches = settings.patches(kind, torch.cat([truth, pseudo]), everywhere, own)
                terms["fecl"] = settings.contrast(kind, own, embedding, of_other, patches)
                ignored.append((patches == IGNORED_PATCH).float().mean())
            monitors["ignored_patches"] = torch.stack(ignored).mean()
        return of_first, of_second, monitors
