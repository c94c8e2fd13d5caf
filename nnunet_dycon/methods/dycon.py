"""DyCON: uncertainty-aware consistency and focal entropy-aware contrastive loss with an EMA teacher."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.components.batches import LabeledBatch, StudentOutput, UnlabeledBatch
from nnunet_dycon.components.defaults import BOX_FRACTION, EMA_DECAY, RAMPUP
from nnunet_dycon.components.ema_teacher import EMATeacher
from nnunet_dycon.components.features import IGNORED_PATCH, FeatureStage, ProjectionHead, pool_to_patches
from nnunet_dycon.components.label_space import LabelSpace
from nnunet_dycon.components.method import Method, Student, Supervision, Terms
from nnunet_dycon.components.mixing import check_mixture, mixture
from nnunet_dycon.components.schedules import exponential_decay, sigmoid_rampup
from nnunet_dycon.losses import fecl_loss, fecl_released_loss, uncl_loss


@dataclass(frozen=True)
class DyCONTerms:
    """Settings of DyCON's losses UnCL and FeCL, between student and teacher or between two students.

    UnCL is the uncertainty-aware consistency loss (`uncl_loss`), FeCL the focal entropy-aware contrastive loss
    (`fecl_loss`) between patches. A patch is a cell of the feature grid of an encoder stage. FeCL compares each patch,
    called the anchor, with the other patches of its image. The patches of a different class are the negatives of the
    anchor. The defaults are the paper's values, except beta_start and beta_end, which are those of the released code,
    and rampup, top_k, foreground_fraction and background_fraction, which are our choices.

    Attributes:
        uncl_weight: the weight of UnCL after the ramp-up; 0 omits UnCL.
        fecl_weight: the weight of FeCL after the ramp-up; 0 omits FeCL and its projection head.
        beta_start: β of UnCL, the factor of the entropies, at the start of training.
        beta_end: β of UnCL at the end of training.
        entropy_weight: η, the weight of the entropy term in UnCL; 0 omits this term.
        rampup: the length of the ramp-up of UnCL and FeCL as a fraction of the training.
        embedding_width: the number of channels of the embeddings, which the projection head computes for FeCL.
        temperature: the temperature τ of FeCL.
        gamma: the exponent γ of the focal weights in FeCL; 0 omits the focal weights.
        top_k: the number of hard negatives of each anchor in FeCL: the negatives whose embedding by the teacher or peer
            is most similar to that of the anchor.
        foreground_fraction: a patch is foreground if at least this fraction of its annotated voxels is foreground.
        background_fraction: a patch is background if at most this fraction of its annotated voxels is foreground. FeCL
            ignores patches whose fraction is between the two limits.
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
    foreground_fraction: float = 0.25
    background_fraction: float = 0.05

    def beta(self, progress: float) -> float:
        """Return β of UnCL at a training progress in [0, 1]: exponential decay from ``beta_start`` to ``beta_end``."""
        return exponential_decay(progress, self.beta_start, self.beta_end)

    def build_head(self, network: nn.Module, stage: FeatureStage | None) -> ProjectionHead | None:
        """Build the projection head of FeCL on the network's device, or return None if the weight of FeCL is 0.

        Args:
            network: a network; only its device is used.
            stage: the encoder stage whose features the head embeds.

        Raises:
            ValueError: FeCL is used, but no encoder stage is given.
        """
        if self.fecl_weight == 0:
            return None
        if stage is None:
            raise ValueError(
                "FeCL needs the features of an encoder stage, but stage is None; pass a stage or set fecl_weight=0"
            )
        return ProjectionHead(stage.channels, self.embedding_width).to(next(network.parameters()).device)

    def consistency(
        self, label_space: LabelSpace, logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float
    ) -> torch.Tensor:
        """Return the uncertainty-aware consistency loss (UnCL), a scalar, between a student and its teacher or peer.

        Args:
            label_space: whether logits are of classes or regions.
            logits: (B, C, *spatial), the student's logits.
            teacher_logits: (B, C, *spatial), the logits of the teacher or peer.
            beta: β of `uncl_loss` at this point of the training, as returned by `DyCONTerms.beta`.
        """
        return uncl_loss(logits, teacher_logits, beta, entropy_weight=self.entropy_weight, sigmoid=label_space.sigmoid)

    def patches(
        self, label_space: LabelSpace, labels: torch.Tensor, known: torch.Tensor, output: StudentOutput
    ) -> torch.Tensor:
        """Return the class of each of the N patches (cells of the feature grid), (B, N) integers.

        Class 0 is background. For regions, each combination of regions is a class. The class is `IGNORED_PATCH` (-1) if
        the foreground fraction of a patch is between ``background_fraction`` and ``foreground_fraction``, or if less
        than half of its voxels are annotated. Voxels with pseudo-labels count as annotated.

        Args:
            label_space: whether labels are classes or regions.
            labels: ground truth or pseudo-labels of the voxels: (B, *spatial) integers or, for regions,
                (B, R, *spatial) booleans.
            known: boolean, of the same shape as ``labels``, False for voxels that are not annotated.
            output: the student's output. The shape of its features is the feature grid.
        """
        return label_space.patches(
            labels,
            known,
            output.features.shape[2:],
            output.logits[0].shape[1],
            foreground_fraction=self.foreground_fraction,
            background_fraction=self.background_fraction,
        )

    def contrast(
        self,
        label_space: LabelSpace,
        output: StudentOutput,
        embedding: torch.Tensor,
        teacher_embedding: torch.Tensor,
        patches: torch.Tensor,
    ) -> torch.Tensor:
        """Return the contrastive loss FeCL between the patches of each image, a scalar; see `fecl_loss`.

        Args:
            label_space: whether labels are classes or regions.
            output: the student's output, from which the entropy of each patch is computed.
            embedding: (B, N, D), the student's embeddings of the N patches.
            teacher_embedding: (B, N, D), embeddings of the teacher or peer, from which hard negatives are chosen.
            patches: (B, N), the class of each patch, from the method `patches`.
        """
        entropy = label_space.voxel_entropy(output.logits[0].detach())
        return fecl_loss(
            embedding,
            patches,
            teacher_embedding=teacher_embedding,
            anchor_entropy=pool_to_patches(entropy, output.features.shape[2:]),
            temperature=self.temperature,
            gamma=self.gamma,
            top_k=self.top_k,
            ignore_label=IGNORED_PATCH,
        )


