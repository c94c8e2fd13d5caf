"""Tests of the training step of methods: loss terms, gradients, and the views that each network sees."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from nnunet_dycon.components.batches import StudentOutput, UnlabeledBatch
from nnunet_dycon.components.diagnostics import terms_of_loss
from nnunet_dycon.components.features import patch_labels, pool_to_patches
from nnunet_dycon.components.label_space import ClassLabels
from nnunet_dycon.components.mixing import mixture
from nnunet_dycon.losses import (
    WeightedDiceCELoss,
    consistency_loss,
    fecl_loss,
    fecl_released_loss,
    query_consistency_loss,
    softmax_entropy,
    uncl_loss,
)
from nnunet_dycon.methods import (
    DKUXNet,
    DKUXNetSettings,
    DyCON,
    DyCONSettings,
    MeanTeacher,
    MeanTeacherSettings,
    PseudoLabels,
    PseudoLabelSettings,
    Supervision,
)
from tests.tiny_network import STAGE, QueryStudent, Student, TinyQueries, TinyUNet, supervised_loss

SETTINGS = DyCONSettings(uncl_weight=0.5, entropy_weight=1.0, gamma=2.0, embedding_width=8)


def build(method, settings):
    torch.manual_seed(0)
    network = TinyUNet()
    network.deep_supervision = False  # as in the trainer, so that the teacher has no deep supervision
    supervision = Supervision(supervised_loss, WeightedDiceCELoss((0.7, 0.3)), ClassLabels(ignore_label=2))
    if method is DyCON:
        stage = STAGE if settings.fecl_weight else None
        built = DyCON(network, supervision, settings, stage)
        # Avoid a similarity of exactly 1 between student and teacher.
        for parameter in built.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    else:
        built = method(network, supervision, settings)
    network.deep_supervision = True
    return built, Student(network, STAGE if built.uses_features else None)


def test_unlabeled_batch_has_no_field_for_labels():
    assert {field.name for field in fields(UnlabeledBatch)} == {"weak", "strong", "keys"}


def test_dycon_is_the_sum_of_its_terms(labeled, unlabeled):
    method, student = build(DyCON, SETTINGS)
    terms = method(student, labeled, unlabeled, progress=0.2)

    output = StudentOutput(student.network(torch.cat([labeled.strong, unlabeled.strong])), student.tap.take())
    teacher = method.teacher(torch.cat([labeled.weak, unlabeled.weak]))
    torch.testing.assert_close(terms["supervised"], supervised_loss([x[:2] for x in output.logits], labeled.targets))
    beta = 5.0 * (0.5 / 5.0) ** 0.2
    torch.testing.assert_close(terms["uncl"], uncl_loss(output.logits[0], teacher.logits[0], beta))
    label_map = torch.cat([labeled.targets[0][:, 0], teacher.logits[0][2:].argmax(1)])
    fecl = fecl_loss(
        method.head(output.features),
        patch_labels(label_map, (4, 4, 4), 2),
        teacher_embedding=method.teacher.embed(teacher.features),
        anchor_entropy=pool_to_patches(softmax_entropy(output.logits[0]), (4, 4, 4)),
    )
    torch.testing.assert_close(terms["fecl"], fecl)
    ramp = torch.tensor(-5 * (1 - 0.2 / 0.4) ** 2).exp()
    expected = terms["supervised"] + ramp * (0.5 * terms["uncl"] + 0.5 * terms["fecl"])
    torch.testing.assert_close(terms["loss"], expected)
    assert fecl > 0


def test_mean_teacher_is_the_sum_of_its_terms(labeled, unlabeled):
    method, student = build(MeanTeacher, MeanTeacherSettings(consistency_weight=3.0))
    terms = method(student, labeled, unlabeled, progress=1.0)
    logits = student.network(torch.cat([labeled.strong, unlabeled.strong]))
    expected = consistency_loss(logits[0][2:], method.teacher(unlabeled.weak).logits[0])
    torch.testing.assert_close(terms["consistency"], expected)
    torch.testing.assert_close(terms["loss"], terms["supervised"] + 3.0 * expected)


def run_step(method, student, labeled, unlabeled, progress=1.0, seed=0):
    """Return the terms of a step, the student's logits, and the mixture of the images."""
    torch.manual_seed(seed)
    terms = method(student, labeled, unlabeled, progress)
    torch.manual_seed(seed)
    settings = method.settings
    mix = mixture(settings.mixing, len(labeled), len(unlabeled), (8, 8, 8), torch.device("cpu"), settings.box_fraction)
    torch.testing.assert_close(student.images[-1], mix(labeled.strong, unlabeled.strong), rtol=0, atol=0)
    return terms, student.network(student.images[-1]), mix


