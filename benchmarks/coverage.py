"""Coverage of the 95 % intervals of `nnunet_dycon.inference.statistics.PairedBootstrap` in simulated experiments.

    python -m benchmarks.coverage

An experiment consists of scores of several methods with equal true means. The coverage is the fraction of experiments
in which the interval of the difference between two methods contains 0; nominally it is 0.95. The result is written to
benchmarks/results/coverage.json. It takes about 5 minutes on one core.
"""

import argparse
import json
import math

import numpy as np

from benchmarks.measuring import markdown
from benchmarks.preparation import HERE
from nnunet_dycon.inference.statistics import PairedBootstrap, pooled_seed_noise

SIMULATIONS = 2000
# Names of settings and their arguments to `simulate`, and of some also the argument paired to `coverage`.
SETTINGS: dict[str, dict] = {
    "1 seed, 60 cases": {"seeds": (1, 1), "cases": 60, "seed": 0},
    "1 seed, 16 cases": {"seeds": (1, 1), "cases": 16, "seed": 0},
    "1 seed, 10 cases": {"seeds": (1, 1), "cases": 10, "seed": 0},
    "1 seed, 6 cases": {"seeds": (1, 1), "cases": 6, "seed": 0},
    "1 seed, 16 cases, skewed (lognormal) differences": {
        "seeds": (1, 1), "cases": 16, "seed": 0, "skewed": True, "own": 0.08,
    },
    "2 seeds, 16 cases": {"seeds": (2, 2), "cases": 16},
    "3 seeds, 16 cases": {"seeds": (3, 3), "cases": 16},
    "5 seeds, 16 cases": {"seeds": (5, 5), "cases": 16},
    "3 seeds, 60 cases": {"seeds": (3, 3), "cases": 60},
    "3 seeds, 6 methods, 16 cases": {"seeds": (3,) * 6, "cases": 16},
    "3 seeds, 16 cases, seeds differ more than cases": {"seeds": (3, 3), "cases": 16, "own": 0.005, "seed": 0.01},
    "3 seeds, 16 cases, seeds differ in single cases only": {
        "seeds": (3, 3), "cases": 16, "own": 0.005, "seed": 0, "residual": 0.04,
    },
    "3 seeds, 16 cases, skewed (lognormal) differences": {"seeds": (3, 3), "cases": 16, "skewed": True, "own": 0.08},
    "3 draws of labeled cases, 16 cases": {"seeds": (3, 3), "cases": 16, "draw": 0.02},
    "2 draws of labeled cases, 4 methods, paired, 16 cases": {
        "seeds": (2,) * 4, "cases": 16, "draw": 0.02, "paired": True,
    },
    "3 draws of labeled cases, 3 methods, paired, 16 cases": {
        "seeds": (3,) * 3, "cases": 16, "draw": 0.02, "paired": True,
    },
    "3 seeds, 6 methods, 4 of them with a quarter of the noise, 16 cases": {
        "seeds": (3,) * 6, "cases": 16, "factor": 4,
    },
}  # fmt: skip


