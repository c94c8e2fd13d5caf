"""Statistics of paired scores: bootstrap intervals over cases and seeds, signed-rank test, leave-one-out.

All functions take NumPy arrays. The scores of a method have the shape (seeds, cases). All methods are scored on the
same cases, in the same order; their numbers of seeds may differ.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from scipy.stats import wilcoxon

LEVEL = 0.95
DRAWS = 10_000
FEWEST_DIFFERENCES = 6  # the smallest two-sided p of 5 differences is 2 / 2^5 = 0.0625, that of 6 is 0.03125
DECIMALS = 9  # differences are rounded to this number, so that means with different rounding errors are ties

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds, low and high, of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of a method's mean score between training seeds, pooled over methods.

    Attributes:
        sd: the standard deviation between seeds; the score of a seed is its mean over the cases.
        degrees_of_freedom: the number of seeds minus 1, summed over the methods.
    """

    sd: float
    degrees_of_freedom: int


def pooled_seed_noise(scores: Iterable[np.ndarray], *, paired: bool = False) -> SeedNoise | None:
    """Estimate how much the mean score over cases varies between seeds, pooled over methods.

    Args:
        scores: the scores (seeds, cases) of each method. Other runs, such as subsets of labeled cases, can take the
            place of the seeds.
        paired: whether run i of all methods has the same labeled cases. Variation that is common to all methods is then
            excluded, since it cancels in differences between methods: the estimate is the residual standard deviation
            of a two-way analysis of variance.

    Returns:
        The pooled standard deviation with its degrees of freedom, or None if no method has at least two seeds.

    Raises:
        ValueError: `paired`, and there are fewer than two methods or the methods have different numbers of runs.
    """
    means = [its.mean(1) for its in scores]
    if paired:
        if len(means) < 2 or len({len(of) for of in means}) > 1:
            raise ValueError("paired runs need two or more methods with equal numbers of runs")
        table = np.array(means)
        residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        return SeedNoise(math.sqrt((residuals**2).sum() / freedom), freedom) if freedom else None
    freedom = sum(len(of) - 1 for of in means)
    if freedom == 0:
        return None
    return SeedNoise(math.sqrt(sum(((of - of.mean()) ** 2).sum() for of in means) / freedom), freedom)