@pytest.mark.parametrize("mixing", ["none", "cutmix"])
def test_pseudo_labels_below_the_confidence_threshold_are_excluded(mixing, labeled, unlabeled):
    method, student = build(PseudoLabels, PseudoLabelSettings(weight=2.0, confidence=0.6, mixing=mixing))
    terms, logits, mix = run_step(method, student, labeled, unlabeled, progress=0.2)
    confidence, labels = method.teacher(unlabeled.weak).logits[0].softmax(1).max(1)
    weights = (confidence >= 0.6).float()
    assert 0.1 < weights.mean() < 0.9
    labels, weights = mix(labels[:2], labels)[2:], mix(weights[:2], weights)[2:]
    loss = WeightedDiceCELoss((0.7, 0.3))([level[2:] for level in logits], labels, weights)
    torch.testing.assert_close(terms["supervised"], supervised_loss([x[:2] for x in logits], labeled.targets))
    torch.testing.assert_close(terms["pseudo"], weights.mean() * loss)
    ramp = torch.tensor(-5 * (1 - 0.2 / 0.4) ** 2).exp()
    torch.testing.assert_close(terms["loss"], terms["supervised"] + ramp * 2.0 * terms["pseudo"])


def test_copy_paste_supervises_each_voxel_with_its_own_label(labeled, unlabeled):
    """The expected loss of a mixed image has two parts, each with weight 0 for the voxels of the other part."""
    labeled.targets[0][0, 0, :2] = 2  # the ignore label
    method, student = build(PseudoLabels, PseudoLabelSettings(weight=0.5, mixing="copy_paste"))
    terms, logits, mix = run_step(method, student, labeled, unlabeled)
    assert len(student.images[-1]) == 6
    teacher_labels = method.teacher(unlabeled.weak).logits[0].argmax(1)
    everything = mix(labeled.targets[0][:, 0], teacher_labels)
    parts = {"supervised": mix.truth & (everything != 2), "pseudo": ~mix.truth}
    for name, part in parts.items():
        loss = WeightedDiceCELoss((0.7, 0.3))(logits, torch.where(part, everything, 0), part.float())
        torch.testing.assert_close(terms[name], loss)
    torch.testing.assert_close(terms["loss"], terms["supervised"] + 0.5 * terms["pseudo"])
    student_labels = logits[0].argmax(1)
    agreed = ((student_labels == 1) & (everything == 1) & ~mix.truth).sum()
    both = ((student_labels == 1) & ~mix.truth).sum() + ((everything == 1) & ~mix.truth).sum()
    torch.testing.assert_close(terms["student_teacher_dice"], 2 * agreed / both)


