"""DyCON: uncertainty-aware consistency and focal entropy-aware contrast with an EMA teacher."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, StudentOutput, UnlabeledBatch
from nnunet_dycon.features import IGNORED_PATCH, FeatureStage, ProjectionHead, pool_to_patches
from nnunet_dycon.label_kinds import LabelKind
from nnunet_dycon.losses import fecl_loss, fecl_released_loss, uncl_loss
from nnunet_dycon.methods.method import Method, Student, Supervision, Terms
from nnunet_dycon.mixing import check_mixture, mixture
from nnunet_dycon.rules import BOX, EMA_DECAY, RAMPUP
from nnunet_dycon.schedules import exponential_decay, sigmoid_rampup
from nnunet_dycon.teacher import EMATeacher


@dataclass(frozen=True)
class DyCONTerms:
    """Constants of UnCL and FeCL, for any pair of networks. The defaults are the paper's.

    The ramp-up is ours; top_k and the two shares are not in the paper.

    Attributes:
        uncl_weight: of the uncertainty-aware consistency; 0 leaves it out.
        fecl_weight: of the contrastive loss; 0 leaves it and its projection head out.
        beta_start: UnCL's β at the start of training.
        beta_end: UnCL's β at its end.
        entropy_weight: UnCL's η; 0 leaves its entropy term out.
        rampup: the share of training over which both are turned on.
        embedding_width: of the projection head's output.
        temperature: FeCL's τ.
        gamma: FeCL's γ; 0 leaves its focal weights out.
        top_k: the number of FeCL's hard negatives.
        foreground_share: from which share of foreground on a patch is foreground.
        background_share: up to which share it is background; between the two it is ignored.
    """

    uncl_weight: float = 0.5
    fecl_weight: float = 0.5
    beta_start: float = 5.0
    beta_end: float = 0.5
    entropy_weight: float = 1.0
    rampup: float = RAMPUP
    embedding_width: int = 256
    temperature: float = 0.6
    gamma: float = 2.0
    top_k: int = 5
    foreground_share: float = 0.25
    background_share: float = 0.05

    def beta(self, progress: float) -> float:
        """UnCL's β."""
        return exponential_decay(progress, self.beta_start, self.beta_end)

    def build_head(self, network: nn.Module, stage: FeatureStage | None) -> ProjectionHead | None:
        """FeCL's projection head, on the network's device; None without FeCL. ValueError if it has no stage to read."""
        if self.fecl_weight == 0:
            return None
        if stage is None:
            raise ValueError("FeCL needs a stage of the encoder to look at")
        return ProjectionHead(stage.channels, self.embedding_width).to(next(network.parameters()).device)

    def consistency(
        self, kind: LabelKind, logits: torch.Tensor, other_logits: torch.Tensor, beta: float
    ) -> torch.Tensor:
        """UnCL of a student's logits with another's."""
        return uncl_loss(logits, other_logits, beta, entropy_weight=self.entropy_weight, sigmoid=kind.sigmoid)

    def patches(
        self, kind: LabelKind, labels: torch.Tensor, known: torch.Tensor, output: StudentOutput
    ) -> torch.Tensor:
        """The class of each patch of the features, (B, N), by the labels of its voxels and where they are known."""
        return kind.patches(
            labels,
            known,
            output.features.shape[2:],
            output.logits[0].shape[1],
            foreground_share=self.foreground_share,
            background_share=self.background_share,
        )

    def contrast(
        self,
        kind: LabelKind,
        output: StudentOutput,
        embedding: torch.Tensor,
        other_embedding: torch.Tensor,
        patches: torch.Tensor,
    ) -> torch.Tensor:
        """FeCL of a student's embedding (B, N, D), with the hard negatives of another's."""
        return fecl_loss(
            embedding,
            patches,
            teacher_embedding=other_embedding,
            anchor_entropy=pool_to_patches(kind.voxel_entropy(output.logits[0].detach()), output.features.shape[2:]),
            temperature=self.temperature,
            gamma=self.gamma,
            top_k=self.top_k,
            ignore_label=IGNORED_PATCH,
        )


@dataclass(frozen=True)
class DyCONSettings(DyCONTerms):
    """Constants of DyCON: those of its terms, and these.

    Attributes:
        ema_decay: of the teacher.
        fecl_form: "paper", over both halves, or "released", which is what the released code computes, over the
            unlabeled half. The released form knows no ignored patches: give it equal shares.
        mixing: what the student sees, see `nnunet_dycon.mixing.mixture`.
        box: the share of each axis that a box takes.
        uncl_half: "both", or "unlabeled" for UnCL of the unlabeled images alone.
        teacher_view: "weak", or "strong" for a teacher that sees the student's intensities, though nothing mixed.
    """

    ema_decay: float = EMA_DECAY
    fecl_form: str = "paper"
    mixing: str = "none"
    box: float = BOX
    uncl_half: str = "both"
    teacher_view: str = "weak"

    def __post_init__(self) -> None:
        check_mixture(self.mixing, self.box)
        if self.uncl_half not in ("both", "unlabeled"):
            raise ValueError(f'uncl_half must be "both" or "unlabeled", got {self.uncl_half!r}')
        if self.uncl_half == "unlabeled" and self.mixing == "copy_paste":
            raise ValueError("copy_paste leaves no image unlabeled: it needs uncl_half of both")
        if self.teacher_view not in ("weak", "strong"):
            raise ValueError(f'teacher_view must be "weak" or "strong", got {self.teacher_view!r}')
        if self.fecl_form not in ("paper", "released"):
            raise ValueError(f'fecl_form must be "paper" or "released", got {self.fecl_form!r}')
        if self.fecl_form == "released" and self.foreground_share != self.background_share:
            raise ValueError("the released FeCL needs equal shares of foreground and background: it ignores no patch")
        if self.fecl_form == "released" and self.mixing != "none":
            raise ValueError("the released FeCL knows no mixed images")


