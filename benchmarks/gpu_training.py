"""Training of nnUNetTrainer, the recommended default and nnUNetTrainerDyCON in turns, for a limited time.

    python -m benchmarks.gpu_training --data <la_125mm> --work <folder> --device cuda --seconds 300 [--json FILE]

- Data set: left atrium, 8 labeled and 47 unlabeled cases, fold 0. The pseudo Dice that nnU-Net logs in each epoch is
  computed on patches of the labeled validation cases of fold 0.
- In a turn, a new process resumes the training of one trainer from its last checkpoint, as with --c, and stops after a
  given epoch. In a round of turns, all trainers train until the same epoch. A checkpoint is written in each epoch. A
  later call resumes the trainings, and so does `nnUNetv2_train 108 3d_fullres 0 -tr <trainer>_50epochs -p <plans> --c`.
- The JSON file contains "seconds", "pseudo_dice" and "peak_bytes" of each trainer. "seconds" are the times of the
  epochs, with validation and without checkpoints. The first epoch of a turn includes the compilation of the network.
  "peak_bytes" is the peak memory: on a GPU the memory allocated by PyTorch, on a CPU the resident memory of the
  process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.la import LEFT_ATRIUM
from benchmarks.measuring import machine, markdown, write
from benchmarks.preparation import SUPERVISED, Preparation, add_arguments
from benchmarks.train_step import LABELED
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.system.environment import DISCOVERY
from nnunet_dycon.system.files import replacing
from nnunet_dycon.system.processes import exiting_on_sigterm, peak_memory

NAMES = (SUPERVISED, RECOMMENDED, "nnUNetTrainerDyCON")
RECORD = "gpu_training.json"
_GRACE = 20  # seconds for a checkpoint at the end
_IMPORTS = 10  # seconds before the start of main
_GROWTH = 3  # a round has at most this number of times the epochs before it, since each turn compiles again
_MARGIN = 1.2  # for checkpoints, and epochs that take longer than before
Turn = Callable[[str, int, float], None]


def train(name: str, until: int, arguments: argparse.Namespace) -> None:
    """Resume or start the training of a trainer in this process, and stop after a given epoch.

    After each epoch, times, pseudo Dice and memory are written to the file `RECORD` in the output folder. If the
    training is not complete after the given epoch, the process exits with sys.exit.

    Args:
        name: name of the trainer.
        until: number of epochs after which to stop, including those of earlier turns.
        arguments: parsed command line.
    """
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    preparation, device = Preparation(arguments, LEFT_ATRIUM), torch.device(arguments.device)
    full_name = f"{name}_{arguments.epochs}epochs"
    trainer = get_trainer_from_args(
        preparation.dataset(LABELED), "3d_fullres", 0, full_name, preparation.plans, True, device
    )
    trainer.num_iterations_per_epoch = arguments.iterations
    trainer.num_val_iterations_per_epoch = max(1, arguments.iterations // 5)
    trainer.save_every = 1
    maybe_load_checkpoint(trainer, True, False)
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train, like the number of threads
    torch.set_num_threads(1 if device.type == "cuda" else os.cpu_count() or 1)
    file = Path(trainer.output_folder) / RECORD
    earlier_peak = read_record(file)["peak_bytes"]
    end_epoch = trainer.on_epoch_end

    def on_epoch_end() -> None:
        end_epoch()
        starts, ends, dice = (
            trainer.logger.get_value(key, None)
            for key in ("epoch_start_timestamps", "epoch_end_timestamps", "mean_fg_dice")
        )
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
        record = {
            "seconds": [end - start for start, end in zip(starts, ends)],
            "pseudo_dice": [float(value) for value in dice],
            "peak_bytes": max(peak, earlier_peak),
        }
        with replacing(file) as partial:
            partial.write_text(json.dumps(record))
        if until <= trainer.current_epoch < trainer.num_epochs:
            sys.exit()

    trainer.on_epoch_end = on_epoch_end
    try:
        trainer.run_training()
    finally:
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            getattr(loader, "_finish", lambda: None)()


def read_record(file: Path) -> dict:
    """Read the file that `train` writes; without a file, return empty lists and 0 bytes.

    Returns:
        "seconds" and "pseudo_dice" (lists with a value per epoch), and "peak_bytes".
    """
    return json.loads(file.read_text()) if file.is_file() else {"seconds": [], "pseudo_dice": [], "peak_bytes": 0}


def alternate(
    names: Iterable[str],
    turn: Turn,
    seconds_of: Callable[[str], list[float]],
    epochs: int,
    deadline: float,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Train in rounds until the trainings are complete or the remaining time is too short for a round.

    In a round, each trainer has a turn, and all train until the same epoch. The first round has one epoch. A later
    round has as many epochs as the remaining time allows, at most 3 times the number of epochs before it. If the time
    is too short for one epoch of each trainer, there is no further round. A trainer that finishes no epoch in its turn
    has no further turns.

    Args:
        names: names of the trainers.
        turn: function that trains in one turn. Its arguments are the name of the trainer, the number of epochs after
            which to stop (including earlier turns), and the time limit in seconds.
        seconds_of: function that returns the times of all finished epochs of a trainer in seconds.
        epochs: number of epochs of a complete training.
        deadline: value of `now()` at which the last turn must end.
        now: clock in seconds.
    """
    remaining = list(names)
    startup = dict.fromkeys(remaining, 0.0)
    while remaining:
        done = {name: len(seconds_of(name)) for name in remaining}
        fewest = min(done.values())
        more = _GROWTH * fewest or 1
        if fewest:
            per_epoch = _MARGIN * sum(statistics.median(seconds_of(name)) for name in remaining)
            more = min(more, int((deadline - now() - sum(startup[name] for name in remaining)) / per_epoch))
        until = min(fewest + more, epochs)
        waiting = [name for name in remaining if done[name] < until]
        if more < 1 or not waiting:
            return
        for number, name in enumerate(waiting):
            start = now()
            turn(name, until, max(1.0, (deadline - start) / (len(waiting) - number)))
            trained = seconds_of(name)[done[name] :]
            startup[name] = now() - start - sum(trained)
            if not trained:
                remaining.remove(name)


