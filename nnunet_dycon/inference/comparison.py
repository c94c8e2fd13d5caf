"""Comparison of several models on the same cases: means, paired differences to a baseline, significance tests."""

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dycon import __version__
from nnunet_dycon.errors import UsageError, UserError, counted, some
from nnunet_dycon.inference import statistics as stats
from nnunet_dycon.inference.evaluation import DEFINITIONS as SCORES
from nnunet_dycon.inference.evaluation import (
    METRICS,
    VOXELS,
    Evaluation,
    MatchedFolders,
    evaluate_matched,
    match_folders,
)
from nnunet_dycon.inference.tables import aligned, as_csv, as_json, write_texts
from nnunet_dycon.system.pictures import Panel, draw_or_warn, draw_paired_scores

DICE, HD95 = "dice", "hd95_mm_max_directed"
COMPARED = {DICE: "Dice", HD95: "HD95 mm"}
_DIGITS = {DICE: 4, HD95: 2}
ALL = "all labels"
SHOWN = 5  # cases in each list of the worst ones
_INTERVAL = f"{100 * stats.LEVEL:.0f} % CI"
_MANY = 16  # from this number of cases on, the coverage of intervals is close to the nominal 95 %
_ENOUGH = 4  # degrees of freedom: two methods with 3 seeds each; the t quantile is 2.8, with one degree 12.7
DEFINITIONS = {
    "cases": "the statistics of a label use the cases in which it has a score in each run of each method. A label that "
    "is empty in reference and prediction has no score; such cases are listed under left_out",
    "empty_reference": "number of cases in which the reference has no voxel of the label; predicted: number of these "
    "cases in which each run predicts the label",
    "mean": "mean over cases, then over seeds; of_seeds: mean over cases of each seed; sd_over_seeds: standard "
    "deviation (n - 1) of these means",
    ALL: "mean over the labels that are scored in a case. If every label is scored in every case, its mean over cases "
    "equals foreground_mean of nnunet_dycon evaluate",
    "difference": "mean of the method minus mean of the baseline. The method is better if it is above 0 for Dice, "
    "below 0 for HD95",
    "interval": "percentile bootstrap: each draw resamples the cases, the same ones for all methods. If a method has "
    "several seeds, t-distributed seed noise is added to the mean of each method: its standard deviation is that of "
    "the seeds' means pooled over all methods (seed_noise), divided by sqrt(seeds). If no method has several seeds, "
    "the interval holds for these trained models, not for other seeds",
    "wilcoxon": "two-sided signed-rank test (scipy.stats.wilcoxon) of the differences between means over seeds, one "
    "per case. Differences of 0 are left out, equal absolute differences get their mean rank. With fewer than "
    f"{stats.FEWEST_DIFFERENCES} differences that are not 0, p < 0.05 is impossible, and p is null. The test does not "
    "account for seed noise",
    "p_holm": "p after Holm's step-down correction for all tests of the same metric: all methods, all labels",
    "wins": "number of cases in which the method's mean over seeds is better than the baseline's; losses: worse; ties: "
    f"equal to {stats.DECIMALS} decimals",
    "leave_one_out": "case: the case whose removal changes the difference most; without: the difference without it; "
    "low, high: range of the differences without one case",
    "largest_losses": f"for each method, up to {SHOWN} cases and labels with the largest loss of Dice to the baseline",
    "lowest_dice": f"for each method, the {SHOWN} cases and labels with the lowest Dice",
}


