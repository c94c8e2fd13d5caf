"""Statistics: against SciPy, naive loops and hand counts; coverage of intervals in simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import bootstrap, wilcoxon

from nnunet_dycon.statistics import (
    FEWEST_DIFFERENCES,
    PairedBootstrap,
    SeedNoise,
    case_differences,
    holm,
    leave_one_out,
    pooled_seed_noise,
    signed_rank,
    tally,
)

BASE = np.linspace(0.3, 0.9, 6)


def interval(baseline, method, **options):
    """Of the difference, with the noise of the seeds of both."""
    scores = {"baseline": np.array(baseline), "method": np.array(method)}
    drawn = PairedBootstrap(scores, pooled_seed_noise(scores.values()), np.random.default_rng(0), **options)
    estimate = drawn.difference("method", "baseline")
    return estimate.low, estimate.high


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_interval_over_cases_is_scipys_paired_percentile_bootstrap(level):
    rng = np.random.default_rng(0)
    baseline = 0.8 + 0.1 * rng.standard_normal(24)
    method = baseline + 0.03 * rng.exponential(size=24)
    expected = bootstrap(
        (method, baseline),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True, vectorized=True, method="percentile", confidence_level=level, n_resamples=10_000, random_state=1,
    ).confidence_interval  # fmt: skip
    # The 2.5 % percentile of 10,000 normal draws has a standard error of 0.027 standard deviations; of the difference
    # of two it is 0.038, and 4 of them are allowed.
    tolerance = 0.15 * (method - baseline).std() / math.sqrt(24)
    assert interval([baseline], [method], level=level) == pytest.approx(tuple(expected), abs=tolerance)


def test_equal_differences_in_all_cases_and_seeds_leave_no_uncertainty():
    assert interval([BASE] * 2, [BASE + 0.1] * 2) == pytest.approx((0.1, 0.1))


def test_noise_of_seeds_alone_follows_a_t_distribution():
    """Two means of two seeds each, of standard deviation 0.01 / sqrt(2): t with 2 degrees of freedom."""
    ends = interval([BASE, BASE + 0.01], [BASE, BASE + 0.01])
    assert ends == pytest.approx(np.array([-1, 1]) * 4.303 * 0.01 / math.sqrt(2), rel=0.05)


def test_a_method_with_one_seed_gets_the_noise_of_the_others():
    low, high = interval([BASE, BASE + 0.01], [BASE + 0.005])
    sd = 0.01 / math.sqrt(2) * math.sqrt(1 + 1 / 2)
    # t with 1 degree of freedom; the percentile of 10,000 draws has a standard error of 6 %.
    assert (low, high) == pytest.approx((-12.706 * sd, 12.706 * sd), rel=0.2)


def test_intervals_are_reproducible_and_depend_on_the_seed():
    scores = {"a": BASE[None], "b": BASE[None] ** 2}
    first, second, other = (
        PairedBootstrap(scores, None, np.random.default_rng(s)).difference("a", "b") for s in (0, 0, 1)
    )
    assert first == second != other


def test_pooled_noise_by_hand():
    scores = [np.array([BASE, BASE + 0.1]), np.array([BASE, BASE + 0.3, BASE + 0.6]), BASE[None]]
    noise = pooled_seed_noise(scores)
    assert noise == SeedNoise(pytest.approx(math.sqrt((0.1**2 / 2 + 2 * 0.3**2) / 3)), 3)
    assert pooled_seed_noise([BASE[None]] * 2) is None


def test_share_of_the_gap():
    scores = {"lower": BASE[None], "method": BASE[None] + 0.03, "upper": BASE[None] + 0.04, "equal": BASE[None]}
    drawn = PairedBootstrap(scores, SeedNoise(1e-4, 20), np.random.default_rng(0))
    share = drawn.share_of_gap("method", "lower", "upper")
    assert share.value == pytest.approx(0.75)
    # sd of (method - lower) / (upper - lower), linearized: noise 1e-4 of each of the three means.
    sd = math.sqrt(1 + 0.25**2 + 0.75**2) * 1e-4 / 0.04
    assert (share.high - share.low) / 2 == pytest.approx(2.086 * sd, rel=0.05)  # t with 20 degrees of freedom
    assert drawn.share_of_gap("method", "lower", "equal") is None


@pytest.mark.parametrize("number", [6, 16, 60])
def test_signed_rank_is_scipys(number):
    differences = np.random.default_rng(number).normal(0.3, 1, number)
    result = signed_rank(differences)
    assert (result.p, result.non_zero) == (wilcoxon(differences).pvalue, number)


def test_exact_p_by_counting_sign_patterns():
    differences = np.array([3.0, -1.0, 4.0, 2.0, 7.0, -5.0, 6.0])
    ranks = np.argsort(np.argsort(abs(differences))) + 1
    observed = ranks[differences > 0].sum()
    sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=7)]
    expected = 2 * min(np.mean([s >= observed for s in sums]), np.mean([s <= observed for s in sums]))
    assert signed_rank(differences).p == pytest.approx(expected)


def test_differences_of_zero_are_left_out_of_the_test():
    differences = np.array([0.0, 1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 0.0])
    result = signed_rank(differences)
    assert (result.p, result.non_zero) == (wilcoxon(differences[differences != 0]).pvalue, 6)


def test_too_few_differences_have_no_p():
    assert signed_rank(np.arange(1.0, 6.0)).p is None  # 2 / 2^5 = 0.0625 is the least
    assert signed_rank(np.arange(1.0, 7.0)).p == 2 / 2**6
    assert signed_rank(np.zeros(20)).p is None
    assert FEWEST_DIFFERENCES == 6


def holm_by_loops(p_values):
    """The definition of statsmodels' multipletests(method="holm"), for each p-value on its own."""
    ordered = sorted(p_values)
    adjusted = []
    for p in p_values:
        rank = ordered.index(p)
        adjusted.append(min(1.0, max((len(p_values) - i) * ordered[i] for i in range(rank + 1))))
    return adjusted


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == [0.8, 0.8]
    assert holm([0.9, 0.9, 0.9]) == [1, 1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("number", [1, 2, 7, 30])
def test_holm_by_its_definition(number):
    p_values = np.random.default_rng(number).random(number) ** 3
    assert holm(p_values) == pytest.approx(holm_by_loops(list(p_values)), rel=1e-12)


def test_leave_one_out_by_brute_force():
    differences = np.random.default_rng(0).standard_normal(9)
    without = [np.delete(differences, i).mean() for i in range(9)]
    result = leave_one_out(differences)
    most = max(range(9), key=lambda i: abs(without[i] - differences.mean()))
    assert result.case == most
    assert (result.without, result.low, result.high) == pytest.approx((without[most], min(without), max(without)))


def test_tally_counts_the_direction_and_rounding_as_ties():
    baseline, method = np.array([[0.1, 0.2, 0.3, 0.5, 0.6]] * 3), np.array([[0.1, 0.3, 0.2, 0.7, 0.8]] * 3)
    method[0, 0], method[1, 0] = 0.1 + 1e-12, 0.1 - 2e-12
    differences = case_differences(method, baseline)
    assert differences == pytest.approx([0, 0.1, -0.1, 0.2, 0.2])
    counted = tally(differences, higher_is_better=True)
    assert (counted.wins, counted.losses, counted.ties) == (3, 1, 1)
    counted = tally(differences, higher_is_better=False)
    assert (counted.wins, counted.losses, counted.ties) == (1, 3, 1)


def simulate(rng, seeds, cases, *, own=0.014, seed=0.005, residual=0.01, run=0.0, skewed=False, factor=1.0):
    """Scores of methods of equal means: what differs is a case, a case for a method, a run, a seed, and the rest.

    Args:
        seeds: numbers of seeds.
        cases: number of cases.
        own: standard deviation of what a case adds for one method, skewed as a lognormal distribution if wanted.
        seed, residual: of what a seed adds to all cases, and to each.
        run: of what the draw of labeled cases adds to the run of the same number of all methods.
        factor: of the standard deviation of the seeds of methods 0 and 1.
    """
    case = 0.1 * rng.standard_normal(cases)
    common = run * rng.standard_normal((max(seeds), 1))
    scores = {}
    for method, number in enumerate(seeds):
        noise = rng.standard_normal(cases)
        if skewed and method:
            noise = (np.exp(noise) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
        scores[method] = case + own * noise + common[:number]
        scores[method] = scores[method] + (factor if method < 2 else 1) * seed * rng.standard_normal((number, 1))
        scores[method] = scores[method] + residual * rng.standard_normal((number, cases))
    return scores


def resampled_seeds(scores, rng, draws):
    """The difference of methods 1 and 0 where seeds are resampled as cases are: what PairedBootstrap does not do."""
    cases = scores[0].shape[1]
    weights = rng.multinomial(cases, np.full(cases, 1 / cases), draws) / cases
    means = [
        np.einsum("dc,dc->d", its[rng.integers(len(its), size=(draws, len(its)))].mean(1), weights)
        for its in (scores[0], scores[1])
    ]
    return means[1] - means[0]


def coverage(simulations, draws=1000, naive=False, **model):
    """The share of simulations whose interval of the difference of methods 1 and 0 has the true one, 0."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(simulations):
        scores = simulate(rng, **model)
        if naive:
            low, high = np.percentile(resampled_seeds(scores, rng, draws), (2.5, 97.5))
        else:
            drawn = PairedBootstrap(scores, pooled_seed_noise(scores.values()), rng, draws=draws)
            estimate = drawn.difference(1, 0)
            low, high = estimate.low, estimate.high
        inside += low <= 0 <= high
    return inside / simulations


# A coverage of 0.92 is measured with a standard error of sqrt(0.92 * 0.08 / n), one of 0.98 with sqrt(0.98 * 0.02 / n):
# with n = 1,000 simulations these are 0.0086 and 0.0044, of which 3 are allowed.
@pytest.mark.parametrize("cases", [16, 40])
@pytest.mark.parametrize("seeds", [(1, 1), (3, 3), (3, 3, 2, 1)])
def test_intervals_cover_what_they_promise(seeds, cases):
    seed = 0.0 if seeds == (1, 1) else 0.005  # without a second seed, the interval is for these trained models
    measured = coverage(1000, draws=600, seeds=seeds, cases=cases, seed=seed)
    assert 0.92 - 3 * 0.0086 <= measured <= 0.98 + 3 * 0.0044


# With 2,000 simulations, 3 standard errors are 0.018 at 0.92 and 0.009 at 0.98, 0.015 at 0.95.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "lowest", "highest"),
    [
        ({"seeds": (1, 1), "cases": 60, "seed": 0}, 0.93, 0.96),
        ({"seeds": (1, 1), "cases": 16, "seed": 0}, 0.90, 0.94),
        ({"seeds": (1, 1), "cases": 10, "seed": 0}, 0.88, 0.92),
        ({"seeds": (1, 1), "cases": 6, "seed": 0}, 0.84, 0.89),
        ({"seeds": (1, 1), "cases": 16, "seed": 0, "skewed": True, "own": 0.08}, 0.80, 0.93),
        ({"seeds": (2, 2), "cases": 16}, 0.95, 0.995),
        ({"seeds": (3, 3), "cases": 16}, 0.95, 0.99),
        ({"seeds": (5, 5), "cases": 16}, 0.94, 0.99),
        ({"seeds": (3, 3), "cases": 60}, 0.94, 0.98),
        ({"seeds": (3,) * 6, "cases": 16}, 0.94, 0.985),
        ({"seeds": (3, 3), "cases": 16, "own": 0.005, "seed": 0.01}, 0.94, 0.98),
        ({"seeds": (3, 3), "cases": 16, "own": 0.005, "seed": 0, "residual": 0.04}, 0.98, 1),
        ({"seeds": (3, 3), "cases": 16, "skewed": True, "own": 0.08}, 0.82, 0.96),
        ({"seeds": (3, 3), "cases": 16, "run": 0.02}, 0.98, 1),
        ({"seeds": (3,) * 6, "cases": 16, "factor": 4}, 0.7, 0.9),  # the assumption of equal noise does not hold
    ],
)
def test_coverage_in_other_settings(model, lowest, highest):
    measured, naive = coverage(2000, **model), coverage(2000, naive=True, **model)
    print(f"{model}: coverage {measured:.3f}, with resampled seeds {naive:.3f}")
    assert lowest <= measured <= highest
    if model.get("seed", 1) and "factor" not in model:
        assert measured > naive


@pytest.mark.slow
def test_coverage_of_the_share_of_the_gap():
    rng, inside, known = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        scores = simulate(rng, (3, 3, 3), 16)
        scores[1], scores[2] = scores[1] + 0.03, scores[2] + 0.05
        drawn = PairedBootstrap(scores, pooled_seed_noise(scores.values()), rng, draws=1000)
        share = drawn.share_of_gap(1, 0, 2)
        if share is not None:
            known += 1
            inside += share.low <= 0.6 <= share.high
    print(f"share of the gap: coverage {inside / known:.3f} of {known}")
    assert known > 1500
    assert 0.94 <= inside / known <= 0.99