@dataclass(frozen=True)
class DyCONSettings(DyCONTerms):
    """Settings of DyCON: the settings of UnCL and FeCL (`DyCONTerms`), and the following.

    Attributes:
        ema_decay: the decay of the EMA teacher.
        fecl_form: "paper" for `fecl_loss` on labeled and unlabeled images, or "released" for `fecl_released_loss` on
            unlabeled images only, as in the released code. "released" cannot ignore patches that are neither foreground
            nor background, so foreground_fraction and background_fraction must be equal. "released" also requires
            that mixing is "none".
        mixing: how boxes are exchanged between the images of the student's batch: "none", "cutmix" or "copy_paste", see
            `nnunet_dycon.components.mixing.mixture`.
        box_fraction: the length of a pasted box as a fraction of each axis.
    """

    ema_decay: float = EMA_DECAY
    fecl_form: str = "paper"
    mixing: str = "none"
    box_fraction: float = BOX_FRACTION

    def __post_init__(self) -> None:
        check_mixture(self.mixing, self.box_fraction)
        if self.fecl_form not in ("paper", "released"):
            raise ValueError(f'fecl_form must be "paper" or "released", got {self.fecl_form!r}')
        if self.fecl_form == "released" and self.foreground_fraction != self.background_fraction:
            raise ValueError(
                'fecl_form="released" does not support ignored patches, which are those between '
                "background_fraction and foreground_fraction; set both to the same value"
            )
        if self.fecl_form == "released" and self.mixing != "none":
            raise ValueError('fecl_form="released" does not support mixed images; set mixing to "none"')