class DyCON(Method):
    r"""The method of "DyCON: Dynamic Uncertainty-aware Consistency and Contrastive Learning", arXiv:2504.04566.

    .. math::
        L = L_{sup}(\text{labeled}) + r(t) \left[ w_u L_{UnCL}(\text{all}) + w_f L_{FeCL}(\text{all}) \right]

    UnCL compares student and teacher at full resolution. FeCL contrasts the patches of an encoder stage; a patch's
    class comes from the ground truth in the labeled half and from the teacher's prediction in the unlabeled half.

    Of regions, a voxel's distance and entropy in UnCL are means over them, and a patch's class is the combination of
    regions that fills most of its foreground (`nnunet_dycon.features.patch_codes`): nested regions make as many classes
    as there are regions, and patches are alike only if all of their regions are.

    Deviations from the paper and the released code (commit 69c1384):

    - the released code takes the patch classes of unlabeled images from their ground truth. Here these never exist;
    - both terms are ramped up (`DyCONSettings.rampup`), in the release they are on from the first step. Its third
      term, a mean squared error with a weight of nearly 0, is left out;
    - what the student sees may be mixed (`mixing`), and the teacher's output with it;
    - the teacher sees the weak view in eval mode; in the release noise is added to it, and it keeps its dropout;
    - patches are classed by the area of their foreground, with a band that is ignored; the release looks at the
      central 2×2×2 voxels of each cell;
    - an anchor's entropy is the mean over its cell of the entropy of the student's softmax. The paper's "gambling
      softmax" is equal to a softmax;
    - neither paper nor code knows regions.

    Args:
        network: the student's network.
        supervision: how to learn from labels.
        settings: the constants.
        stage: the encoder stage that FeCL looks at; not needed without FeCL.
    """

    teacher: EMATeacher
    head: ProjectionHead | None

    def __init__(
        self,
        network: nn.Module,
        supervision: Supervision,
        settings: DyCONSettings,
        stage: FeatureStage | None = None,
    ) -> None:
        super().__init__(supervision)
        self.settings = settings
        self.head = settings.build_head(network, stage)
        self.uses_features = self.head is not None
        self.teacher = EMATeacher(network, self.head, stage, settings.ema_decay)

    def forward(
        self,
        student: Student,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch,
        progress: float,
    ) -> Terms:
        settings, kind = self.settings, self.supervision.kind
        half, strong = len(labeled), unlabeled.strong
        teacher = self.teacher(torch.cat([getattr(batch, settings.teacher_view) for batch in (labeled, unlabeled)]))
        mix = mixture(settings.mixing, half, len(strong), strong.shape[2:], strong.device, settings.box)
        output = student(mix(labeled.strong, strong))
        # The labels of each voxel: ground truth where a labeled image shows, else the teacher's.
        truth, known = kind.truth(labeled)
        pseudo = kind.labels(teacher.logits[0][half:])
        labels, known = mix(truth, pseudo), mix(known, torch.ones_like(pseudo, dtype=torch.bool))

        supervised = self.supervised(output, labeled, mix)
        terms, weighted = {"supervised": supervised}, []
        monitors: Terms = {}
        if settings.uncl_weight != 0:
            beta = monitors["beta"] = settings.beta(progress)
            teacher_logits = mix(teacher.logits[0][:half], teacher.logits[0][half:])
            compared = slice(half if settings.uncl_half == "unlabeled" else 0, None)
            terms["uncl"] = settings.consistency(kind, output.logits[0][compared], teacher_logits[compared], beta)
            weighted.append(settings.uncl_weight * terms["uncl"])
        if self.uses_features:
            patches = settings.patches(kind, labels, known, output)
            on_grid = mix.on_grid(output.features.shape[2:])
            teacher_features = on_grid(teacher.features[:half], teacher.features[half:])
            terms["fecl"] = self._contrast(output, teacher_features, patches, half, progress)
            weighted.append(settings.fecl_weight * terms["fecl"])
            monitors["ignored_patches"] = (patches == IGNORED_PATCH).float().mean()
        ramp = monitors["ramp"] = sigmoid_rampup(progress, end=settings.rampup)
        monitors |= kind.monitors(kind.labels(output.logits[0]), labels, ~mix.truth)
        return {"loss": supervised + ramp * sum(weighted), **terms, **monitors}

    def _contrast(
        self, output: StudentOutput, teacher_features: torch.Tensor, patches: torch.Tensor, half: int, progress: float
    ) -> torch.Tensor:
        settings = self.settings
        embedding, teacher_embedding = self.head(output.features), self.teacher.embed(teacher_features)
        if settings.fecl_form == "released":  # the labeled half takes no part in it
            return fecl_released_loss(
                embedding[half:],
                patches[half:],
                teacher_embedding=teacher_embedding[half:],
                temperature=settings.temperature,
                gamma=settings.gamma,
                cross_threshold=0.3 + 0.2 * sigmoid_rampup(progress),  # the release's, over all of its training
            )
        return settings.contrast(self.supervision.kind, output, embedding, teacher_embedding, patches)
