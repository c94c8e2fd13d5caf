"""Tests of the training step of methods on regions: the terms equal the sigmoid forms of the losses."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool3d

from nnunet_dycon.components.batches import LabeledBatch, StudentOutput
from nnunet_dycon.components.diagnostics import pseudo_region_diagnostics, terms_of_loss
from nnunet_dycon.components.features import draw_voxels, patch_codes, pool_to_patches
from nnunet_dycon.components.label_space import RegionLabels, region_codes
from nnunet_dycon.components.mixing import mixture
from nnunet_dycon.losses import (
    class_prototypes,
    consistency_loss,
    entropy_filtered_loss,
    fecl_loss,
    mistake_region_loss,
    prototype_contrast_loss,
    query_consistency_loss,
    query_distribution_loss,
    rectified_cross_pseudo_loss,
    reliable_labels,
    sigmoid_entropy,
    uncl_loss,
)
from nnunet_dycon.methods import (
    CPS,
    UGPL,
    CPSSettings,
    DKUXNet,
    DKUXNetSettings,
    DyCON,
    DyCONCoTraining,
    DyCONSettings,
    DyCONTerms,
    MeanTeacher,
    MeanTeacherSettings,
    PseudoLabels,
    PseudoLabelSettings,
    Supervision,
    UGPLSettings,
)
from tests.tiny_network import (
    FULL_RESOLUTION,
    STAGE,
    QueryStudent,
    Student,
    TinyQueries,
    TinyUNet,
    batch_of_regions,
    both_outputs,
)

GRID = (4, 4, 4)


def supervised_loss(logits, targets):
    """Binary cross-entropy of the voxels that are not ignored."""
    losses = []
    for level, target in zip(logits, targets):
        known = ~target[:, 2:] if target.shape[1] > 2 else torch.ones_like(target[:, :1])
        each = binary_cross_entropy_with_logits(level, target[:, :2].float(), reduction="none")
        losses.append((each * known).sum() / known.sum())
    return sum(losses) / len(losses)


@pytest.fixture(params=[False, True], ids=["all known", "some ignored"])
def labeled(request) -> LabeledBatch:
    return batch_of_regions(request.param)


def space_of(labeled: LabeledBatch) -> RegionLabels:
    return RegionLabels(has_ignore_label=labeled.full_resolution.shape[1] == 3)


def supervision(labeled: LabeledBatch) -> Supervision:
    label_space = space_of(labeled)
    return Supervision(supervised_loss, label_space.weighted_loss((0.7, 0.3), batch_dice=False), label_space)


def truth(labeled: LabeledBatch) -> tuple[torch.Tensor, torch.Tensor]:
    target = labeled.targets[0]
    known = ~target[:, 2:] if target.shape[1] > 2 else torch.ones_like(target[:, :1])
    return target[:, :2], known


def build(method, settings, labeled, stage=None):
    torch.manual_seed(0)
    network = TinyUNet(heads=2)
    network.deep_supervision = False
    arguments = (network, supervision(labeled), settings)
    built = method(*arguments, stage) if method is DyCON else method(*arguments)
    for parameter in built.teacher.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    network.deep_supervision = True
    return built, Student(network, stage)


def build_two(method, settings, labeled, stage=None):
    torch.manual_seed(0)
    network, second = TinyUNet(heads=2), TinyUNet(heads=2)
    built = method(supervision(labeled), settings, second, *(() if stage is None else (stage,)))
    return built, Student(network, stage)


def patches(labels, known):
    return patch_codes(region_codes(labels), GRID, known=known)


@pytest.mark.parametrize("mixing", ["none", "copy_paste"])
def test_dycon_terms(mixing, labeled, unlabeled):
    settings = DyCONSettings(uncl_weight=4.0, embedding_width=8, mixing=mixing, gamma=2.0, entropy_weight=0.5)
    method, student = build(DyCON, settings, labeled, STAGE)
    torch.manual_seed(5)
    terms = method(student, labeled, unlabeled, progress=1.0)
    torch.manual_seed(5)
    mix = mixture(mixing, 2, 3, (8, 8, 8), torch.device("cpu"))
    output = StudentOutput(student.network(mix(labeled.strong, unlabeled.strong)), student.tap.take())
    teacher = method.teacher(torch.cat([labeled.weak, unlabeled.weak]))
    of_labeled, of_unlabeled = teacher.logits[0][:2], teacher.logits[0][2:]
    uncl = uncl_loss(output.logits[0], mix(of_labeled, of_unlabeled), 0.5, entropy_weight=0.5, sigmoid=True)
    torch.testing.assert_close(terms["uncl"], uncl)

    labels, known = truth(labeled)
    labels, known = mix(labels, of_unlabeled > 0), mix(known[:, 0], torch.ones(3, 8, 8, 8, dtype=torch.bool))
    on_grid = mix.on_grid(GRID)
    fecl = fecl_loss(
        method.head(output.features),
        patches(labels, known),
        teacher_embedding=method.teacher.embed(on_grid(teacher.features[:2], teacher.features[2:])),
        anchor_entropy=pool_to_patches(sigmoid_entropy(output.logits[0]).mean(1), GRID),
    )
    torch.testing.assert_close(terms["fecl"], fecl)
    assert fecl > 0
    torch.testing.assert_close(terms["loss"], terms["supervised"] + 4 * uncl + 0.5 * fecl)
    expected = pseudo_region_diagnostics(output.logits[0] > 0, labels, ~mix.truth)
    torch.testing.assert_close({name: terms[name] for name in expected}, expected)
    if mixing == "none":
        torch.testing.assert_close(
            terms["supervised"], supervised_loss([level[:2] for level in output.logits], labeled.targets)
        )


def test_patches_of_different_regions_have_different_classes(labeled, unlabeled):
    """Patches of the outer and the inner region have different classes."""
    labels, known = truth(labeled)
    classes = patches(labels, known[:, 0])
    assert set(classes.flatten().tolist()) == {0, 1, 3} | ({-1} if not known.all() else set())


def test_mean_teacher_terms(labeled, unlabeled):
    method, student = build(MeanTeacher, MeanTeacherSettings(), labeled)
    terms = method(student, labeled, unlabeled, progress=1.0)
    logits = student.network(torch.cat([labeled.strong, unlabeled.strong]))[0][2:]
    teacher = method.teacher(unlabeled.weak).logits[0]
    torch.testing.assert_close(terms["consistency"], consistency_loss(logits, teacher, sigmoid=True))
    expected = pseudo_region_diagnostics(logits > 0, teacher > 0)
    torch.testing.assert_close({name: terms[name] for name in expected}, expected)


@pytest.mark.parametrize("mixing", ["none", "cutmix", "copy_paste"])
def test_pseudo_labels_are_weighted_region_by_region(mixing, labeled, unlabeled):
    settings = PseudoLabelSettings(mixing=mixing, confidence=0.6)
    method, student = build(PseudoLabels, settings, labeled)
    torch.manual_seed(5)
    terms = method(student, labeled, unlabeled, progress=1.0)
    torch.manual_seed(5)
    mix = mixture(mixing, 2, 3, (8, 8, 8), torch.device("cpu"))
    logits = student.network(mix(labeled.strong, unlabeled.strong))
    teacher = method.teacher(unlabeled.weak).logits[0]
    probability = teacher.sigmoid()
    weights = (torch.maximum(probability, 1 - probability) >= 0.6).float()
    assert (weights[:, 0] != weights[:, 1]).any()
    assert 0.05 < (weights > 0).float().mean() < 0.95

    weighted = space_of(labeled).weighted_loss((0.7, 0.3), batch_dice=False)
    none = torch.zeros(2, 2, 8, 8, 8)
    mixed_weights = mix(none, weights)
    loss = weighted(logits, mix(none.bool(), teacher > 0), mixed_weights)
    mean_weight = mixed_weights.sum() / (2 * (~mix.truth).sum())
    torch.testing.assert_close(terms["pseudo"], mean_weight * loss)
    if mixing == "copy_paste":
        labels, known = truth(labeled)
        shown_known = mix(known.expand_as(labels).float(), torch.zeros(3, 2, 8, 8, 8))
        shown_labels = mix(labels, torch.zeros(3, 2, 8, 8, 8, dtype=torch.bool))
        torch.testing.assert_close(terms["supervised"], weighted(logits, shown_labels, shown_known))


def ways(outputs):
    first, second = outputs
    return ("", first, second), ("_second", second, first)


def test_cps_terms(labeled, unlabeled):
    built, student = build_two(CPS, CPSSettings(), labeled)
    terms = built(student, labeled, unlabeled, progress=1.0)
    weighted = space_of(labeled).weighted_loss((0.7, 0.3), batch_dice=False)
    for suffix, own, peer in ways(both_outputs(built, student, labeled, unlabeled)):
        labels = peer.logits[0] > 0
        torch.testing.assert_close(terms[f"cross{suffix}"], weighted(own.logits, labels, torch.ones(labels.shape)))


def test_cotraining_terms(labeled, unlabeled):
    settings = DyCONTerms(entropy_weight=0.0, gamma=0.0, embedding_width=8)
    built, student = build_two(DyCONCoTraining, settings, labeled, STAGE)
    terms = built(student, labeled, unlabeled, progress=1.0)
    labels, known = truth(labeled)
    for suffix, own, peer in ways(both_outputs(built, student, labeled, unlabeled)):
        uncl = uncl_loss(own.logits[0], peer.logits[0], 0.5, entropy_weight=0.0, sigmoid=True)
        torch.testing.assert_close(terms[f"uncl{suffix}"], uncl)
        everywhere = torch.cat([known[:, 0], torch.ones(3, 8, 8, 8, dtype=torch.bool)])
        fecl = fecl_loss(
            built.head(own.features),
            patches(torch.cat([labels, peer.logits[0][2:] > 0]), everywhere),
            teacher_embedding=built.head(peer.features),
            anchor_entropy=pool_to_patches(sigmoid_entropy(own.logits[0]).mean(1), GRID),
            gamma=0.0,
        )
        torch.testing.assert_close(terms[f"fecl{suffix}"], fecl)


def test_ugpl_terms(labeled, unlabeled):
    built, student = build_two(UGPL, UGPLSettings(contrast_voxels=16), labeled, FULL_RESOLUTION)
    torch.manual_seed(5)
    terms = built(student, labeled, unlabeled, progress=0.5)
    outputs = both_outputs(built, student, labeled, unlabeled)
    pseudo, reliable = reliable_labels(*(output.logits[0][2:] for output in outputs), 0.5, sigmoid=True)
    torch.manual_seed(5)
    drawn = [draw_voxels(pseudo[:, r].long(), ~reliable[:, r], 16, 2) for r in range(2)]
    labels, known = truth(labeled)
    known = known.expand_as(labels)
    for suffix, own, peer in ways(outputs):
        logits, peer_logits = own.logits[0], peer.logits[0]
        mistake = mistake_region_loss(logits[:2], peer_logits[:2], labels, known, sigmoid=True)
        torch.testing.assert_close(terms[f"mistake{suffix}"], mistake)
        torch.testing.assert_close(
            terms[f"cross{suffix}"], rectified_cross_pseudo_loss(logits, peer_logits, sigmoid=True)
        )
        filtered = entropy_filtered_loss(logits[2:], pseudo, reliable, sigmoid=True)
        torch.testing.assert_close(terms[f"filtered{suffix}"], filtered)
        contrasts = []
        for r in range(2):
            inside = torch.cat([labels[:, r], pseudo[:, r]]).long()
            prototypes, present = class_prototypes(
                own.features, inside, torch.cat([known[:, r], reliable[:, r]]), classes=2
            )
            anchors = own.features[2:].movedim(1, -1).reshape(-1, 4)[drawn[r].index]
            contrasts.append(prototype_contrast_loss(anchors, drawn[r].labels, prototypes, present, drawn[r].valid))
        torch.testing.assert_close(terms[f"contrast{suffix}"], sum(contrasts) / 2)
        assert all(contrast > 0 for contrast in contrasts)


def test_query_consistency_terms(labeled, unlabeled):
    torch.manual_seed(0)
    method = DKUXNet(supervision(labeled), DKUXNetSettings())
    student = QueryStudent(TinyQueries(), stage=None)
    terms = method(student, labeled, unlabeled, progress=1.0)
    _, queries = student.network(torch.cat([labeled.weak, labeled.strong]))
    losses = []
    for level, target in zip(queries, labeled.targets):
        twice = torch.cat([target, target])
        known = ~twice[:, 2:] if twice.shape[1] > 2 else torch.ones_like(twice[:, :1])
        losses.append(query_distribution_loss(level, twice[:, :2], known.expand(-1, 2, -1, -1, -1), sigmoid=True))
    torch.testing.assert_close(terms["query"], (losses[0] + 0.5 * losses[1]) / 1.5)
    (strong, strong_queries), (weak, weak_queries) = map(student.network, (unlabeled.strong, unlabeled.weak))
    torch.testing.assert_close(terms["segmentation_consistency"], consistency_loss(strong[0], weak[0], sigmoid=True))
    torch.testing.assert_close(terms["query_consistency"], query_consistency_loss(strong_queries[0], weak_queries[0]))


TEACHERS = [
    (DyCON, DyCONSettings(embedding_width=8), STAGE),
    (MeanTeacher, MeanTeacherSettings(), None),
    (PseudoLabels, PseudoLabelSettings(), None),
]
PAIRS = [
    (CPS, CPSSettings(), None),
    (DyCONCoTraining, DyCONTerms(embedding_width=8), STAGE),
    (UGPL, UGPLSettings(contrast_voxels=16), FULL_RESOLUTION),
]


def moved(network: nn.Module) -> set[str]:
    found = {
        name.partition(".")[0]
        for name, parameter in network.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("method", "settings", "stage"), TEACHERS + PAIRS)
def test_gradients_of_each_term_reach_only_the_trained_network(method, settings, stage, labeled, unlabeled):
    built, student = (build if method in {m for m, *_ in TEACHERS} else build_two)(method, settings, labeled, stage)
    terms = built(student, labeled, unlabeled, progress=0.5)
    names = terms_of_loss(terms)
    assert len(names) >= 2
    for name in names:
        terms[name].backward(retain_graph=True)
        of_first = moved(student.network)
        of_second = moved(built.second) if hasattr(built, "second") else set()
        own, other = (of_second, of_first) if name.endswith("_second") else (of_first, of_second)
        assert own == ({"encoder"} if name.startswith("fecl") else {"encoder", "decoder"}), name
        assert not other, name
        if built.teacher is not None:
            assert all(parameter.grad is None for parameter in built.teacher.parameters())


@pytest.mark.parametrize(("method", "settings", "stage"), TEACHERS + PAIRS)
def test_regions_in_ignored_voxels_do_not_change_the_loss(method, settings, stage, unlabeled):
    """Setting the regions of ignored voxels, which nnU-Net's targets leave at 0, does not change the loss."""
    labeled = batch_of_regions(has_ignore_label=True)
    targets = []
    for target in labeled.targets:
        target = target.clone()
        target[:, :2] |= target[:, 2:]
        targets.append(target)
    losses = []
    for batch in (labeled, replace(labeled, targets=targets)):
        built, student = (build if method in {m for m, *_ in TEACHERS} else build_two)(method, settings, labeled, stage)
        torch.manual_seed(5)
        losses.append(built(student, batch, unlabeled, progress=1.0)["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_the_test_batches_contain_ignored_voxels():
    target = batch_of_regions(has_ignore_label=True).targets[0]
    assert 0 < target[:, 2].float().mean() < 0.5
    assert not (target[:, :2] & target[:, 2:]).any()
    assert max_pool3d(target[:, 1:2].float(), 8).all()