class PairedBootstrap(Generic[Key]):
    """Bootstrap confidence intervals of differences between methods that are scored on the same cases.

    Each draw resamples the cases with replacement, with the same cases for all methods, and computes the mean score of
    each method over seeds and cases. The bounds of an interval are percentiles of the draws.

    Seeds are not resampled, because there are only 2 to 5 per method. Resampling S seeds gives a standard deviation
    that is too small by the factor sqrt((S - 1) / S), and ignores that this standard deviation is itself uncertain.
    Instead, if `noise` is given, normal noise with the standard deviation s / sqrt(S) is added to the mean score of a
    method with S seeds. For each draw, s = noise.sd * sqrt(f / chi²) is computed, with f = noise.degrees_of_freedom and
    a random number chi² from the chi-squared distribution with f degrees of freedom. The noise then follows a t
    distribution.

    Coverage of nominal 95 % intervals in simulations (`python -m benchmarks.coverage`):

    - 1 seed, without noise: 94 % with 60 cases, 92 % with 16, 90 % with 10, 86 % with 6. Percentile intervals of few
      cases are too narrow. These intervals hold for the trained models, not for other seeds.
    - 2 to 5 seeds, 16 or 60 cases: 95 % to 97 %. With resampled seeds, the coverage is 86 % to 93 %.
    - 3 seeds, 16 cases, of which a few cause most of the difference: 92 %.
    - 3 seeds, 16 cases, a seed changes the score of each case independently: 99 %. The interval is too wide, because
      it includes the variation between seeds twice: in the resampled cases and in the added noise.

    Assumptions:

    - All methods have the same standard deviation between seeds. If only two methods with equal numbers of seeds are
      given, their standard deviations may differ. If four of six methods have a quarter of the standard deviation of
      the two others, the pooled value is too small for these two, and the coverage of their difference is about 80 %.
    - Runs are independent. Runs on the same random subset of labeled cases are not independent. If there are several
      subsets, average the scores of each subset over its seeds, and pass one row of scores per subset. If a subset
      changes the scores of all methods equally, the change is counted as noise of each method, so intervals of
      differences are too wide, unless `noise` is estimated from paired runs.
    """

    def __init__(
        self,
        scores: Mapping[Key, np.ndarray],
        noise: SeedNoise | None,
        rng: np.random.Generator,
        *,
        draws: int = DRAWS,
        level: float = LEVEL,
    ) -> None:
        """
        Args:
            scores: maps each method (any hashable key, such as its name) to its scores (seeds, cases).
            noise: the result of `pooled_seed_noise`, estimated from all or some of these methods; None to ignore the
                variation between seeds.
            rng: random number generator; a fixed seed makes intervals reproducible.
            draws: number of times that the cases are resampled.
            level: nominal coverage of the intervals, such as 0.95.
        """
        self.level = level
        self.means = {key: float(its.mean()) for key, its in scores.items()}
        (number,) = {its.shape[1] for its in scores.values()}
        sd = np.zeros(draws)
        if noise is not None:
            sd = noise.sd * np.sqrt(noise.degrees_of_freedom / rng.chisquare(noise.degrees_of_freedom, draws))
        cases = rng.integers(number, size=(draws, number))
        self.draws = {
            key: its.mean(0)[cases].mean(1) + rng.standard_normal(draws) * sd / math.sqrt(len(its))
            for key, its in scores.items()
        }

    def difference(self, method: Key, baseline: Key) -> Estimate:
        """Return the mean score of a method minus the mean score of the baseline, with confidence interval."""
        return self._estimate(self.means[method] - self.means[baseline], self.draws[method] - self.draws[baseline])

    def share_of_gap(self, method: Key, lower: Key, upper: Key) -> Estimate | None:
        """Return (method - lower) / (upper - lower) of the mean scores: 0 at the lower bound, 1 at the upper bound.

        Args:
            method: the method to compare with both bounds.
            lower: the method that is the lower bound, such as supervised training on the labeled cases only.
            upper: the method that is the upper bound, such as supervised training with all labels.

        Returns:
            The fraction with confidence interval, or None if the interval of upper - lower is not entirely above 0:
            the denominator could then be 0.
        """
        gap = self.draws[upper] - self.draws[lower]
        if self._estimate(0, gap).low <= 0:
            return None
        value = (self.means[method] - self.means[lower]) / (self.means[upper] - self.means[lower])
        return self._estimate(value, (self.draws[method] - self.draws[lower]) / gap)

    def _estimate(self, value: float, draws: np.ndarray) -> Estimate:
        return _estimate(value, draws, self.level)


def _estimate(value: float, draws: np.ndarray, level: float) -> Estimate:
    tail = 50 * (1 - level)
    low, high = np.percentile(draws, (tail, 100 - tail))
    return Estimate(float(value), float(low), float(high))


def pooled_difference(data_sets: Sequence[PairedBootstrap[Key]], method: Key, baseline: Key) -> Estimate:
    """Return the mean over data sets of the difference between a method and the baseline, with confidence interval.

    All data sets have the same weight. The interval holds for the mean over these data sets, not for other data sets.

    Args:
        data_sets: a `PairedBootstrap` for each data set. All must contain both methods, have the same number of draws,
            and use independent random number generators.
        method: the method to compare with the baseline.
        baseline: the baseline.
    """
    values, draws = _differences(data_sets, method, baseline)
    return _estimate(values.mean(), draws.mean(0), data_sets[0].level)


def pooled_share_of_gap(
    data_sets: Sequence[PairedBootstrap[Key]], method: Key, lower: Key, upper: Key
) -> Estimate | None:
    """Return (mean of method - lower) / (mean of upper - lower) over data sets, with confidence interval.

    Return None if the interval of the denominator is not entirely above 0.

    Args:
        data_sets: a `PairedBootstrap` for each data set. All must contain the three methods, have the same number of
            draws, and use independent random number generators.
        method: the method to compare with both bounds.
        lower: the method that is the lower bound.
        upper: the method that is the upper bound.
    """
    if pooled_difference(data_sets, upper, lower).low <= 0:
        return None
    (values, draws), (gaps, gap_draws) = (_differences(data_sets, key, lower) for key in (method, upper))
    return _estimate(values.mean() / gaps.mean(), draws.mean(0) / gap_draws.mean(0), data_sets[0].level)


