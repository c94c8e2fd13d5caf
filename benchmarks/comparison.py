"""Comparison of trainers: train and predict with nnU-Net's commands, and append the scores to a CSV.

- The method lower_bound is nnUNetTrainer on the labeled cases. The method upper_bound is nnUNetTrainer on all training
  cases with their labels. The plans of upper_bound are those for the largest number of labeled cases in
  `DataSet.labels`. All other methods are trainers listed by `nnunet_dycon list`. Settings of a trainer can be changed
  after a colon: nnUNetTrainerDyCON:uncl_weight=0.1,rampup=0.8
- lower_bound+mae1000 and nnUNetTrainerDyCON+mae1000 are the same methods with a pretrained encoder, see
  `benchmarks.pretraining`. 1000 is the number of steps of the pretraining.
- nnUNetTrainerWeakToStrong+rounds2 is the same method after two rounds of self-training, see
  `Benchmark.pseudo_label`. All models of a run have the same seed.
- The sets to score are val, unlabeled and test. The set unlabeled contains the unlabeled training cases, whose labels
  are used for scoring only. Choose settings on val and unlabeled. Score test only when all settings are final.
- All runs have the same number of iterations, over which the learning rate decays to 0. The final checkpoint of the
  student is scored. If there is a teacher or a second network (of co-training), its final checkpoint is scored, too.
  Prediction uses nnU-Net's test-time mirroring and no postprocessing.
- Scores that the CSV contains are not computed again. The same command therefore resumes an interrupted benchmark.

The CSV has a row per run, scored network, case and label:

- method, labels, draw, seed: the run. labels is the number of labeled cases. draw is 0 if they are the first cases of
  the protocol (the list of cases in benchmarks/protocols), otherwise the seed with which they were drawn;
- weights: the scored network: student, teacher or second;
- set, case, label: what was scored: val, unlabeled or test, the name of the case, and the name of the label;
- dice, hd95_mm: Dice, and 95th percentile of the Hausdorff distance in mm (the larger of both directions);
- plans, iterations, precision: plans identifier, number of training iterations, float32 or bfloat16;
- commit, trainer_at_commit: commit of the training, and the name of the trainer class at that commit;
- scored: date of scoring.
"""

import argparse
import csv
import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from filelock import FileLock
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from benchmarks.preparation import (
    DRAWS,
    HERE,
    LOWER_BOUND,
    SUPERVISED,
    UNLABELED,
    UPPER_BOUND,
    DataSet,
    LabeledSet,
    Preparation,
    add_arguments,
    trainer_class,
)
from nnunet_dycon.dataset_conversion.writer import FOLDERS
from nnunet_dycon.inference.evaluation import evaluate_folder
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.self_training.writing import result_name
from nnunet_dycon.system.files import replacing
from nnunet_dycon.training.checkpoints import SECOND, STUDENT, TEACHER
from nnunet_dycon.training.settings import TrainingSchedule

COLUMNS = ("method", "labels", "draw", "seed", "weights", "set", "case", "label", "dice", "hd95_mm", "plans",
           "iterations", "precision", "commit", "trainer_at_commit", "scored")  # fmt: skip
SETS = ("val", UNLABELED, "test")
ITERATIONS_PER_EPOCH = 100
_FIRST_ROUND_ID = 900  # of the data sets of self-training; those of `DataSet` are smaller
_BUDGET = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
_COMPANIONS = {"teacher": TEACHER, "second": SECOND}


class Method(NamedTuple):
    """The parts of a method, such as nnUNetTrainerDyCON+rounds2:gamma=1.0.

    Attributes:
        name: lower_bound, upper_bound or the name of a trainer.
        addition: the text after "+", such as mae1000 or rounds2; "" without one.
        settings: the text after the colon, such as gamma=1.0; "" without one.
    """

    name: str
    addition: str
    settings: str

    @classmethod
    def parse(cls, method: str) -> "Method":
        before, _, settings = method.partition(":")
        name, _, addition = before.partition("+")
        return cls(name, addition, settings)

    def __str__(self) -> str:
        return self.name + f"+{self.addition}" * bool(self.addition) + f":{self.settings}" * bool(self.settings)