def test_teacher_with_decay_0_equals_the_student(labeled, unlabeled):
    method, student = build(PseudoLabels, PseudoLabelSettings(ema_decay=0.0))
    method.before_first_step()
    optimizer = torch.optim.SGD(student.network.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        method(student, labeled, unlabeled, progress=1.0)["loss"].backward()
        optimizer.step()
        method.after_optimizer_step()
        torch.testing.assert_close(method.teacher.network.state_dict(), student.network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("mixing", ["cutmix", "copy_paste"])
def test_dycon_mixes_the_teachers_output_like_the_images(mixing, labeled, unlabeled):
    method, student = build(DyCON, replace(SETTINGS, mixing=mixing))
    terms, logits, mix = run_step(method, student, labeled, unlabeled)
    features = student.tap.take()
    teacher = method.teacher(torch.cat([labeled.weak, unlabeled.weak]))
    teacher_logits = mix(teacher.logits[0][:2], teacher.logits[0][2:])
    torch.testing.assert_close(terms["uncl"], uncl_loss(logits[0], teacher_logits, 0.5))
    label_map = mix(labeled.targets[0][:, 0], teacher.logits[0][2:].argmax(1))
    teacher_features = mix.on_grid((4, 4, 4))(teacher.features[:2], teacher.features[2:])
    expected = fecl_loss(
        method.head(features),
        patch_labels(label_map, (4, 4, 4), 2),
        teacher_embedding=method.teacher.embed(teacher_features),
        anchor_entropy=pool_to_patches(softmax_entropy(logits[0]), (4, 4, 4)),
    )
    torch.testing.assert_close(terms["fecl"], expected)
    if mixing == "cutmix":
        torch.testing.assert_close(terms["supervised"], supervised_loss([x[:2] for x in logits], labeled.targets))
    else:
        truth = torch.where(mix.truth, label_map, 0)
        loss = WeightedDiceCELoss((0.7, 0.3))(logits, truth, mix.truth.float())
        torch.testing.assert_close(terms["supervised"], loss)


@pytest.mark.parametrize(("method", "settings"), [(DyCON, SETTINGS), (MeanTeacher, MeanTeacherSettings())])
def test_student_sees_strong_views_once_and_teacher_weak_views(method, settings, labeled, unlabeled):
    built, student = build(method, settings)
    seen = []
    built.teacher.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    built(student, labeled, unlabeled, progress=0.5)
    assert len(student.images) == 1
    torch.testing.assert_close(student.images[0], torch.cat([labeled.strong, unlabeled.strong]))
    weak = torch.cat([labeled.weak, unlabeled.weak]) if method is DyCON else unlabeled.weak
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], weak)


ENCODER = {"encoder.stages.0", "encoder.stages.1"}
DECODER = {"decoder.stages.0", "decoder.seg_layers.0", "decoder.seg_layers.1"}
REACHED = {
    "supervised": ENCODER | DECODER,
    "uncl": ENCODER | DECODER,
    "fecl": ENCODER | {"head"},
    "consistency": ENCODER | DECODER,
}