@exiting_on_sigterm()  # ends the processes of a training, too
def main() -> None:
    """Prepare the data if necessary, train for the given time, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, replace(LEFT_ATRIUM, spacing=1.25, features=()))
    parser.add_argument("--seconds", type=float, required=True, help="time for all trainings together")
    parser.add_argument("--epochs", type=int, choices=(5, 10, 20, 50, 100, 250, 500), default=50, help="length over "
                        "which the learning rate decays to 0 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--iterations", type=int, default=250, help="steps per epoch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results as JSON, written after each turn")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        train(arguments.one, arguments.until, arguments)
        return
    deadline = time.monotonic() + arguments.seconds - _GRACE - _IMPORTS
    preparation = Preparation(arguments, LEFT_ATRIUM)
    preparation.prepare([LABELED])
    environment = {**os.environ, **preparation.folders, "nnUNet_extTrainer": str(DISCOVERY)}
    if arguments.device == "cpu":
        environment["nnUNet_n_proc_DA"] = "0"
    models = Path(preparation.folders["nnUNet_results"]) / preparation.dataset(LABELED)
    files = {
        name: models / f"{name}_{arguments.epochs}epochs__{preparation.plans}__3d_fullres" / "fold_0" / RECORD
        for name in NAMES
    }
    errors: dict[str, str | None] = {}

    def results() -> dict[str, dict]:
        return {name: read_record(file) | {"error": errors.get(name)} for name, file in files.items()}

    def write_results() -> None:
        if arguments.json:
            about = {"machine": machine(arguments.device), "plans": preparation.plans, "fold": 0}
            write(arguments.json, results(), **about, epochs=arguments.epochs, iterations=arguments.iterations)

    def turn(name: str, until: int, seconds: float) -> None:
        print(f"{name}: until epoch {until}, at most {seconds:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu_training", *sys.argv[1:], "--one", name, "--until", str(until)]
        process = subprocess.Popen(command, env=environment)
        try:
            errors[name] = f"exit code {code}" if (code := process.wait(seconds)) else None
        except subprocess.TimeoutExpired:
            errors[name] = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                process.terminate()  # semi-supervised trainers write a checkpoint
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
                process.kill()
            write_results()

    write_results()
    alternate(NAMES, turn, lambda name: read_record(files[name])["seconds"], arguments.epochs, deadline)
    print(as_markdown(results()))
    sys.exit(not all(result["seconds"] for result in results().values()))


def as_markdown(results: dict[str, dict]) -> str:
    """Return a Markdown table of trainings, with a row per trainer.

    - epochs: number of finished epochs;
    - seconds per epoch: median;
    - pseudo Dice: that of the last epoch;
    - peak MB: peak memory;
    - error: why the last turn ended early, if it did.

    Args:
        results: name of the trainer -> result of `read_record`, with the additional entry "error" (text or None).
    """
    rows = []
    for name, its in results.items():
        measured: tuple[str, ...] = ("", "", "")
        if its["seconds"]:
            median = statistics.median(its["seconds"])
            measured = (f"{median:.1f}", f"{its['pseudo_dice'][-1]:.3f}", f"{its['peak_bytes'] / 1e6:.0f}")
        rows.append((f"`{name}`", len(its["seconds"]), *measured, its["error"] or ""))
    return markdown(("trainer", "epochs", "seconds per epoch", "pseudo Dice", "peak MB", "error"), rows)


if __name__ == "__main__":
    main()