@dataclass(frozen=True)
class Run:
    """One training of a method, with given labeled cases and seed.

    Attributes:
        method: the method as given on the command line, with changed settings after a colon.
        labeled: number of labeled cases, and their draw (0 for the first ones of the protocol, otherwise a seed).
        seed: random seed of the training.
    """

    method: str
    labeled: LabeledSet
    seed: int

    @property
    def trainer(self) -> str:
        """Name of the trainer class: nnUNetTrainer for lower_bound and upper_bound, else the method's name."""
        name = Method.parse(self.method).name
        return SUPERVISED if name in (LOWER_BOUND, UPPER_BOUND) else name

    @property
    def pretraining_steps(self) -> int:
        """Number of steps of the pretraining, such as 1000 for lower_bound+mae1000; 0 without pretraining.

        Raises:
            ValueError: see `_addition`.
        """
        return self._addition("mae")

    @property
    def rounds(self) -> int:
        """Number of rounds of self-training, such as 2 for lower_bound+rounds2; 0 without self-training.

        Raises:
            ValueError: see `_addition`.
        """
        return self._addition("rounds")

    def _addition(self, word: str) -> int:
        """Return the number after a word that follows "+" in the method's name; 0 if there is another word or none.

        Raises:
            ValueError: the text after "+" is not mae or rounds with a number, or the method is upper_bound, which has
                no unlabeled cases.
        """
        name, addition, _ = Method.parse(self.method)
        if not addition:
            return 0
        found = re.fullmatch(r"(mae|rounds)([1-9]\d*)", addition)
        if name == UPPER_BOUND or not found:
            raise ValueError(self.method)
        return int(found[2]) if found[1] == word else 0

    def after_rounds(self, rounds: int) -> "Run":
        """Return the run of the same chain of self-training after another number of rounds; 0 for the first model."""
        addition = f"rounds{rounds}" if rounds else ""
        return replace(self, method=str(Method.parse(self.method)._replace(addition=addition)))

    @property
    def settings(self) -> dict[str, object]:
        """Settings that `method` changes after the colon: name -> value."""
        pairs = Method.parse(self.method).settings.split(",") if ":" in self.method else ()
        return {name: json.loads(value) for name, value in (pair.split("=") for pair in pairs)}

    @property
    def weights(self) -> dict[str, str]:
        """Checkpoints to score: network ("student", and "teacher" or "second" if there is one) -> file name."""
        companion = None if self.trainer == SUPERVISED else TRAINERS[self.trainer].companion
        return {"student": STUDENT} | ({} if companion is None else {companion: _COMPANIONS[companion]})