class DyCON(Method):
    r"""DyCON, the method of "DyCON: Dynamic Uncertainty-aware Consistency and Contrastive Learning", arXiv:2504.04566.

    .. math::
        L = L_{sup}(\text{labeled}) + r(t) \left[ w_u L_{UnCL}(\text{all}) + w_f L_{FeCL}(\text{all}) \right]

    with the ramp-up factor r, the weights w, and nnU-Net's loss :math:`L_{sup}`. UnCL, the uncertainty-aware
    consistency loss, compares the predictions of student and teacher at full resolution (`uncl_loss`). FeCL, the focal
    entropy-aware contrastive loss, compares the embeddings of patches (`fecl_loss`). A patch is a cell of the feature
    grid of an encoder stage. Its class is taken from the ground truth for labeled images and from the teacher's
    prediction for unlabeled images.

    For regions, the distance and the entropy of a voxel in UnCL are means over regions. The class of a patch in FeCL is
    the most frequent combination of regions in its foreground (`patch_codes`), so R nested regions give R foreground
    classes. Two patches are positives of each other only if they have the same combination.

    Deviations from the paper and the released code (commit 69c1384):

    - the released code takes the patch classes of unlabeled images from their ground truth. Here unlabeled images have
      no ground truth;
    - UnCL and FeCL are ramped up (`DyCONSettings.rampup`). In the release they have their full weight from the first
      step;
    - the third term of the release, a mean squared error with a weight of nearly 0, is omitted;
    - boxes of the student's images can be exchanged (`DyCONSettings.mixing`). The teacher's output is then mixed in the
      same way;
    - the teacher is in eval mode, and its input is the weak view. The release adds noise to the teacher's input and
      keeps its dropout active;
    - the class of a patch depends on its foreground fraction. Patches with an intermediate fraction are ignored. The
      release uses the central 2×2×2 voxels of each cell;
    - the entropy of an anchor patch in FeCL is the entropy of the student's softmax, averaged over the voxels of the
      patch. The paper's "gambling softmax" is identical to the softmax;
    - neither paper nor code supports regions.

    Args:
        network: the student's network.
        supervision: the losses between logits and labels, and the label space.
        settings: see `DyCONSettings`.
        stage: the encoder stage whose features FeCL uses; not needed if the weight of FeCL is 0.
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
        settings, label_space = self.settings, self.supervision.label_space
        half, strong = len(labeled), unlabeled.strong
        teacher = self.teacher(torch.cat([labeled.weak, unlabeled.weak]))
        mix = mixture(settings.mixing, half, len(strong), strong.shape[2:], strong.device, settings.box_fraction)
        output = student(mix(labeled.strong, strong))
        # Labels of each voxel: ground truth for voxels from labeled images, else the teacher's.
        truth, known = label_space.truth(labeled)
        pseudo = label_space.labels(teacher.logits[0][half:])
        labels, known = mix(truth, pseudo), mix(known, torch.ones_like(pseudo, dtype=torch.bool))

        supervised = self.supervised(output, labeled, mix)
        terms, weighted = {"supervised": supervised}, []
        diagnostics: Terms = {}
        if settings.uncl_weight != 0:
            beta = diagnostics["beta"] = settings.beta(progress)
            teacher_logits = mix(teacher.logits[0][:half], teacher.logits[0][half:])
            terms["uncl"] = settings.consistency(label_space, output.logits[0], teacher_logits, beta)
            weighted.append(settings.uncl_weight * terms["uncl"])
        if self.uses_features:
            patches = settings.patches(label_space, labels, known, output)
            on_grid = mix.on_grid(output.features.shape[2:])
            teacher_features = on_grid(teacher.features[:half], teacher.features[half:])
            terms["fecl"] = self._contrast(output, teacher_features, patches, half, progress)
            weighted.append(settings.fecl_weight * terms["fecl"])
            diagnostics["ignored_patches"] = (patches == IGNORED_PATCH).float().mean()
        ramp = diagnostics["ramp"] = sigmoid_rampup(progress, end=settings.rampup)
        diagnostics |= label_space.diagnostics(label_space.labels(output.logits[0]), labels, ~mix.truth)
        return {"loss": supervised + ramp * sum(weighted), **terms, **diagnostics}

    def _contrast(
        self, output: StudentOutput, teacher_features: torch.Tensor, patches: torch.Tensor, half: int, progress: float
    ) -> torch.Tensor:
        settings = self.settings
        embedding, teacher_embedding = self.head(output.features), self.teacher.embed(teacher_features)
        if settings.fecl_form == "released":  # of the unlabeled half only
            return fecl_released_loss(
                embedding[half:],
                patches[half:],
                teacher_embedding=teacher_embedding[half:],
                temperature=settings.temperature,
                gamma=settings.gamma,
                cross_threshold=0.3 + 0.2 * sigmoid_rampup(progress),  # as in the release, over the whole training
            )
        return settings.contrast(self.supervision.label_space, output, embedding, teacher_embedding, patches)
