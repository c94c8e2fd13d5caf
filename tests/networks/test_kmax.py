"""Tests of the k-means mask transformer against loops over its equations."""

import math

import pytest
import torch

from nnunet_dycon.components.features import FeatureTap
from nnunet_dycon.networks import DKUXNet, kmax
from nnunet_dycon.networks.kmax import (
    CenterUpdate,
    KMaXDecoder,
    assign,
    cluster_means,
    group_sizes,
    merged,
    respond,
)
from nnunet_dycon.networks.uxnet import Architecture
from tests.networks.architectures import architecture

SIZES = [2, 2, 1]  # numbers of queries of the groups, 5 in total


@pytest.fixture
def parts():
    """Return embedded voxels (2, 3, 7), kernels (2, 5, 3) and class logits (2, 5, 4)."""
    torch.manual_seed(0)
    shapes = ((2, 3, 7), (2, 5, 3), (2, 5, 4))
    return [torch.randn(*shape).mul(2).requires_grad_() for shape in shapes]


def by_voxels(embedded, kernels, classes):
    """Compute segmentation and query distribution with a loop over voxels."""
    logits, queries = torch.zeros(2, 4, 7), torch.zeros(2, 3, 7)
    for b in range(2):
        for i in range(7):
            similarity = [sum((kernels[b, n, c] * embedded[b, c, i]).item() for c in range(3)) for n in range(5)]
            total = sum(math.exp(s) for s in similarity)
            responses = [math.exp(s) / total for s in similarity]
            for k in range(4):
                logits[b, k, i] = sum(r * classes[b, n, k].item() for n, r in enumerate(responses))
            for g, members in enumerate(([0, 1], [2, 3], [4])):
                queries[b, g, i] = math.log(sum(responses[n] for n in members))
    return logits, queries


def test_response_equals_the_equations(parts):
    torch.testing.assert_close(respond(*parts, SIZES), by_voxels(*parts), rtol=1e-4, atol=1e-5)


def test_query_distribution_sums_to_1(parts):
    torch.testing.assert_close(respond(*parts, SIZES)[1].exp().sum(1), torch.ones(2, 7))


def dense(embedded, kernels, classes):
    """Compute the same with all responses at once and the gradient of autograd."""
    log_responses = (kernels @ embedded).log_softmax(1)
    return classes.transpose(1, 2) @ log_responses.exp(), merged(log_responses, SIZES)


def test_gradient_equals_autograd(parts):
    weights = torch.randn(2, 4, 7), torch.randn(2, 3, 7)
    gradients = []
    for function in (lambda *parts: respond(*parts, SIZES), dense):
        loss = sum((answer * weight).sum() for answer, weight in zip(function(*parts), weights))
        gradients.append(torch.autograd.grad(loss, parts))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("entries", [1, 30])
def test_blocks_change_neither_value_nor_gradient(parts, entries, monkeypatch):
    def value_and_gradients():
        logits, queries = respond(*parts, SIZES)
        loss = (logits.square().sum() + (queries * torch.arange(7)).sum()).sin()
        return logits, queries, *torch.autograd.grad(loss, parts)

    whole = value_and_gradients()
    monkeypatch.setitem(kmax._BLOCK_ENTRIES, "cpu", entries)
    torch.testing.assert_close(value_and_gradients(), whole)


def test_no_matrix_of_queries_and_voxels_is_saved_for_the_backward_pass(monkeypatch):
    monkeypatch.setitem(kmax._BLOCK_ENTRIES, "cpu", 64 * 100)
    embedded, kernels, classes = (
        torch.randn(*shape, requires_grad=True) for shape in ((1, 4, 5000), (1, 64, 4), (1, 64, 2))
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        respond(embedded, kernels, classes, [32, 32])
    assert 0 < max(kept) <= 4 * 5000


def test_query_distribution_below_the_float32_range_has_a_finite_logarithm():
    embedded = torch.tensor([[[1.0], [0.0]]])
    kernels = torch.tensor([[[500.0, 0.0], [0.0, 0.0]]]).requires_grad_()
    _, queries = respond(embedded, kernels, torch.zeros(1, 2, 2), [1, 1])
    queries.sum().backward()
    torch.testing.assert_close(queries[0, :, 0], torch.tensor([0.0, -500.0]))
    assert kernels.grad.isfinite().all()


def test_autocast_changes_neither_assignment_nor_response_nor_gradient(parts):
    def value_and_gradients():
        logits, queries = respond(*parts, SIZES)
        return logits, queries, *torch.autograd.grad(logits.sum() + queries.square().sum(), parts)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_gradients()
        assigned = assign(*parts[:2])
    torch.testing.assert_close(inside, value_and_gradients(), rtol=0, atol=0)
    assert torch.equal(assigned, assign(*parts[:2]))


def test_queries_are_merged_group_by_group():
    responses = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]).view(1, 5, 1)
    torch.testing.assert_close(merged(responses.log(), SIZES).exp().flatten(), torch.tensor([0.3, 0.45, 0.25]))