class Benchmark(Preparation):
    """Working folder for the trainings and predictions of a comparison, and CSV for the scores.

    Args:
        arguments: parsed command line of `compare`.
        data_set: the data set of the benchmark.
    """

    def __init__(self, arguments: argparse.Namespace, data_set: DataSet) -> None:
        super().__init__(arguments, data_set)
        self.table: Path = arguments.table
        self.iterations: int = arguments.iterations
        self.precision: str = arguments.precision
        self.sets: list[str] = arguments.sets
        self.student_only: bool = arguments.weights == "student"
        self._writing = Lock()

    def name(self, run: Run) -> str:
        """Return the name of the trainer class of a run. It is the same in all rounds of self-training.

        Example: Benchmark_nnUNetTrainerDyCON_uncl_weight_i2000_s0_1a2b3c4d, with the changed setting uncl_weight, 2000
        iterations and seed 0. The hash of `declaration(run)` at the end makes the name unique.
        """
        settings = "".join(f"_{key}" for key in run.settings)
        number = hashlib.sha256(json.dumps(self.declaration(run), sort_keys=True).encode()).hexdigest()[:8]
        method = Method.parse(run.method)
        pretraining = f"_{method.addition}" if run.pretraining_steps else ""
        return f"Benchmark_{method.name}{pretraining}{settings}_i{self.iterations}_s{run.seed}_{number}"

    def declaration(self, run: Run) -> dict[str, Any]:
        """Return the settings of a run from which its trainer class is built, as written to runs.json.

        The keys are described in benchmarks/trainers/nnunet_dycon_benchmark_trainers.py, which reads runs.json.
        """
        budget = {"epochs": self.iterations // ITERATIONS_PER_EPOCH, "iterations_per_epoch": ITERATIONS_PER_EPOCH}
        pretraining = {"pretraining_steps": run.pretraining_steps} if run.pretraining_steps else {}
        return {"trainer": run.trainer, "settings": run.settings, "seed": run.seed, "precision": self.precision,
                **budget, **pretraining}  # fmt: skip

    def declare(self, runs: Iterable[Run]) -> None:
        """Add runs to runs.json in the working folder, so that nnU-Net finds their trainer classes.

        nnU-Net searches for them in benchmarks/trainers. A module there builds each class from its entry in runs.json.
        """
        file = self.work / "runs.json"
        with FileLock(f"{file}.lock"):  # several benchmarks may share a folder
            known = json.loads(file.read_text()) if file.is_file() else {}
            known |= {self.name(run): self.declaration(run) for run in runs}
            with replacing(file) as unfinished:
                unfinished.write_text(json.dumps(known, indent=1))

    def perform(self, run: Run) -> None:
        """Train a run unless its final checkpoint exists, then score its networks and append the scores to the CSV.

        Only the pairs of set and network that `missing` returns are predicted and scored.
        """
        start = time.monotonic()
        name = self.name(run)
        raw, model = self.raw(run.labeled), self.trained(run)
        dataset = model.parent.name
        commit = self.trained_by(run, model / "fold_all")
        rows = []
        for which, weights in self.missing(run):
            output = model / "fold_all" / f"{which}_{weights}"
            self.predict(dataset, name, raw / FOLDERS[which][0], output, "-chk", run.weights[weights])
            references = self.references(run.labeled, which)
            scored = evaluate_folder(references, output, num_processes=1).as_json()["cases"]
            rows += [self._row(run, weights, which, case, commit) for case in scored]
        self._append(rows)
        print(f"{run}: {time.monotonic() - start:.0f} s", flush=True)

    def trained(self, run: Run) -> Path:
        """Return the folder of the model of a run in nnUNet_results, which is trained if necessary."""
        name = self.name(run)
        dataset = self.round_dataset(run) if run.rounds else self.dataset(run.labeled)
        model = self.work / "nnUNet_results" / dataset / f"{name}__{self.plans}__3d_fullres"
        with FileLock(self.work / f"{model.name}_{dataset}.lock"):  # other runs may need the same model
            if (model / "fold_all" / STUDENT).is_file():
                return model
            if run.rounds:
                self.pseudo_label(run, dataset)
            pretrained = ["-pretrained_weights", str(self.pretrained(run))] if run.pretraining_steps else []
            self.command(
                "nnunetv2.run.run_training:run_training_entry", dataset, "3d_fullres", "all", "-tr", name,
                "-p", self.plans, "-device", self.device, *pretrained, log=f"{name}_{dataset}.log",
            )  # fmt: skip
        return model

    def predict(self, dataset: str, trainer: str, images: Path, output: Path, *options: str) -> None:
        """Predict images with a model of fold all.

        Args:
            dataset: the data set on which the model was trained.
            trainer: name of its trainer class.
            images: folder of the images.
            output: folder of the predictions.
            options: further options of nnUNetv2_predict.
        """
        self.command(
            "nnunetv2.inference.predict_from_raw_data:predict_entry_point", "-d", dataset, "-c", "3d_fullres",
            "-f", "all", "-tr", trainer, "-p", self.plans, "-i", str(images), "-o", str(output),
            "-device", self.device, "-npp", "0", "-nps", "0", *options, log=f"{trainer}_{dataset}.log",
        )  # fmt: skip

    def round_dataset(self, run: Run) -> str:
        """Return the name of the data set of the last round of self-training of a run."""
        if run.rounds > 1:  # so that IDs are in the order of rounds
            self.round_dataset(run.after_rounds(run.rounds - 1))
        with FileLock(self.work / "rounds.json.lock"):  # several benchmarks may share a folder
            file = self.work / "rounds.json"
            known = json.loads(file.read_text()) if file.is_file() else {}
            key = f"{self.dataset(run.labeled)} {self.plans} {self.name(run)} round {run.rounds}"
            number = known.setdefault(key, _FIRST_ROUND_ID + len(known))
            with replacing(file) as unfinished:
                unfinished.write_text(json.dumps(known, indent=1))
        return result_name(self.dataset(run.labeled), number)

    def pseudo_label(self, run: Run, dataset: str) -> None:
        """Make the data set of the last round of self-training of a run, unless it has been made.

        As in `nnunet_dycon self_train`, the model of the previous round predicts the unlabeled cases, and the best 80 %
        of the predictions become labels: in the first round those with the highest expected Dice, later those that
        changed least since the previous round.

        Args:
            run: the run.
            dataset: result of `round_dataset`.
        """
        before, number = run.after_rounds(run.rounds - 1), str(convert_dataset_name_to_id(dataset))
        model = self.trained(before)
        self.trained_by(before, model / "fold_all")  # raises an error if its settings are not those of the run
        previous = ["--previous", model.parent.name] if before.rounds else []
        self.command("nnunet_dycon.cli:main", "pseudo_label", "-m", str(model), "-f", "all",
                     "-d", str(self.dataset_id(run.labeled)), "-o", number, "-p", self.plans, "-device", self.device,
                     "-np", "1", *previous, log=f"{dataset}.log")  # fmt: skip
        finished = self.work / "nnUNet_preprocessed" / dataset / "preprocessed_by_benchmark"
        if not finished.is_file():
            planning = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"
            self.command(f"{planning}:extract_fingerprint_entry", "-d", number, "-np", "1", log=f"{dataset}.log")
            self.command(f"{planning}:preprocess_entry", "-d", number, "-plans_name", self.plans,
                         "-c", "3d_fullres", "-np", "1", log=f"{dataset}.log")  # fmt: skip
            finished.touch()

    def pretrained(self, run: Run) -> Path:
        """Return the weights from which a run with pretraining starts, which are made if necessary.

        They are pretrained on the unlabeled cases by `benchmarks.pretraining`, and adapted to the network of the run's
        trainer by `nnunet_dycon adapt_weights`.
        """
        dataset = str(self.dataset_id(run.labeled))
        checkpoint = self.work / "pretrained" / f"{dataset}_{self.plans}_mae{run.pretraining_steps}.pth"
        adapted = checkpoint.with_name(f"{checkpoint.stem}_{run.trainer}.pth")
        checkpoint.parent.mkdir(exist_ok=True)
        about = ["-d", dataset, "-p", self.plans]
        with FileLock(f"{checkpoint}.lock"):  # several runs start from the same weights
            if not checkpoint.is_file():
                steps = ["--steps", str(run.pretraining_steps)]
                self.command(
                    "benchmarks.pretraining:main", *about, *steps, "-o", str(checkpoint), log="pretraining.log"
                )
            if not adapted.is_file():
                options = ["-w", str(checkpoint), *about, "-tr", run.trainer, "-o", str(adapted)]
                self.command("nnunet_dycon.cli:main", "adapt_weights", *options, log="pretraining.log")
        return adapted

    def trained_by(self, run: Run, folder: Path) -> str:
        """Return the commit hash of this repository with which a model was trained, such as "bb7b045".

        Args:
            run: the run that trained the model.
            folder: output folder of the training. Its benchmark.json contains the commit and the settings of the
                training.

        Raises:
            SystemExit: the settings in benchmark.json are not those that a new training of `run` would have, for
                example because a default of the trainer has changed.
        """
        record = json.loads((folder / "benchmark.json").read_text())
        if run.trainer in TRAINERS:
            trainer = trainer_class(run.trainer)
            settings = {kind: asdict(getattr(trainer, kind)) for kind in record["settings"]}
            for its in settings.values():
                its |= {name: value for name, value in run.settings.items() if name in its}
            recorded = dict(record["settings"])
            if "training_settings" in recorded:  # settings that are newer than the record had their neutral defaults
                recorded["training_settings"] = asdict(TrainingSchedule()) | recorded["training_settings"]
            if recorded != json.loads(json.dumps(settings)):
                raise SystemExit(
                    f"{folder} was trained with other settings of {run.trainer}; delete it and its rows in the CSV"
                )
        return record["commit"]

    def _row(self, run: Run, weights: str, which: str, case: dict, commit: str) -> dict:
        """Return the row of the CSV with the scores of one label in one case.

        Args:
            run: the run.
            weights: the scored network: "student", "teacher" or "second".
            which: the set of the case: "val", "unlabeled" or "test".
            case: an entry of "cases" in `Evaluation.as_json()`: name of the case, name of the label, and scores.
            commit: commit of this repository with which the run was trained, a result of `trained_by`.
        """
        scores = {"dice": round(case["dice"], 5), "hd95_mm": round(case["hd95_mm_max_directed"], 3)}
        key = {**self._key(run), "weights": weights, "set": which, "case": case["case"], "label": case["label"]}
        made = {"commit": commit, "trainer_at_commit": run.trainer, "scored": date.today().isoformat()}
        return key | scores | made

    def _key(self, run: Run) -> dict[str, Any]:
        """Return the columns of the CSV that identify a run, name -> value.

        They are method, labels, draw, seed, plans, iterations and precision.
        """
        labels, draw = run.labeled
        key = {"method": run.method, "labels": labels, "draw": draw, "seed": run.seed}
        return key | {"plans": self.plans, "iterations": self.iterations, "precision": self.precision}

    def missing(self, run: Run) -> list[tuple[str, str]]:
        """Return the pairs (set, network) that --sets and --weights request and that are not in the CSV for a run.

        Example: [("val", "student"), ("test", "teacher")]. The upper bound has no pair with the set "unlabeled", since
        all its training cases are labeled.
        """
        sets = [which for which in self.sets if which != UNLABELED or run.method != UPPER_BOUND]
        weights = ["student"] if self.student_only else list(run.weights)
        wanted = [(which, its) for its in weights for which in sets]
        if not self.table.is_file():
            return wanted
        with self.table.open() as file:
            there = {(row["set"], row["weights"]) for row in csv.DictReader(file)
                     if all(row[name] == str(value) for name, value in self._key(run).items())}  # fmt: skip
        return [pair for pair in wanted if pair not in there]

    def _append(self, rows: list[dict]) -> None:
        with self._writing, self.table.open("a", newline="") as file:
            new = file.tell() == 0
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)