def _differences(
    data_sets: Sequence[PairedBootstrap[Key]], method: Key, baseline: Key
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean score of a method minus the mean score of the baseline, for each data set.

    Args:
        data_sets: a `PairedBootstrap` for each data set.
        method: the method to compare with the baseline.
        baseline: the baseline.

    Returns:
        The differences, (data sets,), and the differences in each bootstrap draw, (data sets, draws).
    """
    values = np.array([each.means[method] - each.means[baseline] for each in data_sets])
    return values, np.array([each.draws[method] - each.draws[baseline] for each in data_sets])


def case_differences(method: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return the score of a method minus the score of the baseline for each case, (cases,), averaged over seeds.

    The differences are rounded to 9 decimals (DECIMALS), so that rounding errors do not hide ties.

    Args:
        method: the scores (seeds, cases) of the method.
        baseline: the scores (seeds, cases) of the baseline, on the same cases.
    """
    return np.round(method.mean(0) - baseline.mean(0), DECIMALS)


@dataclass(frozen=True)
class SignedRank:
    """Result of Wilcoxon's signed-rank test.

    Attributes:
        p: two-sided p-value; None with fewer than 6 (FEWEST_DIFFERENCES) non-zero differences, which cannot give
            p < 0.05.
        non_zero: number of differences that are not 0.
    """

    p: float | None
    non_zero: int


def signed_rank(differences: np.ndarray) -> SignedRank:
    """Return the result of Wilcoxon's signed-rank test of whether differences (cases,) are symmetric around 0.

    Differences of 0 are left out. Equal absolute differences (ties) get their mean rank. SciPy's `wilcoxon` computes
    the p-value: from the exact null distribution for up to 50 differences without ties, otherwise from the normal
    approximation. Recent versions of SciPy use a permutation test for up to 13 differences with ties.
    """
    non_zero = differences[differences != 0]
    if len(non_zero) < FEWEST_DIFFERENCES:
        return SignedRank(None, len(non_zero))
    return SignedRank(float(wilcoxon(non_zero).pvalue), len(non_zero))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, in the order given.

    With the m p-values sorted, p_1 <= ... <= p_m, p_i becomes the maximum of (m - j + 1) p_j over j <= i, at most 1.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()


@dataclass(frozen=True)
class Tally:
    """Numbers of cases in which a method is better than the baseline (wins), worse (losses), or equal (ties)."""

    wins: int
    losses: int
    ties: int


def tally(differences: np.ndarray, *, higher_is_better: bool) -> Tally:
    """Count the cases in which a method is better than, worse than and equal to the baseline.

    Args:
        differences: (cases,), score of the method minus score of the baseline.
        higher_is_better: True for scores such as Dice, False for distances such as HD95.
    """
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    wins, losses = (above, below) if higher_is_better else (below, above)
    return Tally(wins, losses, len(differences) - wins - losses)


@dataclass(frozen=True)
class Influence:
    """Influence of single cases on the mean difference between a method and the baseline.

    Attributes:
        case: index of the case whose removal changes the mean difference most.
        without: the mean difference without this case.
        low, high: the smallest and the largest mean difference that the removal of one case gives.
    """

    case: int
    without: float
    low: float
    high: float


def leave_one_out(differences: np.ndarray) -> Influence:
    """Return the influence of single cases: the mean difference is computed again with each case left out.

    Args:
        differences: (cases,), score of the method minus score of the baseline for at least two cases.
    """
    means = (differences.sum() - differences) / (len(differences) - 1)
    case = int(np.abs(means - differences.mean()).argmax())
    return Influence(case, float(means[case]), float(means.min()), float(means.max()))