@pytest.mark.parametrize(("queries", "groups"), [(128, 2), (128, 3), (7, 7), (9, 4)])
def test_groups_contain_all_queries_and_differ_by_at_most_1(queries, groups):
    sizes = group_sizes(queries, groups)
    assert sum(sizes) == queries
    assert len(sizes) == groups
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_too_few_queries_raise():
    with pytest.raises(ValueError, match="a query of its own: there are 4 classes, but only 3 queries"):
        KMaXDecoder(Architecture(**architecture([4, 8])), num_classes=4, queries=3)


def test_a_voxel_is_assigned_to_the_query_most_similar_to_it(parts, monkeypatch):
    embedded, kernels, _ = parts
    expected = [
        [max(range(5), key=lambda n: (kernels[b, n] @ embedded[b, :, i]).item()) for i in range(7)] for b in range(2)
    ]
    for entries in (2**24, 1):
        monkeypatch.setitem(kmax._BLOCK_ENTRIES, "cpu", entries)
        assignment = assign(embedded, kernels)
        assert assignment.tolist() == expected
        assert not assignment.requires_grad


def test_cluster_means_equal_a_loop_over_voxels():
    torch.manual_seed(0)
    values, assignment = torch.randn(2, 3, 7), torch.tensor([[0, 0, 2, 2, 2, 0, 4], [1, 1, 1, 1, 1, 1, 1]])
    means = cluster_means(values, assignment, 5)
    for b in range(2):
        for n in range(5):
            members = [values[b, :, i] for i in range(7) if assignment[b, i] == n]
            expected = torch.stack(members).mean(0) if members else torch.zeros(3)
            torch.testing.assert_close(means[b, n], expected)


def test_update_has_a_gradient_and_does_not_depend_on_the_patch_size():
    torch.manual_seed(0)
    update = CenterUpdate(width=8, channels=3)
    centers, values = torch.randn(1, 5, 8), torch.randn(1, 3, 7, requires_grad=True)
    assignment = torch.tensor([[0, 0, 2, 2, 2, 0, 4]])
    once = update(centers, values, assignment)
    twice = update(centers, values.repeat(1, 1, 2), assignment.repeat(1, 2))
    torch.testing.assert_close(once, twice)
    once.square().sum().backward()
    assert (values.grad.abs().sum(1) > 0).all()


def test_order_of_voxels_does_not_matter(parts):
    embedded, kernels, classes = parts
    order = torch.randperm(7)
    there = respond(embedded[:, :, order], kernels, classes, SIZES)
    back = [part[:, :, order] for part in respond(embedded, kernels, classes, SIZES)]
    torch.testing.assert_close(list(there), back)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return DKUXNet(1, 3, deep_supervision=True, queries=12, **architecture([4, 8, 16]))


def test_tap_returns_queries_at_all_resolutions_in_training_mode_only(network):
    tap = FeatureTap(network, "kmax")
    keys, images = set(network.state_dict()), torch.randn(2, 1, 8, 8, 16)
    logits = network(images)
    output = tap.take()
    assert [level.shape for level in output.queries] == [level.shape for level in logits]
    for level in output.queries:
        torch.testing.assert_close(level.exp().sum(1), torch.ones_like(level[:, 0]))
    assert set(network.state_dict()) == keys
    network.eval()(images)
    assert tap.take() is None


def test_gradients_of_segmentation_and_queries_reach_the_assignment(network):
    """In the release no gradient reaches the embedding of voxels below the highest resolution."""
    tap = FeatureTap(network, "kmax")
    logits = network(torch.randn(2, 1, 8, 8, 16))
    queries = tap.take().queries
    for level, index in zip(network.kmax.levels, (1, 0)):
        for answer in (logits[index], queries[index]):
            # Without biases: those before a norm, and those of the kernels before a softmax, have a gradient of 0.
            both = [*level.embedding.named_parameters(), *level.kernels.named_parameters()]
            weights = [parameter for name, parameter in both if name.endswith("weight")]
            gradients = torch.autograd.grad(answer.square().sum(), weights, retain_graph=True)
            assert min(gradient.abs().max() for gradient in gradients) > 0.01


def test_query_distribution_can_be_trained(network):
    """The image has three stripes of different brightness, one for each class."""
    tap = FeatureTap(network, "kmax")
    target = torch.arange(16).mul(3).div(16, rounding_mode="floor").expand(1, 8, 8, 16)
    images = target[:, None].float() + 0.1 * torch.randn(1, 1, 8, 8, 16)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    accuracies = []
    for _ in range(30):
        optimizer.zero_grad()
        network(images)
        queries = tap.take().queries[0]
        accuracies.append((queries.argmax(1) == target).float().mean().item())
        torch.nn.functional.nll_loss(queries, target).backward()
        optimizer.step()
    assert accuracies[0] < 0.6 < 0.9 < accuracies[-1]


def test_compiled_network_returns_the_same_logits_and_queries(network):
    images = torch.randn(2, 1, 8, 8, 16)
    tap = FeatureTap(network, "kmax")
    network(images)
    expected = tap.take()
    compiled = torch.compile(network, backend="eager")
    compiled(images)
    output = tap.take()
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.queries, expected.queries)
    torch.stack([level.sum() for level in output.queries]).sum().backward()
    assert all(p.grad is not None for p in network.kmax.levels[-1].embedding.parameters())