def parse_methods(texts: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return the prediction folders of each method: name -> folders.

    Args:
        texts: arguments NAME=FOLDER[,FOLDER...], one per method, with one folder per seed. The first is the baseline.

    Raises:
        UsageError: a text does not have this form, a method occurs twice, or there are fewer than two methods.
    """
    methods: dict[str, tuple[Path, ...]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        folders = listed.split(",")
        if not name.strip() or not all(folders):
            raise UsageError(f"-pred {text}: use NAME=FOLDER, or NAME=FOLDER,FOLDER for several seeds of a method")
        if name in methods:
            raise UsageError(f"-pred: {name} is given twice; separate its seeds by commas: {name}=FOLDER,FOLDER")
        methods[name] = tuple(map(Path, folders))
    if len(methods) < 2:
        raise UsageError(
            f"-pred names only one method ({some(list(methods))}), but a comparison needs at least two; give the "
            "baseline first, then the others"
        )
    return methods


def compare_folders(
    reference: Path,
    methods: Mapping[str, Sequence[Path]],
    *,
    labels: Sequence[int] | None = None,
    num_processes: int = 1,
    seed: int = 0,
) -> "Comparison":
    """Score the predictions of several methods, and return a comparison with the first method, the baseline.

    All methods are scored against the same references. All folders are checked before any is scored. Warnings and
    progress go to stderr.

    Args:
        reference: folder of reference labels.
        methods: maps the name of each method to its folders of predictions, one folder per seed; the baseline first.
        labels: label values to score. None: the foreground labels and regions of dataset.json in each folder of
            predictions, or else in the parent folder of the references.
        num_processes: number of processes for scoring.
        seed: seed of the bootstrap.

    Raises:
        UserError: a folder or prediction is missing; a file is unreadable; a prediction differs in size or spacing
            from its reference; folders have different labels or cases; or no case has a score in all folders.
        UsageError: a folder is given twice, a folder of predictions is that of the references, or no labels can be
            scored.
    """
    folders = [(name, folder) for name, its in methods.items() for folder in its]
    _require_different(folders)
    matched = [match_folders(reference, folder, labels=labels) for _, folder in folders]
    _require_same([folder for _, folder in folders], matched)
    scored = iter(evaluate_matched(matched, num_processes))
    runs = {name: tuple(next(scored) for _ in its) for name, its in methods.items()}
    comparison = Comparison(reference, {name: tuple(its) for name, its in methods.items()}, runs, seed)
    if not comparison.labels:
        raise UserError(
            f"{reference}: no case has a score in all prediction folders, so nothing can be compared; check that the "
            "references contain the labels to be scored"
        )
    return comparison


def _require_different(folders: Sequence[tuple[str, Path]]) -> None:
    """Raise UsageError if a folder of predictions is given more than once.

    Args:
        folders: a pair (name of the method, folder) for each folder of predictions of each method.
    """
    found: dict[Path, str] = {}
    for name, folder in folders:
        if (resolved := folder.resolve()) in found:
            raise UsageError(f"-pred: {folder} is given twice, for {found[resolved]} and {name}; give each folder once")
        found[resolved] = name


def _require_same(folders: Sequence[Path], matched: Sequence[MatchedFolders]) -> None:
    """Raise UserError if the labels to score, the ignore label or the cases differ between folders.

    Args:
        folders: folders of predictions.
        matched: result of `match_folders` for each folder, in the same order.
    """
    for folder, one in zip(folders[1:], matched[1:]):
        if (one.task.regions, one.task.ignore) != (matched[0].task.regions, matched[0].task.ignore):
            choose = ", or choose the labels with -l" if one.task.ignore == matched[0].task.ignore else ""
            raise UserError(
                f"{folders[0]} and {folder} have different labels ({_describe(matched[0])}; {_describe(one)}); copy "
                f"the same dataset.json into both{choose}"
            )
        if differing := {case for case, *_ in one.pairs} ^ {case for case, *_ in matched[0].pairs}:
            raise UserError(
                f"{folders[0]} and {folder} have different cases: only one of them has {some(sorted(differing))}; "
                "predict the same cases with the same file ending"
            )


def _describe(matched: MatchedFolders) -> str:
    ignore = () if matched.task.ignore is None else (f"ignore={matched.task.ignore}",)
    labels = (f"{name}={'+'.join(map(str, values))}" for name, values in matched.task.regions.items())
    return ", ".join((*labels, *ignore))


@dataclass(frozen=True)
class Comparison:
    """Scores of several methods, and their statistics.

    A run is one folder of predictions, that is, one method and one seed.

    Attributes:
        reference: folder of the references.
        methods: maps the name of each method to its folders of predictions, one per seed; the baseline first.
        runs: maps the name of each method to the scores of its runs, in the order of its folders.
        seed: seed of the bootstrap.
    """

    reference: Path
    methods: dict[str, tuple[Path, ...]]
    runs: dict[str, tuple[Evaluation, ...]]
    seed: int = 0

    @property
    def baseline(self) -> str:
        """Name of the baseline, which is the first method."""
        return next(iter(self.methods))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Scores of all methods, which `write` stores in comparison.csv: a row per method, seed, case and label.

        The keys are "method", "seed" (index of the method's folder, from 0), "case", "label", and those of the metrics
        and voxel counts in METRICS and VOXELS, such as "dice" and "reference_voxels".
        """
        return [
            {"method": name, "seed": seed, **row}
            for name, runs in self.runs.items()
            for seed, run in enumerate(runs)
            for row in run.rows
        ]

    @cached_property
    def cases(self) -> list[str]:
        """Names of all cases."""
        return list(dict.fromkeys(row["case"] for row in self.runs[self.baseline][0].rows))

    @cached_property
    def single_labels(self) -> list[str]:
        """Labels for which at least one case has a score in all runs of all methods."""
        return [label for label in self.runs[self.baseline][0].labels if self._kept(label).any()]

    @property
    def labels(self) -> list[str]:
        """Labels for which statistics are computed.

        These are `single_labels` and, if there are at least two of them, ALL (the mean over the labels of a case).
        """
        return [*self.single_labels, ALL] if len(self.single_labels) > 1 else self.single_labels

    def _column(self, name: str, label: str, key: str) -> np.ndarray:
        """Return one metric or voxel count of a method and a label for all seeds and cases.

        Args:
            name: name of the method.
            label: name of the label.
            key: an entry of METRICS or VOXELS, such as "dice".

        Returns:
            The values (seeds, cases); NaN where there is no score.
        """
        return np.array([[row[key] for row in run.rows if row["label"] == label] for run in self.runs[name]])

    def _kept(self, label: str) -> np.ndarray:
        """Return a boolean mask (cases,) of the cases in which the label has a score in all runs of all methods."""
        scores = np.concatenate([self._column(name, label, DICE) for name in self.methods])
        return np.asarray(~np.isnan(scores).any(0))

    def _scores(self, label: str, metric: str) -> tuple[list[str], dict[str, np.ndarray]]:
        """Return the cases and scores that the statistics of a label and a metric use.

        Args:
            label: a label, or ALL for the mean over the labels that have a score in the case.
            metric: a key of COMPARED: DICE or HD95.

        Returns:
            The names of the cases in which the label has a score in all runs of all methods; and for each method the
            scores in these cases, (seeds, cases).
        """
        if label == ALL:
            kept = np.array([self._kept(one) for one in self.single_labels])
            used = kept.any(0)
            weights = (kept / np.maximum(kept.sum(0), 1))[:, None]
            scores = {}
            for name in self.methods:
                columns = np.array([self._column(name, one, metric) for one in self.single_labels])
                scores[name] = np.where(kept[:, None], columns * weights, 0).sum(0)[:, used]
        else:
            used = self._kept(label)
            scores = {name: self._column(name, label, metric)[:, used] for name in self.methods}
        return [self.cases[i] for i in np.flatnonzero(used)], scores

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Statistics of the methods, which `write` stores in comparison.json.

        These are means, differences to the baseline with confidence intervals and tests, and the worst cases. The entry
        "definitions" explains the other entries. Missing numbers are None.
        """
        means: list[dict[str, Any]] = []
        noises: list[dict[str, Any]] = []
        comparisons: list[dict[str, Any]] = []
        for metric in COMPARED:
            tests = []
            for label in self.labels:
                about = {"metric": metric, "label": label}
                cases, scores = self._scores(label, metric)
                noise = stats.pooled_seed_noise(scores.values())
                if noise is not None:
                    noises.append({**about, **asdict(noise)})
                means += [{**about, "method": name, **_means(its)} for name, its in scores.items()]
                drawn = stats.PairedBootstrap(scores, noise, np.random.default_rng(self.seed))
                for name in list(self.methods)[1:]:
                    differences = stats.case_differences(scores[name], scores[self.baseline])
                    estimate = drawn.difference(name, self.baseline)
                    tests.append({**about, "method": name, **_compare(cases, differences, estimate, metric)})
            _correct([test["wilcoxon"] for test in tests])
            comparisons += tests
        every_label = self.runs[self.baseline][0].labels
        return {
            "definitions": DEFINITIONS | {key: SCORES[key] for key in (*COMPARED, "surface", "one_empty")},
            "settings": {
                "nnunet_dycon": __version__,
                "reference": str(self.reference),
                "baseline": self.baseline,
                "methods": {name: list(map(str, folders)) for name, folders in self.methods.items()},
                "draws": stats.DRAWS,
                "level": stats.LEVEL,
                "seed": self.seed,
            },
            "labels": self.labels,
            "cases": self.cases,
            "left_out": {
                one: [case for case, kept in zip(self.cases, self._kept(one)) if not kept] for one in every_label
            },
            "empty_reference": {one: self._empty(one) for one in every_label},
            "means": means,
            "seed_noise": noises,
            "comparisons": comparisons,
            **self._worst(),
        }

    def _empty(self, label: str) -> dict[str, Any]:
        """Count the cases whose reference does not contain a label.

        Returns:
            A dict with two entries. "cases" is the number of these cases. "predicted" maps the name of each method to
            a list with one value per seed: the number of these cases in which the label is predicted.
        """
        empty = self._column(self.baseline, label, VOXELS[0])[0] == 0
        predicted = {
            name: [int(one) for one in (self._column(name, label, VOXELS[1])[:, empty] > 0).sum(1)]
            for name in self.methods
        }
        return {"cases": int(empty.sum()), "predicted": predicted}

    def _worst(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Return the worst cases of each method: those furthest below the baseline, and those with the lowest Dice.

        Returns:
            "largest_losses" (furthest below the baseline in Dice) and "lowest_dice". Each maps the name of a method to
            up to 5 (SHOWN) rows, worst first. A row is a dict for one case and label, with the keys "case", "label" and
            "dice" (mean over seeds). In "largest_losses", a row also contains "baseline" (the Dice of the baseline) and
            "difference" (method minus baseline). The baseline itself is not a key of "largest_losses".
        """
        lowest: dict[str, list[dict[str, Any]]] = {name: [] for name in self.methods}
        losses: dict[str, list[dict[str, Any]]] = {name: [] for name in list(self.methods)[1:]}
        for label in self.single_labels:
            cases, scores = self._scores(label, DICE)
            for name in self.methods:
                means, of_baseline = scores[name].mean(0), scores[self.baseline].mean(0)
                differences = stats.case_differences(scores[name], scores[self.baseline])
                for case, dice, other, difference in zip(cases, means, of_baseline, differences):
                    row = {"case": case, "label": label, "dice": float(dice)}
                    lowest[name].append(row)
                    if difference < 0:
                        losses[name].append({**row, "baseline": float(other), "difference": float(difference)})
        return {
            "largest_losses": {
                name: sorted(its, key=lambda r: r["difference"])[:SHOWN] for name, its in losses.items()
            },
            "lowest_dice": {name: sorted(its, key=lambda r: r["dice"])[:SHOWN] for name, its in lowest.items()},
        }

    def as_table(self) -> str:
        """Return the statistics as text: means, differences, worst cases, and notes on how they are computed."""
        summary = self.summary
        text = [f"{counted(self.cases, 'case', 'cases')}; references: {self.reference}; baseline: {self.baseline}", ""]
        text += ["Mean over cases (± standard deviation over seeds)", *_table_of_means(summary["means"])]
        for metric, name in COMPARED.items():
            better = "above" if metric == DICE else "below"
            text += ["", f"{name}: difference to {self.baseline} (better: {better} 0)"]
            text += _table_of_differences(self._comparisons(metric))
        text += ["", f"Largest losses of Dice to {self.baseline}", *_table_of_cases(summary["largest_losses"])]
        text += ["", "Lowest Dice", *_table_of_cases(summary["lowest_dice"])]
        return "\n".join([*text, "", *self._notes()])

    def _comparisons(self, metric: str) -> list[dict[str, Any]]:
        return [one for one in self.summary["comparisons"] if one["metric"] == metric]

    def _notes(self) -> Iterator[str]:
        settings = self.summary["settings"]
        interval = f"{_INTERVAL}: {settings['draws']} bootstrap draws of cases"
        if not self.summary["seed_noise"]:
            yield f"{interval}; with one seed per method, it holds for these trained models, not for other seeds"
        else:
            yield f"{interval}, and seed noise"
            freedom = self.summary["seed_noise"][0]["degrees_of_freedom"]
            if freedom < _ENOUGH:
                degrees = f"{freedom} degree{'s' * (freedom > 1)} of freedom"
                yield f"the seed noise is estimated with {degrees}, which widens the intervals; add seeds"
        if len(self.cases) < _MANY:
            yield (
                f"fewer than {_MANY} cases: the intervals are too narrow; without seed noise, their coverage is 92 % "
                "with 16 cases, 90 % with 10, 86 % with 6"
            )
        tests = {metric: [one["wilcoxon"] for one in self._comparisons(metric)] for metric in COMPARED}
        number = ", ".join(
            f"{sum(t['p'] is not None for t in its)} of {COMPARED[metric]}" for metric, its in tests.items()
        )
        yield f"p: Wilcoxon signed-rank test over cases; p Holm: corrected over the tests of the metric: {number}"
        if any(one["p"] is None for its in tests.values() for one in its):
            fewest = stats.FEWEST_DIFFERENCES
            yield f"no p: with fewer than {fewest} differences that are not 0, p < 0.05 is impossible"
        for label, cases in self.summary["left_out"].items():
            if cases:
                yield f"{label}: left out because a run has no score (empty in both): {counted(cases, 'case', 'cases')}"
        for label, empty in self.summary["empty_reference"].items():
            if empty["cases"]:
                runs = ", ".join(f"{name} {'/'.join(map(str, its))}" for name, its in empty["predicted"].items())
                number = "1 case" if empty["cases"] == 1 else f"{empty['cases']} cases"
                yield f"{label}: the reference is empty in {number}; runs that predict it there: {runs}"
        yield f"HD95: {SCORES[HD95]}; {SCORES['one_empty']}"

    def write(self, folder: Path) -> None:
        """Write comparison.csv (scores), comparison.json (statistics) and comparison.png (scatter plots) to a folder.

        Partially written files are never visible.
        """
        columns = ("method", "seed", "case", "label", *METRICS, *VOXELS)
        texts = {"comparison.csv": as_csv(columns, self.rows), "comparison.json": as_json(self.summary) + "\n"}
        write_texts(folder, texts, "comparison")
        draw_or_warn(folder / "comparison.png", self.draw, partial(print, file=sys.stderr))

    def draw(self, file: Path) -> None:
        """Write a PNG file with one scatter plot for each method except the baseline.

        A point is a case and label: the Dice (mean over seeds) of the method against the Dice of the baseline.
        """
        scores = {label: self._scores(label, DICE)[1] for label in self.single_labels}
        panels = []
        for name in list(self.methods)[1:]:
            pairs = {label: (its[self.baseline].mean(0), its[name].mean(0)) for label, its in scores.items()}
            panels.append(Panel(self._title(name), pairs))
        draw_paired_scores(panels, f"Dice of {self._title(self.baseline)}", "Dice", file)

    def _title(self, name: str) -> str:
        seeds = len(self.methods[name])
        lines = [*textwrap.wrap(name, 34), *([f"{seeds} seeds"] if seeds > 1 else [])]
        return "\n".join(lines)


def _means(scores: np.ndarray) -> dict[str, Any]:
    of_seeds = scores.mean(1)
    return {
        "seeds": scores.shape[0],
        "cases": scores.shape[1],
        "mean": float(of_seeds.mean()),
        "sd_over_seeds": float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else None,
        "of_seeds": of_seeds.tolist(),
    }


def _compare(cases: Sequence[str], differences: np.ndarray, estimate: stats.Estimate, metric: str) -> dict[str, Any]:
    several = len(cases) > 1  # a single case has no interval and no leave-one-out
    influence = stats.leave_one_out(differences) if several else None
    return {
        "cases": len(cases),
        "difference": estimate.value,
        "interval": [estimate.low, estimate.high] if several else None,
        "wilcoxon": {**asdict(stats.signed_rank(differences)), "p_holm": None},
        **asdict(stats.tally(differences, higher_is_better=metric == DICE)),
        "leave_one_out": influence and {**asdict(influence), "case": cases[influence.case]},
    }


def _correct(tests: Sequence[dict[str, Any]]) -> None:
    """Correct the p-values of several tests by Holm's method, and store the results in the dicts of the tests.

    Args:
        tests: one dict per test. The p-value is read from "p", and the corrected one is written to "p_holm". Tests
            whose "p" is None are not counted and not changed.
    """
    done = [test for test in tests if test["p"] is not None]
    for test, p in zip(done, stats.holm([test["p"] for test in done])):
        test["p_holm"] = p


def _table_of_means(means: Sequence[dict[str, Any]]) -> list[str]:
    lines = [["label", "method", "seeds", "cases", *COMPARED.values()]]
    for one in means:
        if one["metric"] == DICE:
            same = [other for other in means if (other["label"], other["method"]) == (one["label"], one["method"])]
            cells = [_with_spread(other["mean"], other["sd_over_seeds"], _DIGITS[other["metric"]]) for other in same]
            lines.append([one["label"], one["method"], str(one["seeds"]), str(one["cases"]), *cells])
    return aligned(lines, left=(0, 1, 4, 5))


def _with_spread(mean: float, spread: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _table_of_differences(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    header = ["label", "method", "difference", _INTERVAL, "p", "p Holm", "wins", "losses", "ties"]
    lines = [[*header, "without the most influential case", "range of leave-one-out"]]
    for one in comparisons:
        form = f"+.{_DIGITS[one['metric']]}f"
        influence, test = one["leave_one_out"], one["wilcoxon"]
        line = [one["label"], one["method"], f"{one['difference']:{form}}", _range(one["interval"], form)]
        line += [_p(test["p"]), _p(test["p_holm"]), *(str(one[key]) for key in ("wins", "losses", "ties"))]
        if influence is None:
            line += ["", ""]
        else:
            line += [f"{influence['without']:{form}} ({influence['case']})"]
            line += [_range((influence["low"], influence["high"]), form)]
        lines.append(line)
    return aligned(lines, left=(0, 1, 9))


def _range(ends: Sequence[float] | None, form: str) -> str:
    return "" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def _p(p: float | None) -> str:
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _table_of_cases(cases: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    rows = [(name, row) for name, its in cases.items() for row in its]
    if not rows:
        return ["none"]
    numbers = [key for key in ("dice", "baseline", "difference") if key in rows[0][1]]
    lines = [["method", "case", "label", *numbers]]
    lines += [[name, row["case"], row["label"], *(f"{row[key]:.4f}" for key in numbers)] for name, row in rows]
    return aligned(lines, left=(0, 1, 2))
