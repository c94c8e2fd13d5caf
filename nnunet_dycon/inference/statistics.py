"""Statistics of paired scores: bootstrap intervals over cases and seeds, signed-rank test, leave-one-out.

Functions of arrays alone. The scores of a method have the shape (seeds, cases). All methods are scored on the same
cases, in the same order; they may have different numbers of seeds.
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
DECIMALS = 9  # differences are rounded to these, so that means that differ by rounding alone are ties

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of a seed's mean score, and the degrees of freedom that it was estimated with."""

    sd: float
    degrees_of_freedom: int


def pooled_seed_noise(scores: Iterable[np.ndarray]) -> SeedNoise | None:
    """Return the standard deviation over seeds of the mean over cases, pooled over methods.

    Args:
        scores: (seeds, cases) of each method.

    Returns:
        None if no method has two seeds.
    """
    means = [its.mean(1) for its in scores]
    freedom = sum(len(of) - 1 for of in means)
    if freedom == 0:
        return None
    return SeedNoise(math.sqrt(sum(((of - of.mean()) ** 2).sum() for of in means) / freedom), freedom)


class PairedBootstrap(Generic[Key]):
    """Confidence intervals of differences between methods that were scored on the same cases.

    In each draw the cases are resampled with replacement, the same for all methods, and the mean of each method over
    seeds and cases is computed. With `noise`, a normal number with the standard deviation noise.sd / sqrt(seeds) is
    added to each mean, after noise.sd was multiplied by sqrt(f / chi²), chi² drawn with f = noise.degrees_of_freedom:
    the noise then follows a t distribution. Intervals are percentiles of the draws.

    Why the seeds are not resampled as the cases are: methods have 2 to 5 of them, and resampling S seeds gives a
    standard deviation that is too small by sqrt((S - 1) / S), without the allowance of the t distribution.

    Coverage of nominal 95 % intervals in simulations (`pytest -s --runslow tests/test_statistics.py` prints them):

    - 1 seed, `noise` None: 94 % with 60 cases, 92 % with 16, 90 % with 10, 86 % with 6, because percentiles of few
      cases are too narrow. Only the cases vary: the interval holds for these trained models, not for other seeds.
    - 2 to 5 seeds, 16 or 60 cases: 95 % to 97 %, where resampling the seeds covers 86 % to 93 %; 92 % if a few cases
      make most of the difference. The part of the seed noise that differs between cases is counted twice, with the
      cases and with the seeds: if there is no other noise, the intervals cover 99 %.

    Assumptions: the seeds have the same standard deviation in all methods, and runs are independent. With two methods
    and equal numbers of seeds the standard deviations may differ; with six, four of which have a quarter of the noise
    of the two that are compared, the intervals cover about 80 %. If runs are trained on several draws of labeled cases,
    pass one run per draw, averaged over its seeds, because seeds of one draw are not independent. What a draw changes
    in all methods alike counts as noise of each, so that intervals of differences are too wide.
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
            scores: (seeds, cases) of each method.
            noise: as `pooled_seed_noise` returns it, of these methods or of some of them.
            rng: seeded, for intervals that are reproducible.
            draws: number of draws.
            level: of the intervals.
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
        """Return the mean of a method minus that of the baseline."""
        return self._estimate(self.means[method] - self.means[baseline], self.draws[method] - self.draws[baseline])

    def share_of_gap(self, method: Key, lower: Key, upper: Key) -> Estimate | None:
        """Return the share of the gap between lower and upper bound that a method closes: 1 at the upper bound.

        Returns:
            None if the interval of the gap reaches 0, where the share has no meaning.
        """
        gap = self.draws[upper] - self.draws[lower]
        if self._estimate(0, gap).low <= 0:
            return None
        value = (self.means[method] - self.means[lower]) / (self.means[upper] - self.means[lower])
        return self._estimate(value, (self.draws[method] - self.draws[lower]) / gap)

    def _estimate(self, value: float, draws: np.ndarray) -> Estimate:
        tail = 50 * (1 - self.level)
        low, high = np.percentile(draws, (tail, 100 - tail))
        return Estimate(float(value), float(low), float(high))


def case_differences(method: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return the differences (cases,) of the means over seeds, rounded to DECIMALS."""
    return np.round(method.mean(0) - baseline.mean(0), DECIMALS)


@dataclass(frozen=True)
class SignedRank:
    """Wilcoxon's signed-rank test.

    Attributes:
        p: two-sided; None if there are fewer than FEWEST_DIFFERENCES non-zero differences, none of which can be
            significant at 5 %.
        non_zero: number of differences that are not 0.
    """

    p: float | None
    non_zero: int


def signed_rank(differences: np.ndarray) -> SignedRank:
    """Test whether differences (cases,) are symmetric around 0, by SciPy's `wilcoxon`.

    Differences of 0 are left out; equal absolute differences share their mean rank. Up to 50 differences without equal
    ones have the exact null distribution. Otherwise SciPy chooses (`method="auto"`): the normal approximation, or, in
    recent versions, all sign patterns of up to 13 differences.
    """
    non_zero = differences[differences != 0]
    if len(non_zero) < FEWEST_DIFFERENCES:
        return SignedRank(None, len(non_zero))
    return SignedRank(float(wilcoxon(non_zero).pvalue), len(non_zero))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, in the order given.

    The i-th smallest of m, i from 1 on, becomes the largest of (m - j + 1) p_j over j <= i, at most 1.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()


@dataclass(frozen=True)
class Tally:
    """Numbers of cases in which a method is better than the baseline, worse, or equal."""

    wins: int
    losses: int
    ties: int


def tally(differences: np.ndarray, *, higher_is_better: bool) -> Tally:
    """Count the signs of differences (cases,)."""
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    wins, losses = (above, below) if higher_is_better else (below, above)
    return Tally(wins, losses, len(differences) - wins - losses)


@dataclass(frozen=True)
class Influence:
    """How the mean difference changes if a single case is left out.

    Attributes:
        case: index of the case whose removal changes the mean most.
        without: the mean without it.
        low, high: range of the mean over all cases that may be left out.
    """

    case: int
    without: float
    low: float
    high: float


def leave_one_out(differences: np.ndarray) -> Influence:
    """Leave out each of the differences (cases,), at least two, in turn."""
    means = (differences.sum() - differences) / (len(differences) - 1)
    case = int(np.abs(means - differences.mean()).argmax())
    return Influence(case, float(means[case]), float(means.min()), float(means.max()))
