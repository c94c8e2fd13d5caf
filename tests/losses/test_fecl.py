"""Tests of FeCL against a reference with a double loop over pairs of patches, written with the math module."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from nnunet_dycon.components.features import ProjectionHead
from nnunet_dycon.losses import fecl_loss, fecl_reference
from nnunet_dycon.losses.kernels import fecl


def fecl_by_pairs(embedding, labels, teacher=None, entropy=None, *, tau=0.6, gamma=2.0, top_k=5, ignore=-1) -> float:
    """Compute Eqs. 3-6 of DyCON with a loop over all anchors and pairs of each image."""

    def unit(vector):
        length = math.sqrt(sum(x * x for x in vector))
        return [x / length for x in vector]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b))

    losses = []
    for b in range(len(embedding)):
        z = [unit(v) for v in embedding[b].tolist()]
        zt = None if teacher is None else [unit(v) for v in teacher[b].tolist()]
        y = labels[b].tolist()
        patches = range(len(z))
        for i in patches:
            if y[i] == ignore:
                continue
            positives = [k for k in patches if k != i and y[k] == y[i]]
            negatives = [q for q in patches if y[q] not in (y[i], ignore)]
            if not positives or not negatives:
                continue
            hard = 0.0
            if zt is not None:
                similar = sorted((dot(z[i], zt[q]) for q in negatives), reverse=True)[:top_k]
                hard = sum(math.exp(s / tau) for s in similar) / len(similar)
            denominator = sum(math.exp(dot(z[i], z[k]) / tau) for k in positives)
            for q in negatives:
                cosine = min(1.0, max(0.0, dot(z[i], z[q])))
                denominator += cosine**gamma * (math.exp(dot(z[i], z[q]) / tau) + hard)
            weight = math.exp(entropy[b, i].item()) if entropy is not None else 1.0
            terms = []
            for k in positives:
                s = dot(z[i], z[k])
                focal = (1 - min(1.0, max(0.0, s))) ** gamma * weight
                terms.append(-focal * math.log(math.exp(s / tau) / denominator))
            losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


def patches(batch=2, number=12, width=6, classes=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(batch, number, width, generator=generator, dtype=dtype)
    teacher = embedding + 0.5 * torch.randn(batch, number, width, generator=generator, dtype=dtype)
    labels = torch.randint(-1, classes, (batch, number), generator=generator)
    entropy = torch.rand(batch, number, generator=generator, dtype=dtype)
    return embedding, labels, teacher, entropy


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 5, 30])
def test_reference_equals_the_loop_over_pairs_and_the_kernel_its_gradient(gamma, top_k):
    embedding, labels, teacher, entropy = patches(batch=1)
    embedding.requires_grad_()
    labels = labels.clamp(min=0)  # the reference has no ignored patches
    z, z_t = (normalize(its[0], dim=-1) for its in (embedding, teacher))
    reference = fecl_reference(z, labels[0], z_t, entropy[0], 0.6, gamma, top_k)
    expected = fecl_by_pairs(embedding.detach(), labels, teacher, entropy, gamma=gamma, top_k=top_k)
    assert reference.item() == pytest.approx(expected, rel=1e-9)
    constants = {"teacher_embedding": teacher, "anchor_entropy": entropy, "gamma": gamma, "top_k": top_k}
    (of_reference,) = torch.autograd.grad(reference, embedding)
    (of_kernel,) = torch.autograd.grad(fecl_loss(embedding, labels, **constants), embedding)
    torch.testing.assert_close(of_kernel, of_reference, rtol=1e-8, atol=1e-12)


def test_value_computed_by_hand():
    """Cosines: c01 = 0.6 (the positive pair), c02 = 0, c12 = 0.8; anchor 2 has no positive. τ = 1, γ = 2.

    Anchor 0: 0.4² · -ln(e^0.6 / (e^0.6 + 0)) = 0. Anchor 1: 0.16 · -(0.6 - ln(e^0.6 + 0.64 e^0.8)).
    """
    embedding = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]], dtype=torch.float64)
    expected = 0.16 * -(0.6 - math.log(math.exp(0.6) + 0.64 * math.exp(0.8))) / 2
    loss = fecl_loss(embedding, torch.tensor([[0, 0, 1]]), temperature=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("tau", "gamma", "top_k"), [(0.6, 2.0, 5), (0.1, 1.0, 1), (1.0, 0.0, 100), (0.03, 3.5, 3)])
def test_equals_the_equation(with_teacher, with_entropy, tau, gamma, top_k):
    embedding, labels, teacher, entropy = patches()
    teacher = teacher if with_teacher else None
    entropy = entropy if with_entropy else None
    loss = fecl_loss(
        embedding, labels, teacher_embedding=teacher, anchor_entropy=entropy, temperature=tau, gamma=gamma, top_k=top_k
    )
    expected = fecl_by_pairs(embedding, labels, teacher, entropy, tau=tau, gamma=gamma, top_k=top_k)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_equals_supcon_without_focal_weights_and_teacher():
    """With all weights 1, FeCL equals SupConLoss of pytorch-metric-learning, an independent implementation."""
    SupConLoss = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss
    embedding, labels, *_ = patches(batch=1, number=20, classes=2, seed=3)
    labels = labels.abs()
    expected = SupConLoss(temperature=0.4)(embedding[0], labels[0])
    torch.testing.assert_close(fecl_loss(embedding, labels, temperature=0.4, gamma=0.0), expected)


@pytest.mark.parametrize("block_entries", [1, 400])
def test_blocks_change_neither_value_nor_gradient(monkeypatch, block_entries):
    embedding, labels, teacher, entropy = patches(number=50)
    results = []
    for entries in (fecl._BLOCK_ENTRIES["cpu"], block_entries):
        monkeypatch.setitem(fecl._BLOCK_ENTRIES, "cpu", entries)
        student = embedding.clone().requires_grad_()
        loss = fecl_loss(student, labels, teacher_embedding=teacher, anchor_entropy=entropy)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize(("tau", "gamma", "top_k"), [(0.6, 2.0, 5), (0.1, 1.0, 1), (1.0, 0.0, 100), (0.3, 3.5, 2)])
def test_gradient_matches_finite_differences(with_teacher, tau, gamma, top_k):
    embedding, labels, teacher, entropy = patches(number=7, width=4)
    constants = {"temperature": tau, "gamma": gamma, "top_k": top_k, "anchor_entropy": entropy}
    constants["teacher_embedding"] = teacher if with_teacher else None
    assert torch.autograd.gradcheck(lambda e: fecl_loss(e, labels, **constants), embedding.requires_grad_())


def test_gradient_reaches_only_the_student():
    embedding, labels, teacher, entropy = patches()
    for tensor in (embedding, teacher, entropy):
        tensor.requires_grad_()
    fecl_loss(embedding, labels, teacher_embedding=teacher, anchor_entropy=entropy).backward()
    assert embedding.grad[labels >= 0].abs().sum(-1).min() > 0
    assert embedding.grad[labels < 0].abs().max() == 0
    assert teacher.grad is None
    assert entropy.grad is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(9)), st.permutations(range(3)))
def test_order_of_patches_and_names_of_classes_do_not_matter(seed, order, names):
    embedding, labels, teacher, entropy = patches(number=9, seed=seed)
    relabeled = torch.where(labels < 0, labels, torch.tensor(names)[labels.clamp(min=0)] * 10)
    order = list(order)
    changed = fecl_loss(
        embedding[:, order],
        relabeled[:, order],
        teacher_embedding=teacher[:, order],
        anchor_entropy=entropy[:, order],
    )
    expected = fecl_loss(embedding, labels, teacher_embedding=teacher, anchor_entropy=entropy)
    torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize(("gamma", "collapses"), [(2.0, True), (0.0, False)])
def test_focal_weights_cause_a_collapse_of_the_head(gamma, collapses):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(32) % 4 == 0).long().repeat(2, 1)
    centres = torch.randn(2, 16, generator=generator)
    features = (centres[labels] + torch.randn(2, 32, 16, generator=generator)).relu()
    torch.manual_seed(0)
    head = ProjectionHead(16, 32)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.99, nesterov=True)
    for _ in range(60):
        embedding = head(features.transpose(1, 2))
        optimizer.zero_grad()
        fecl_loss(embedding, labels, teacher_embedding=embedding, gamma=gamma).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(embedding.detach()[0], dim=-1)
    across = (unit[labels[0] == 0] @ unit[labels[0] == 1].T).mean().item()
    assert across > 0.95 if collapses else across < 0


def test_length_of_embeddings_does_not_matter():
    embedding, labels, teacher, _ = patches()
    expected = fecl_loss(embedding, labels, teacher_embedding=teacher)
    torch.testing.assert_close(fecl_loss(7 * embedding, labels, teacher_embedding=0.1 * teacher), expected)


def test_every_term_of_the_equation_changes_the_loss():
    """In the released code the weights of the negatives and the entropy have no influence on the loss."""
    embedding, labels, teacher, entropy = patches()
    values = {
        fecl_loss(embedding, labels).item(),
        fecl_loss(embedding, labels, gamma=1.0).item(),
        fecl_loss(embedding, labels, teacher_embedding=teacher).item(),
        fecl_loss(embedding, labels, teacher_embedding=teacher, top_k=1).item(),
        fecl_loss(embedding, labels, anchor_entropy=entropy).item(),
    }
    assert len(values) == 5


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(2, 5, dtype=torch.long),
        torch.full((2, 5), -1),
        torch.arange(5).repeat(2, 1),
        torch.tensor([[0], [1]]),
    ],
    ids=["one class", "all ignored", "no positives", "single patches"],
)
def test_no_valid_anchor_gives_a_differentiable_zero(labels):
    embedding, _, teacher, entropy = patches(number=labels.shape[1])
    embedding.requires_grad_()
    loss = fecl_loss(embedding, labels, teacher_embedding=teacher, anchor_entropy=entropy)
    loss.backward()
    assert loss.item() == 0
    assert embedding.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.03, 0.6])
def test_half_precision_and_equal_embeddings_stay_finite(dtype, temperature):
    """Teacher equal to the student, all embeddings on one line: cosines of ±1, slightly beyond due to rounding."""
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor([1.0, 1, -1, -1, 1, -1])
    embedding = (signs[None, :, None] * direction * 100).to(dtype).requires_grad_()
    labels = torch.tensor([[0, 0, 1, 1, 1, 0]])
    loss = fecl_loss(embedding, labels, teacher_embedding=embedding.detach(), temperature=temperature)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(embedding.grad).all()


def test_autocast_does_not_lower_the_precision():
    embedding, labels, teacher, entropy = patches(dtype=torch.float32)
    results = []
    for enabled in (False, True):
        student = embedding.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = fecl_loss(student, labels, teacher_embedding=teacher, anchor_entropy=entropy)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.02}, "temperature must be at least 0.03"),
        ({"temperature": math.nan}, "temperature must be at least 0.03"),
        ({"gamma": 0.5}, "gamma must be 0 or at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"embedding": torch.zeros(3, 4)}, r"embedding must be \(B, N, D\)"),
        ({"patch_labels": torch.zeros(2, 3, dtype=torch.long)}, "patch_labels must be"),
        ({"patch_labels": torch.zeros(2, 12)}, "patch_labels must be integers"),
        ({"teacher_embedding": torch.zeros(2, 12, 5)}, "teacher_embedding must have the shape"),
        ({"anchor_entropy": torch.zeros(2, 11)}, "anchor_entropy must be"),
    ],
)
def test_invalid_arguments_raise(change, message):
    embedding, labels, *_ = patches()
    with pytest.raises(ValueError, match=message):
        fecl_loss(**{"embedding": embedding, "patch_labels": labels} | change)
