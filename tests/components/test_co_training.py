"""Tests of co-training methods: loss terms, and which parameters the gradient of each term reaches."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from nnunet_dycon.components.batches import LabeledBatch
from nnunet_dycon.components.diagnostics import terms_of_loss
from nnunet_dycon.components.features import draw_voxels, patch_labels, pool_to_patches
from nnunet_dycon.components.label_space import ClassLabels
from nnunet_dycon.losses import (
    WeightedDiceCELoss,
    class_prototypes,
    entropy_filtered_loss,
    fecl_loss,
    mistake_region_loss,
    prototype_contrast_loss,
    rectified_cross_pseudo_loss,
    reliable_labels,
    softmax_entropy,
    uncl_loss,
)
from nnunet_dycon.methods import CPS, UGPL, CPSSettings, DyCONCoTraining, DyCONTerms, Supervision, UGPLSettings
from nnunet_dycon.registry import TRAINERS
from tests.tiny_network import (
    FULL_RESOLUTION,
    STAGE,
    Student,
    TinyUNet,
    both_outputs,
    labeled_batch,
    supervised_loss,
    unlabeled_batch,
)

METHODS = {
    "nnUNetTrainerCPS": (CPS, CPSSettings(), None),
    "nnUNetTrainerUGPL": (UGPL, UGPLSettings(contrast_voxels=16), FULL_RESOLUTION),
    "nnUNetTrainerDyCONCoTraining": (
        DyCONCoTraining,
        DyCONTerms(entropy_weight=0.0, gamma=0.0, embedding_width=8),
        STAGE,
    ),
}
every_method = pytest.mark.parametrize("name", METHODS)
WEIGHTED = WeightedDiceCELoss((0.7, 0.3))


def build(name: str, **changes):
    method, settings, stage = METHODS[name]
    settings = replace(settings, **changes)
    torch.manual_seed(0)
    network, second = TinyUNet(), TinyUNet(width=5 if stage is None else 4)
    supervision = Supervision(supervised_loss, WEIGHTED, ClassLabels(ignore_label=2))
    built = method(supervision, settings, second, *(() if stage is None else (stage,)))
    return built, Student(network, stage if built.uses_features else None)


def test_all_co_training_methods_are_tested():
    with_second = {name for name, trainer in TRAINERS.items() if trainer.companion == "second"}
    assert with_second == METHODS.keys()


@every_method
def test_loss_is_the_weighted_sum_of_both_networks_terms(name, labeled, unlabeled):
    built, student = build(name)
    torch.manual_seed(5)
    terms = built(student, labeled, unlabeled, progress=0.2)
    assert len(student.images) == 1
    ramp = torch.tensor(-5 * (1 - 0.2 / 0.4) ** 2).exp().item()
    weights = {"supervised": 1.0} | built.weights(ramp)
    names = terms_of_loss(terms)
    assert {term.removesuffix("_second") for term in names} == weights.keys()
    assert len(names) == 2 * len(weights)
    expected = sum(weights[term.removesuffix("_second")] * terms[term] for term in names)
    torch.testing.assert_close(terms["loss"], expected)
    for suffix, output in zip(("", "_second"), both_outputs(built, student, labeled, unlabeled)):
        loss = supervised_loss([level[:2] for level in output.logits], labeled.targets)
        torch.testing.assert_close(terms[f"supervised{suffix}"], loss)
        assert all(terms[f"{term}{suffix}"] > 0 for term in weights)


def both_ways(built, student, labeled, unlabeled):
    first, second = both_outputs(built, student, labeled, unlabeled)
    return ("", first, second), ("_second", second, first)


def test_cps_uses_the_peers_labels_at_all_resolutions(labeled, unlabeled):
    built, student = build("nnUNetTrainerCPS")
    terms = built(student, labeled, unlabeled, progress=1.0)
    for suffix, own, peer in both_ways(built, student, labeled, unlabeled):
        labels = peer.logits[0].argmax(1)
        torch.testing.assert_close(terms[f"cross{suffix}"], WEIGHTED(own.logits, labels, torch.ones(labels.shape)))


@pytest.mark.parametrize("ignored", [False, True])
def test_ugpl_terms_equal_its_losses(labeled, unlabeled, ignored):
    if ignored:
        full = labeled.targets[0].clone()
        full[:, :, :3] = 2
        labeled = LabeledBatch(labeled.weak, labeled.strong, [full, labeled.targets[1]], labeled.keys)
    built, student = build("nnUNetTrainerUGPL")
    built.supervision = replace(built.supervision, loss=lambda logits, targets: sum(x.sum() for x in logits) * 0)
    torch.manual_seed(5)
    terms = built(student, labeled, unlabeled, progress=0.5)
    first, second = both_outputs(built, student, labeled, unlabeled)
    labels, reliable = reliable_labels(first.logits[0][2:], second.logits[0][2:], 0.5)
    torch.manual_seed(5)
    drawn = draw_voxels(labels, ~reliable, 16, 2)
    target, known = ClassLabels(ignore_label=2).truth(labeled)
    assert known.all() != ignored
    for suffix, own, peer in both_ways(built, student, labeled, unlabeled):
        logits, peer_logits = own.logits[0], peer.logits[0]
        mistake = mistake_region_loss(logits[:2], peer_logits[:2], target, known)
        prototypes, present = class_prototypes(
            own.features, torch.cat([target, labels]), torch.cat([known, reliable]), classes=2
        )
        anchors = own.features[2:].movedim(1, -1).reshape(-1, 4)[drawn.index]
        contrast = prototype_contrast_loss(anchors, drawn.labels, prototypes, present, drawn.valid)
        torch.testing.assert_close(terms[f"mistake{suffix}"], mistake)
        torch.testing.assert_close(terms[f"cross{suffix}"], rectified_cross_pseudo_loss(logits, peer_logits))
        torch.testing.assert_close(terms[f"filtered{suffix}"], entropy_filtered_loss(logits[2:], labels, reliable))
        torch.testing.assert_close(terms[f"contrast{suffix}"], contrast)
    assert terms["kept_fraction"] == pytest.approx(0.5, abs=0.01)


def test_ugpl_kept_fraction_increases(labeled, unlabeled):
    built, student = build("nnUNetTrainerUGPL")
    fractions = [built(student, labeled, unlabeled, progress)["kept_fraction"].item() for progress in (0.0, 0.5, 1.0)]
    assert fractions == pytest.approx([0.2, 0.5, 0.8], abs=0.01)


def test_dycon_cotraining_terms_equal_its_losses(labeled, unlabeled):
    built, student = build("nnUNetTrainerDyCONCoTraining")
    terms = built(student, labeled, unlabeled, progress=0.5)
    beta = 5.0 * 0.1**0.5
    for suffix, own, peer in both_ways(built, student, labeled, unlabeled):
        torch.testing.assert_close(
            terms[f"uncl{suffix}"], uncl_loss(own.logits[0], peer.logits[0], beta, entropy_weight=0.0)
        )
        label_map = torch.cat([labeled.targets[0][:, 0], peer.logits[0][2:].argmax(1)])
        fecl = fecl_loss(
            built.head(own.features),
            patch_labels(label_map, (4, 4, 4), 2),
            teacher_embedding=built.head(peer.features),
            anchor_entropy=pool_to_patches(softmax_entropy(own.logits[0]), (4, 4, 4)),
            gamma=0.0,
        )
        torch.testing.assert_close(terms[f"fecl{suffix}"], fecl)


def reached(modules: dict[str, nn.Module]) -> set[str]:
    return {
        name
        for name, module in modules.items()
        if any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    }


def arrivals(name: str) -> dict[str, set[str]]:
    """Return for each term the parts that its gradient reaches."""
    found = {}
    for term in terms_of_loss(build(name)[0](build(name)[1], labeled_batch(), unlabeled_batch(), 0.5)):
        built, student = build(name)
        built(student, labeled_batch(), unlabeled_batch(), progress=0.5)[term].backward()
        parts = {
            f"{which}, {part}": getattr(network, part)
            for which, network in (("first", student.network), ("second", built.second))
            for part in ("encoder", "decoder")
        }
        if getattr(built, "head", None) is not None:
            parts["head"] = built.head
        found[term] = reached(parts)
    return found


@every_method
def test_gradients_of_a_term_reach_only_the_trained_network(name):
    for term, parts in arrivals(name).items():
        own, peer = ("second", "first") if term.endswith("_second") else ("first", "second")
        assert f"{own}, encoder" in parts, term
        assert not any(part.startswith(peer) for part in parts), term
        of_encoder = term.removesuffix("_second") == "fecl"  # fecl uses features of the encoder
        assert (f"{own}, decoder" in parts) != of_encoder, term
        assert ("head" in parts) == term.startswith("fecl"), term


@pytest.mark.parametrize(
    ("name", "setting", "term"),
    [("nnUNetTrainerUGPL", f"{term}_weight", term) for term in ("mistake", "cross", "filtered", "contrast")]
    + [("nnUNetTrainerDyCONCoTraining", f"{term}_weight", term) for term in ("uncl", "fecl")],
)
def test_term_with_weight_0_is_omitted(name, setting, term, labeled, unlabeled):
    built, student = build(name, **{setting: 0.0})
    terms = built(student, labeled, unlabeled, progress=0.5)
    assert not {term, f"{term}_second"} & terms.keys()
    assert built.uses_features == (term not in ("contrast", "fecl"))
    terms["loss"].backward()


@every_method
def test_second_network_labels_in_eval_mode_and_returns_to_training_mode(name, unlabeled):
    built, _ = build(name)
    with torch.no_grad():
        built.second.eval()
        expected = built.second(unlabeled.weak)[0]
        built.second.train()
    modes = []
    built.second.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    torch.testing.assert_close(built.label(unlabeled.weak), expected)
    assert modes == [False]
    assert built.second.training
    built.second.register_forward_hook(lambda *_: torch.zeros(()).index_select(1, torch.zeros(1, dtype=torch.long)))
    with pytest.raises((RuntimeError, IndexError)):
        built.label(unlabeled.weak)
    assert built.second.training
    assert built._second_tap is None or built._second_tap.take() is None


@every_method
def test_state_contains_the_second_network_but_not_the_first(name):
    built, student = build(name)
    children = {key for key, child in built.named_children()}
    assert children == {"second"} | ({"head"} if name == "nnUNetTrainerDyCONCoTraining" else set())
    own = {id(parameter) for parameter in built.parameters()}
    assert own.isdisjoint(map(id, student.network.parameters()))
    assert built.teacher is None


@pytest.mark.parametrize(
    ("name", "message"),
    [("nnUNetTrainerUGPL", "contrastive loss needs"), ("nnUNetTrainerDyCONCoTraining", "FeCL needs")],
)
def test_missing_feature_stage_raises(name, message):
    method, settings, _ = METHODS[name]
    with pytest.raises(ValueError, match=message):
        method(Supervision(supervised_loss, WEIGHTED), settings, TinyUNet())


def test_invalid_settings_raise():
    with pytest.raises(ValueError, match="kept_start and kept_end must be in"):
        UGPLSettings(kept_start=0.0)
    with pytest.raises(ValueError, match="contrast_voxels must be at least 1"):
        UGPLSettings(contrast_voxels=0)
