"""Comparison of strategies of `nnunet_dycon select` on hippocampus MRI: 4, 8 and 12 labeled cases.

    python -m benchmarks.selection --data <Task04_Hippocampus> --work <folder> --seeds 0 1

All strategies start from the first 4 cases of the protocol. Twice, a model predicts the unlabeled cases,
`nnunet_dycon select` selects 4 of them, and a model is trained with their reference labels in addition. The scores with
8 and 12 labeled cases are appended to a CSV for each strategy, such as
benchmarks/results/hippocampus_select_uncertainty.csv. `benchmarks.comparison` describes its columns. The column draw
distinguishes the labeled sets of a strategy:

- uncertainty: one set per seed of the training, since the selection depends on the model. draw is this seed;
- diverse: one set, draw 0, since the selection depends on the images alone;
- random: one set per --random_seeds, which is the seed of `nnunet_dycon select` and the draw.

Use a new working folder for another method, length or network, since the selection is not repeated.
"""

import csv
import json
import shutil
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison import Benchmark, Run
from benchmarks.hippocampus import HIPPOCAMPUS, Hippocampus
from benchmarks.preparation import DRAWS, HERE, LOWER_BOUND, LabeledSet, Preparation, add_arguments
from nnunet_dycon.dataset_conversion.writer import FOLDERS
from nnunet_dycon.labeling.select import DIVERSE, RANDOM, STRATEGIES, TABLE, UNCERTAINTY
from nnunet_dycon.system.files import replacing

START, LABELS, NUMBER = LabeledSet(4), (8, 12), 4
FIRST_IDS = {UNCERTAINTY: 803, DIVERSE: 804, RANDOM: 805}  # such that no two data sets of all benchmarks share an ID
ITERATIONS = 1000


@dataclass(frozen=True)
class Selected(Hippocampus):
    """Hippocampus data set whose cases are labeled in the order in which a strategy has selected them."""

    def order(self, preparation: Preparation, cases: Sequence[str], draw: int) -> list[str]:
        selected = [*cases[: START.labels], *json.loads(self.file(preparation, draw).read_text())]
        return [*selected, *(case for case in cases if case not in selected)]

    def file(self, preparation: Preparation, draw: int) -> Path:
        """Return the JSON file with the cases that have been selected for a draw."""
        return preparation.work / "selected" / f"{self.name}_{draw}.json"


def data_set(strategy: str) -> Selected:
    """Return the data set for a strategy."""
    changes = {"labels": LABELS, "protocol": HIPPOCAMPUS.table, "first_id": FIRST_IDS[strategy],
               "name": f"Hippocampus_{strategy}", "table": f"hippocampus_select_{strategy}"}  # fmt: skip
    return Selected(**vars(HIPPOCAMPUS) | changes)


class Selection:
    """Trainings with the labeled sets of one strategy.

    Args:
        arguments: parsed command line.
        strategy: key of `STRATEGIES`.
    """

    def __init__(self, arguments: Namespace, strategy: str) -> None:
        self.strategy, self.data_set = strategy, data_set(strategy)
        about = {**vars(arguments), "weights": "student", "precision": "float32"}
        about["table"] = arguments.results / f"{self.data_set.table}.csv"
        self.start = Benchmark(Namespace(**about), HIPPOCAMPUS)
        self.benchmark = Benchmark(Namespace(**about), self.data_set)

    def run_all(self, method: str, draw: int, seeds: Sequence[int]) -> None:
        """Select, train and score until all numbers of labeled cases are scored.

        Args:
            method: lower_bound or the name of a trainer.
            draw: the labeled set, see the description of the module.
            seeds: seeds of the trainings. The model of the first one makes the predictions for `select`.
        """
        first, benchmark = Run(method, START, seeds[0]), self.start
        for labels in LABELS:
            self.select(benchmark, first, draw, labels - START.labels)
            benchmark, labeled = self.benchmark, LabeledSet(labels, draw)
            benchmark.prepare([labeled])
            runs = [Run(method, labeled, seed) for seed in seeds]
            benchmark.declare(runs)
            for run in runs:
                if benchmark.missing(run):
                    benchmark.perform(run)
            first = runs[0]

    def select(self, benchmark: Benchmark, run: Run, draw: int, number: int) -> None:
        """Select the next cases to label, and add them to the file of the draw, unless it has enough cases.

        Args:
            benchmark: working folder and data set of `run`.
            run: the strategy uncertainty uses the model of this run.
            draw: the labeled set.
            number: number of selected cases, without those from which all strategies start.
        """
        file = self.data_set.file(benchmark, draw)
        selected = json.loads(file.read_text()) if file.is_file() else []
        if len(selected) >= number:
            return
        depends_on_model = self.strategy == UNCERTAINTY
        with_predictions = (benchmark, run) if depends_on_model else (self.start, Run(run.method, START, 0))
        predictions = self.predictions(*with_predictions)
        names = [f"{self.strategy}_{draw}_{number}_{name}" for name in ("predictions", "output")]
        linked, output = (benchmark.work / "selected" / name for name in names)
        for folder in (linked, output):
            shutil.rmtree(folder, ignore_errors=True)
        linked.mkdir(parents=True)
        unlabeled = benchmark.raw(run.labeled) / FOLDERS["unlabeled"][0]
        cases = {image.name.removesuffix("_0000.nii.gz") for image in unlabeled.iterdir()}
        for prediction in predictions.iterdir():
            if prediction.name.partition(".")[0] in cases:
                (linked / prediction.name).symlink_to(prediction)
        benchmark.command(
            "nnunet_dycon.cli:main", "select", "-d", benchmark.dataset(run.labeled), "-i", str(linked),
            "-n", str(NUMBER), "-o", str(output), "--strategy", self.strategy, "--seed", str(draw), "-np", "1",
            log="select.log",
        )  # fmt: skip
        with (output / TABLE).open() as table:
            selected += [row["case"] for row in csv.DictReader(table)]
        with replacing(file) as unfinished:
            unfinished.write_text(json.dumps(selected))
        print(f"{self.strategy}, draw {draw}: {' '.join(selected)}", flush=True)

    def predictions(self, benchmark: Benchmark, run: Run) -> Path:
        """Return a folder with the predictions of the unlabeled cases by the model of a run, made if necessary."""
        benchmark.prepare([run.labeled])
        benchmark.declare([run])
        folder = benchmark.trained(run) / "fold_all" / "unlabeled"
        if not (folder / "finished").is_file():
            images, name = benchmark.raw(run.labeled) / FOLDERS["unlabeled"][0], benchmark.name(run)
            benchmark.predict(benchmark.dataset(run.labeled), name, images, folder, "--save_probabilities")
            (folder / "finished").touch()
        return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_arguments(parser, HIPPOCAMPUS)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the CSVs")
    parser.add_argument("--method", default=LOWER_BOUND, help="lower_bound or a trainer (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--seeds", type=int, nargs="+", choices=DRAWS, default=[0, 1])
    parser.add_argument("--random_seeds", type=int, nargs="+", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--sets", nargs="+", choices=("val", "test"), default=["val"])
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    for strategy in arguments.strategies:
        selection = Selection(arguments, strategy)
        draws = {RANDOM: arguments.random_seeds, DIVERSE: [0]}.get(strategy, arguments.seeds)
        for draw in draws:
            selection.run_all(arguments.method, draw, [draw] if strategy == UNCERTAINTY else arguments.seeds)


if __name__ == "__main__":
    main()