@pytest.mark.parametrize(
    ("method", "settings", "term"),
    [(DyCON, SETTINGS, name) for name in ("supervised", "uncl", "fecl")]
    + [(MeanTeacher, MeanTeacherSettings(), name) for name in ("supervised", "consistency")],
)
def test_gradients_of_each_term_reach_the_expected_modules(method, settings, term, labeled, unlabeled):
    built, student = build(method, settings)
    built(student, labeled, unlabeled, progress=0.5)[term].backward()
    reached = {
        name.rpartition(".")[0]
        for name, parameter in student.network.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    if method is DyCON and any(p.grad is not None and p.grad.abs().max() > 0 for p in built.head.parameters()):
        reached.add("head")
    assert reached == REACHED[term]
    assert all(parameter.grad is None for parameter in built.teacher.parameters())


def test_classes_of_unlabeled_patches_come_from_the_teacher_only(labeled, unlabeled):
    """With a teacher that predicts a single class, the unlabeled half has no negatives."""
    built, student = build(DyCON, SETTINGS)
    with torch.no_grad():
        built.teacher.network.decoder.seg_layers[1].bias[0] += 1e4
    fecl = built(student, labeled, unlabeled, progress=0.5)["fecl"]
    output = StudentOutput(student.network(torch.cat([labeled.strong, unlabeled.strong])), student.tap.take())
    teacher = built.teacher(torch.cat([labeled.weak, unlabeled.weak]))
    expected = fecl_loss(
        built.head(output.features)[:2],
        patch_labels(labeled.targets[0][:, 0], (4, 4, 4), 2),
        teacher_embedding=built.teacher.embed(teacher.features)[:2],
        anchor_entropy=pool_to_patches(softmax_entropy(output.logits[0][:2]), (4, 4, 4)),
    )
    torch.testing.assert_close(fecl, expected)


def test_released_form_of_fecl_uses_the_unlabeled_half_with_the_teachers_labels(labeled, unlabeled):
    settings = replace(SETTINGS, fecl_form="released", rampup=0.0, foreground_fraction=0.5, background_fraction=0.5)
    built, student = build(DyCON, settings)
    terms = built(student, labeled, unlabeled, progress=0.3)
    output = StudentOutput(student.network(torch.cat([labeled.strong, unlabeled.strong])), student.tap.take())
    teacher = built.teacher(torch.cat([labeled.weak, unlabeled.weak]))
    expected = fecl_released_loss(
        built.head(output.features)[2:],
        patch_labels(teacher.logits[0][2:].argmax(1), (4, 4, 4), 2, foreground_fraction=0.5, background_fraction=0.5),
        teacher_embedding=built.teacher.embed(teacher.features)[2:],
        cross_threshold=0.3 + 0.2 * math.exp(-5 * 0.7**2),
    )
    torch.testing.assert_close(terms["fecl"], expected)
    torch.testing.assert_close(terms["loss"], terms["supervised"] + 0.5 * terms["uncl"] + 0.5 * terms["fecl"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fecl_form": "published"}, "fecl_form must be"),
        ({"fecl_form": "released"}, "does not support ignored patches"),
        (
            {"fecl_form": "released", "foreground_fraction": 0.5, "background_fraction": 0.5, "mixing": "cutmix"},
            "does not support mixed images",
        ),
        ({"mixing": "mixup"}, "mixing must be one of"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        DyCONSettings(**settings)


@pytest.mark.parametrize(("weight", "term"), [("uncl_weight", "uncl"), ("fecl_weight", "fecl")])
def test_term_with_weight_0_is_omitted(weight, term, labeled, unlabeled):
    built, student = build(DyCON, replace(SETTINGS, **{weight: 0.0}))
    terms = built(student, labeled, unlabeled, progress=0.5)
    assert term not in terms
    assert (built.head is None) == (term == "fecl")
    assert built.uses_features == (term != "fecl")
    terms["loss"].backward()


def test_only_the_supervised_loss_remains_without_both_terms(labeled, unlabeled):
    built, student = build(DyCON, replace(SETTINGS, uncl_weight=0.0, fecl_weight=0.0))
    terms = built(student, labeled, unlabeled, progress=1.0)
    assert terms_of_loss(terms) == ["supervised"]
    torch.testing.assert_close(terms["loss"], terms["supervised"])


def test_teacher_starts_from_the_student_and_is_updated_each_step(labeled, unlabeled):
    built, student = build(DyCON, SETTINGS)
    built.before_first_step()
    torch.testing.assert_close(built.teacher.network.state_dict(), student.network.state_dict(), rtol=0, atol=0)
    optimizer = torch.optim.SGD([*student.network.parameters(), *built.head.parameters()], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        built(student, labeled, unlabeled, progress=0.5)["loss"].backward()
        optimizer.step()
        built.after_optimizer_step()
    assert built.teacher.updates == 3


def test_state_contains_teacher_and_head_but_not_the_student(labeled, unlabeled):
    built, _ = build(DyCON, SETTINGS)
    assert {key.split(".")[0] for key in built.state_dict()} == {"head", "teacher"}
    assert not any(isinstance(module, TinyUNet) for module in built.children())


def build_queries(settings):
    torch.manual_seed(0)
    supervision = Supervision(supervised_loss, WeightedDiceCELoss((0.7, 0.3)), ClassLabels(ignore_label=2))
    return DKUXNet(supervision, settings), QueryStudent(TinyQueries(), stage=None)


QUERY_SETTINGS = DKUXNetSettings(query_weight=0.3, segmentation_consistency_weight=2.0, query_consistency_weight=0.7)


def test_query_consistency_is_the_sum_of_its_terms(labeled, unlabeled):
    method, student = build_queries(QUERY_SETTINGS)
    terms = method(student, labeled, unlabeled, progress=0.2)
    views = {name: student.network(images) for name, images in (
        ("labeled", torch.cat([labeled.weak, labeled.strong])), ("weak", unlabeled.weak), ("strong", unlabeled.strong)
    )}  # fmt: skip
    targets = [torch.cat([level, level]) for level in labeled.targets]
    torch.testing.assert_close(terms["supervised"], supervised_loss(views["labeled"][0], targets))
    of_levels = [cross_entropy(level, target[:, 0]) for level, target in zip(views["labeled"][1], targets)]
    torch.testing.assert_close(terms["query"], (of_levels[0] + 0.5 * of_levels[1]) / 1.5)
    (strong, strong_queries), (weak, weak_queries) = views["strong"], views["weak"]
    torch.testing.assert_close(terms["segmentation_consistency"], consistency_loss(strong[0], weak[0]))
    torch.testing.assert_close(terms["query_consistency"], query_consistency_loss(strong_queries[0], weak_queries[0]))
    ramp = torch.tensor(-5 * (1 - 0.2 / 0.4) ** 2).exp()
    consistency = 2.0 * terms["segmentation_consistency"] + 0.7 * terms["query_consistency"]
    torch.testing.assert_close(terms["loss"], terms["supervised"] + 0.3 * terms["query"] + ramp * consistency)


def test_query_consistency_processes_both_views_in_one_forward_pass(labeled, unlabeled):
    method, student = build_queries(QUERY_SETTINGS)
    method(student, labeled, unlabeled, progress=0.5)
    (images,) = student.images
    torch.testing.assert_close(images, torch.cat([labeled.weak, labeled.strong, unlabeled.weak, unlabeled.strong]))


@pytest.mark.parametrize(
    ("term", "reached", "views"),
    [
        ("supervised", {"segmentation"}, [True, True, False, False]),
        ("query", {"queries"}, [True, True, False, False]),
        ("segmentation_consistency", {"segmentation"}, [False, False, False, True]),
        ("query_consistency", {"queries"}, [False, False, False, True]),
    ],
)
def test_gradients_of_each_query_consistency_term_reach_only_its_views(term, reached, views, labeled, unlabeled):
    """Labels supervise both views; the weak view of unlabeled images gets no gradient."""
    method, student = build_queries(QUERY_SETTINGS)
    outputs = []

    def remember(images):
        output = QueryStudent.__call__(student, images)
        for tensor in (*output.logits, *output.queries):
            tensor.retain_grad()
        outputs.append(output)
        return output

    method(remember, labeled, unlabeled, progress=0.5)[term].backward()
    arrived = {
        name.rpartition(".")[0]
        for name, parameter in student.network.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    assert arrived == reached
    (output,) = outputs
    gradient = (output.logits if reached == {"segmentation"} else output.queries)[0].grad
    assert [bool(part.any()) for part in gradient.split([2, 2, 3, 3])] == views


def test_ignored_voxels_are_excluded_from_the_query_loss(labeled, unlabeled):
    labeled.targets[0][0, 0, :2] = 2
    method, student = build_queries(QUERY_SETTINGS)
    method.supervision = replace(method.supervision, loss=lambda logits, targets: logits[0].sum())  # not tested here
    terms = method(student, labeled, unlabeled, progress=0.5)
    queries = student.network(torch.cat([labeled.weak, labeled.strong]))[1]
    targets = [torch.cat([level, level])[:, 0] for level in labeled.targets]
    of_levels = [cross_entropy(level, target, ignore_index=2) for level, target in zip(queries, targets)]
    torch.testing.assert_close(terms["query"], (of_levels[0] + 0.5 * of_levels[1]) / 1.5)


def test_query_loss_without_deep_supervision(labeled, unlabeled):
    method, student = build_queries(QUERY_SETTINGS)
    method.supervision = replace(method.supervision, loss=lambda logits, target: cross_entropy(logits[0], target[:, 0]))
    whole = student.network.forward
    student.network.forward = lambda images: tuple(levels[:1] for levels in whole(images))
    terms = method(student, replace(labeled, targets=labeled.targets[0]), unlabeled, progress=0.5)
    queries = student.network(torch.cat([labeled.weak, labeled.strong]))[1]
    expected = cross_entropy(queries[0], torch.cat([labeled.targets[0]] * 2)[:, 0])
    torch.testing.assert_close(terms["query"], expected)