def simulate(
    rng: np.random.Generator,
    seeds: tuple[int, ...],
    cases: int,
    *,
    own: float = 0.014,
    seed: float = 0.005,
    residual: float = 0.01,
    draw: float = 0.0,
    skewed: bool = False,
    factor: float = 1.0,
) -> dict[int, np.ndarray]:
    """Return simulated scores of methods whose true means are equal.

    The score of method m with seed s on case c is::

        case[c] + own[m, c] + draw[s] + seed[m, s] + residual[m, s, c]

    The terms are independent random numbers with mean 0, normally distributed except for `own` with `skewed`. The
    standard deviation of `case` is 0.1. Those of the other terms are the arguments with the same names.

    Args:
        rng: random number generator.
        seeds: for each method, its number of seeds.
        cases: number of cases.
        own: standard deviation of the effect of a method on a case, which all its seeds share.
        seed: standard deviation of the effect of a seed, which all cases share.
        residual: standard deviation of the effect that is different for each score.
        draw: standard deviation of the effect of a draw of labeled cases. Each seed has its own draw, which all methods
            share.
        skewed: whether the term `own` is lognormally distributed, with the same mean and standard deviation, for all
            methods except method 0.
        factor: for methods 0 and 1, `seed` is multiplied by this number.

    Returns:
        Index of the method -> scores (seeds, cases).
    """
    case = 0.1 * rng.standard_normal(cases)
    common = draw * rng.standard_normal((max(seeds), 1))
    scores = {}
    for method, number in enumerate(seeds):
        noise = rng.standard_normal(cases)
        if skewed and method:
            noise = (np.exp(noise) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
        scores[method] = case + own * noise + common[:number]
        scores[method] = scores[method] + (factor if method < 2 else 1) * seed * rng.standard_normal((number, 1))
        scores[method] = scores[method] + residual * rng.standard_normal((number, cases))
    return scores


def coverage(
    simulations: int, *, draws: int = 1000, resample_seeds: bool = False, paired: bool = False, **setting
) -> float:
    """Return the fraction of simulated experiments in which the 95 % interval contains the true difference, which is 0.

    The interval is that of the mean score of method 1 minus the mean score of method 0.

    Args:
        simulations: number of simulated experiments.
        draws: number of bootstrap draws per experiment.
        resample_seeds: whether to use a plain bootstrap over cases and seeds instead of `PairedBootstrap`.
        paired: argument of `pooled_seed_noise`.
        setting: arguments of `simulate`, such as those in a value of `SETTINGS`.
    """
    rng, inside = np.random.default_rng(0), 0
    for _ in range(simulations):
        scores = simulate(rng, **setting)
        if resample_seeds:
            low, high = np.percentile(_with_resampled_seeds(scores, rng, draws), (2.5, 97.5))
        else:
            bootstrap = PairedBootstrap(scores, pooled_seed_noise(scores.values(), paired=paired), rng, draws=draws)
            estimate = bootstrap.difference(1, 0)
            low, high = estimate.low, estimate.high
        inside += low <= 0 <= high
    return inside / simulations


def _with_resampled_seeds(scores: dict[int, np.ndarray], rng: np.random.Generator, draws: int) -> np.ndarray:
    """Return bootstrap draws (draws,) of the mean score of method 1 minus that of method 0.

    Each draw resamples the cases, the same ones for both methods, and the seeds of each method.

    Args:
        scores: index of the method -> scores (seeds, cases).
        rng: random number generator.
        draws: number of bootstrap draws.
    """
    cases = scores[0].shape[1]
    weights = rng.multinomial(cases, np.full(cases, 1 / cases), draws) / cases
    first, second = (
        np.einsum("dc,dc->d", its[rng.integers(len(its), size=(draws, len(its)))].mean(1), weights)
        for its in (scores[0], scores[1])
    )
    return second - first


def as_markdown(results: dict[str, dict]) -> str:
    """Return a Markdown table of how often, in simulations, 95 % intervals contain the true difference of two methods.

    Its columns are

    - setting: numbers of seeds, methods and cases, and sizes of the random effects, see `SETTINGS`;
    - coverage: fraction of experiments in which the interval of `PairedBootstrap` contains the true difference;
    - with resampled seeds: the same fraction for the interval of a plain bootstrap over cases and seeds.

    Args:
        results: key of `SETTINGS` -> {"coverage": fraction, "resampled": fraction}, the values of the last two columns.
            "resampled" is None for settings with one seed.
    """
    rows = [
        (name, f"{its['coverage']:.3f}", f"{its['resampled']:.3f}" if its["resampled"] is not None else "")
        for name, its in results.items()
    ]
    return markdown(("setting", "coverage", "with resampled seeds"), rows)


def main() -> None:
    """Simulate the experiments of all `SETTINGS`, and compute how often the 95 % interval contains the true difference.

    Write these fractions to benchmarks/results/coverage.json, and print them as a Markdown table.
    """
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = {}
    for name, setting in SETTINGS.items():
        several = max(setting["seeds"]) > 1
        resampled = coverage(SIMULATIONS, resample_seeds=True, **setting) if several else None
        results[name] = {"coverage": coverage(SIMULATIONS, **setting), "resampled": resampled}
    content = {"simulations": SIMULATIONS, "results": results}
    (HERE / "results" / "coverage.json").write_text(json.dumps(content, indent=1) + "\n")
    print(as_markdown(results))


if __name__ == "__main__":
    main()