def _settings(trainer: str) -> set[str]:
    """Return the names of the settings of a trainer that a method may change.

    These are all settings except the numbers of epochs and iterations, which the benchmark sets.
    """
    found = [getattr(trainer_class(trainer), f"{kind}_settings", None) for kind in ("training", "method", "optimizer")]
    return {field.name for settings in found if settings for field in fields(settings)} - set(_BUDGET)


def compare(data_set: DataSet, description: str | None, argv: Sequence[str] | None = None) -> None:
    """Run the command line of a benchmark, such as `python -m benchmarks.la`.

    All requested runs whose scores are not in the CSV yet are trained, predicted and scored.

    Args:
        data_set: the data set of the benchmark.
        description: text of --help.
        argv: the command-line arguments; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, data_set)
    table = HERE / "results" / f"{data_set.table}.csv"
    parser.add_argument("--table", type=Path, default=table, help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", required=True, help="lower_bound, upper_bound, and names of trainers")
    parser.add_argument("--labels", type=int, nargs="+", choices=data_set.labels, default=[data_set.labels[-1]])
    if data_set.draws:
        draw_help = "labeled sets: 0 for the protocol's first cases, 1 to 4 are seeds of random sets (default: 0)"
        parser.add_argument(
            "--draw", dest="draws", type=int, nargs="+", choices=DRAWS, default=[0], metavar="K", help=draw_help
        )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["val"], help="default: val")
    parser.add_argument("--weights", choices=("all", "student"), default="all", help="weights of a run to score: all "
                        "for student and teacher or second network, or student only (default: all)")  # fmt: skip
    parser.add_argument("--iterations", type=int, default=data_set.iterations, help="default: %(default)s")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="precision of "
                        "products on a CPU; bfloat16 is twice as fast on a CPU that supports it, and is emulated with "
                        "rounded float32 on others (default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs; on a CPU each uses one core")
    arguments = parser.parse_args(argv)
    labeled_sets = [
        LabeledSet(labels, draw) for draw in getattr(arguments, "draws", [0]) for labels in arguments.labels
    ]
    asked = [Run(method, data_set.all_labeled if method == UPPER_BOUND else labeled, seed) for seed in arguments.seeds
             for labeled in labeled_sets for method in arguments.methods]  # fmt: skip
    for run in asked:
        try:
            _ = run.settings
        except ValueError:
            parser.error(f'{run.method}: settings must be name=value, text in double quotes, such as mixing="none"')
        try:
            _ = run.rounds
        except ValueError:
            parser.error(f"{run.method}: +mae needs a number of steps, as in lower_bound+mae1000, and +rounds a number "
                         "of rounds; upper_bound has no unlabeled cases and can have neither")  # fmt: skip
    unknown = {run.trainer for run in asked} - {SUPERVISED, *TRAINERS}
    if unknown:
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}; run `nnunet_dycon list` for all trainers")
    for run in asked:
        if run.settings and (unknown := run.settings.keys() - _settings(run.trainer)):
            parser.error(f"{run.trainer} has no setting {', '.join(sorted(unknown))}; correct or remove it")
    if arguments.iterations < 1 or arguments.iterations % ITERATIONS_PER_EPOCH:
        parser.error(f"--iterations must be a multiple of {ITERATIONS_PER_EPOCH}")
    benchmark = Benchmark(arguments, data_set)
    runs = [run for run in dict.fromkeys(asked) if benchmark.missing(run)]
    benchmark.prepare({run.labeled for run in runs})
    if UNLABELED in arguments.sets:
        benchmark.prepare_references({run.labeled for run in runs})
    benchmark.declare(runs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in [pool.submit(benchmark.perform, run) for run in runs]:
            future.result()
