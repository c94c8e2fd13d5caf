"""Measurement of a few real training steps: time, memory and bottleneck, compared with nnU-Net's own trainer.

Each trainer runs in a process of its own, with the user's plans and preprocessed cases, and a temporary folder for
everything it writes. If the memory does not suffice, smaller batches and plans are measured, and the first that fits is
recommended.
"""

import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_dycon.components.diagnostics import SECONDS
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.doctor.findings import FAIL, NOTE, OK, WARNING, Finding, named
from nnunet_dycon.errors import ONE_LINE, UserError
from nnunet_dycon.inference.model_folders import trainer_class
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.processes import end_with_parent, exiting_on_sigterm, peak_memory
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer

NNUNET = "nnUNetTrainer"
_WARM_UP, _MIN_STEPS, _MAX_STEPS = 3, 3, 100
_SECONDS = 20.0  # for the measured steps of a trainer, unless _MIN_STEPS take longer
_VALIDATION_STEPS = 3
_WIDE = 0.25  # distance of the quartiles, relative to the median, from which the times are called unsteady
_SLOW_DATA = 0.2  # share of a step that waits for data, from which data loading is called the bottleneck
_EPOCHS = (250, 1000)
_NO_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_SMALLER = (0.75, 0.5, 0.35)  # memory targets of the plans that are tried, relative to the default of their planner


@dataclass(frozen=True)
class Run:
    """A trainer to measure.

    Attributes:
        trainer: name of the trainer.
        plans: content of the plans.
        configuration: configuration in the plans.
        dataset_json: content of dataset.json.
        fold: fold to train.
        device: type of the device: "cuda", "cpu" or "mps".
        unlabeled_batch_size: number of unlabeled patches per step; None for the trainer's default.
    """

    trainer: str
    plans: dict
    configuration: str
    dataset_json: dict
    fold: int | Literal["all"]
    device: str
    unlabeled_batch_size: int | None = None


@dataclass(frozen=True)
class Measurement:
    """The result of a `Run`.

    Attributes:
        trainer: name of the trainer.
        device: name of the device.
        labeled, unlabeled: number of labeled and of unlabeled patches per step.
        seconds: median duration of a training step in seconds.
        quartiles: first and third quartile of the duration of a training step in seconds.
        parts: part of a step -> mean duration in seconds; "data" is the wait for a batch.
        first_step: duration of the first step in seconds, which includes torch.compile.
        validation_step: median duration of a validation step in seconds.
        bytes: memory in bytes. For "cuda", the peak of the memory reserved by PyTorch. For "cpu", the peak of the
            resident memory of the training process, without the processes that prepare batches. For "mps", the memory
            allocated by the driver at the end of the measurement.
        steps: number of measured steps.
        hours: number of epochs of a training -> estimated duration of its training and validation steps in hours.
    """

    trainer: str
    device: str
    labeled: int
    unlabeled: int
    seconds: float
    quartiles: tuple[float, float]
    parts: dict[str, float]
    first_step: float
    validation_step: float
    bytes: int
    steps: int
    hours: dict[int, float] = field(default_factory=dict)

    @property
    def as_text(self) -> str:
        """One line of text: duration of a step, percentage of each part, memory, estimated duration of a training."""
        total = sum(self.parts.values())
        parts = ", ".join(f"{part} {share / total:.0%}" for part, share in self.parts.items())
        hours = ", ".join(f"{epochs} epochs {_duration(number)}" for epochs, number in self.hours.items())
        patches = f"{self.labeled} labeled" + (f" and {self.unlabeled} unlabeled" if self.unlabeled else "")
        peak = "" if self.device.startswith("mps") else "peak "
        return (
            f"{self.trainer} on {self.device}: {self.seconds:.3g} s per step of {patches} patches (quartiles "
            f"{self.quartiles[0]:.3g} and {self.quartiles[1]:.3g} s, {self.steps} steps, the first took "
            f"{self.first_step:.3g} s): {parts}; {peak}memory {self.bytes / 2**30:.3g} GiB; {hours}"
        )

    @property
    def is_unsteady(self) -> bool:
        """Whether the durations of the steps differ much, for instance because other programs use the machine."""
        return self.quartiles[1] - self.quartiles[0] > _WIDE * self.seconds

    @property
    def bottleneck(self) -> str:
        """Name of the part of a step that limits the speed.

        This is "data" if a step waits for data more than 20 % (_SLOW_DATA) of its time, else the longest part.
        """
        if self.parts.get("data", 0) > _SLOW_DATA * sum(self.parts.values()):
            return "data"
        return max(self.parts, key=self.parts.__getitem__)


def examine_speed(
    trainer: str, unlabeled: UnlabeledCases, fold: int | Literal["all"] | None, device: str, results: list[dict]
) -> Iterator[Finding]:
    """Measure the time per step and the memory of a trainer and, for comparison, of nnU-Net's own trainer.

    If the memory does not suffice, try fewer unlabeled patches per step and then smaller plans, and recommend the first
    that fits. Yield the results as findings.

    Args:
        trainer: name of the trainer.
        unlabeled: the unlabeled cases and the plans of the data set. If a semi-supervised trainer is given and these
            cases are not preprocessed, nothing is measured, and a NOTE is yielded.
        fold: number of the fold to train, or "all"; None is the same as "all".
        device: type of the device: "cuda", "cpu" or "mps".
        results: output list, to which the fields of each `Measurement` are appended as a dict.
    """
    is_missing = not unlabeled.is_absent() and unlabeled.fault() is not None
    if issubclass(trainer_class(trainer), SemiSupervisedTrainer) and is_missing:
        remedy = f"run: nnunet_dycon preprocess_unlabeled {unlabeled.arguments}"
        yield Finding("speed", NOTE, "not measured, because the unlabeled cases are not preprocessed yet", remedy)
        return
    with exiting_on_sigterm(), TemporaryDirectory(prefix="nnunet_dycon_doctor_") as scratch:
        environment = _scratch_folders(Path(scratch), unlabeled)
        run = Run(
            trainer, unlabeled.plans.plans, unlabeled.configuration_name, unlabeled.dataset_json,
            "all" if fold is None else fold, device,
        )  # fmt: skip
        own = _measured(run, environment)
        if own is None:
            yield Finding(
                "speed", FAIL, f"{trainer}: the memory does not suffice", _that_fits(run, environment, unlabeled)
            )
        else:
            results.append(asdict(own))
            yield Finding("speed", OK, own.as_text)
            yield _about_bottleneck(own)
        if trainer == NNUNET:
            return
        usual = _measured(replace(run, trainer=NNUNET), environment)
        if usual is None:
            yield Finding("speed", WARNING, f"{NNUNET}: the memory does not suffice" + " either" * (own is None))
            return
        results.append(asdict(usual))
        ratio = "" if own is None else f"; {trainer} takes {own.seconds / usual.seconds:.2g} times as long per step"
        yield Finding("speed", OK, f"{usual.as_text}{ratio}")
        if any(each is not None and each.is_unsteady for each in (own, usual)):
            message = "the times of the steps differ much, so the results are rough"
            yield Finding("speed", NOTE, message, "measure again when no other program uses the machine")


def _about_bottleneck(own: Measurement) -> Finding:
    if own.bottleneck != "data":
        return Finding("speed", OK, f"the longest part of a step is {own.bottleneck}; data loading is fast enough")
    share, processes = own.parts["data"] / sum(own.parts.values()), get_allowed_n_proc_DA()
    message = f"a step waits for data {share:.0%} of its time, with {processes} processes that prepare batches"
    remedy = "set the environment variable nnUNet_n_proc_DA to a larger number, up to the number of CPU cores, and "
    return Finding("speed", WARNING, message, f"{remedy}put nnUNet_preprocessed on a local SSD")


def _that_fits(run: Run, environment: dict[str, str], unlabeled: UnlabeledCases) -> str | None:
    """Return the remedy for a run that lacks memory: a smaller batch or plan that fits; None if none fits.

    Fewer unlabeled patches per step are measured first, then plans with a smaller memory target.

    Args:
        run: the run that lacks memory.
        environment: the environment variables for the measurements, from `_scratch_folders`.
        unlabeled: the data set with its plans.
    """
    for number in _fewer_patches(run):
        smaller = _measured(replace(run, unlabeled_batch_size=number), environment)
        if smaller is not None:
            return (
                f"train a subclass with unlabeled_batch_size={number} (tried: {smaller.bytes / 2**30:.3g} GiB, "
                f"{smaller.seconds:.3g} s per step)"
            )
    planner, dataset_id = run.plans["experiment_planner_used"], unlabeled.dataset_id
    for part in _SMALLER:
        planned = _in_process(_plan, (dataset_id, planner, part), environment)
        if planned is None or run.configuration not in planned[1]["configurations"]:
            continue
        target, plans = planned
        name = plans["plans_name"]
        # The images of the larger plans suffice for patches of any size.
        plans["configurations"][run.configuration]["data_identifier"] = unlabeled.configuration.data_identifier
        smaller = _measured(replace(run, plans=plans), environment)
        if smaller is not None:
            return (
                f"plan a smaller network: nnUNetv2_plan_experiment -d {dataset_id} -pl {planner} -gpu_memory_target "
                f"{target:g} -overwrite_plans_name {name}; then nnUNetv2_preprocess -d {dataset_id} -plans_name {name} "
                f"-c {run.configuration}, and train with -p {name} (tried: {smaller.bytes / 2**30:.3g} GiB, "
                f"{smaller.seconds:.3g} s per step)"
            )
    return None


def _fewer_patches(run: Run) -> Iterator[int]:
    trainer = trainer_class(run.trainer)
    if issubclass(trainer, SemiSupervisedTrainer):
        default = run.plans["configurations"][run.configuration].get("batch_size", 2)
        number = trainer.training_settings.unlabeled_batch_size or default
        while number > 1:
            number //= 2
            yield number


def _scratch_folders(scratch: Path, unlabeled: UnlabeledCases) -> dict[str, str]:
    """Create a temporary nnUNet_preprocessed in ``scratch``, and return environment variables for measurements.

    The new folder contains links to the preprocessed data of the data set, and copies of its JSON files. The variables
    are nnUNet_preprocessed, with the path of the new folder, and nnUNet_wandb_enabled, with the value 0.
    """
    original = unlabeled.folder.parent
    linked = scratch / "preprocessed" / original.name
    linked.mkdir(parents=True)
    for name in (unlabeled.configuration.data_identifier, unlabeled.folder.name, "gt_segmentations"):
        if (original / name).is_dir():
            (linked / name).symlink_to((original / name).resolve())
    for file in original.glob("*.json"):  # copied, since planning writes some
        shutil.copyfile(file, linked / file.name)
    return {"nnUNet_preprocessed": str(linked.parent), "nnUNet_wandb_enabled": "0"}


def _measured(run: Run, environment: dict[str, str]) -> Measurement | None:
    """Return the result of a run in a new process; None if the memory did not suffice."""
    print(f"measuring {run.trainer} on {run.device}", file=sys.stderr)
    with TemporaryDirectory(prefix="nnunet_dycon_doctor_") as results:
        return _in_process(measure, (run,), environment | {"nnUNet_results": results})


def _in_process(function, arguments: tuple, environment: dict[str, str]) -> Any:
    """Call a function in a new process, and return its result.

    Return None if the process is killed by SIGKILL, which the operating system sends if the memory does not suffice.

    Args:
        function: function that can be pickled.
        arguments: positional arguments for `function`.
        environment: environment variables to set in the new process.

    Raises:
        UserError: the function raised an error, or the process ended in another way without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments, environment))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
        process.join()
    except EOFError:  # the process has ended
        process.join()
        result = None
        error = None if process.exitcode == -signal.SIGKILL else f"it ended with exit code {process.exitcode}"
    finally:
        process.kill()  # of an interrupted measurement; its own processes end with it
        process.join()
    if error is not None:
        raise UserError(f"the training steps cannot be measured: {error}")
    return result


def _send_result(sender: Connection, function, arguments: tuple, environment: dict[str, str]) -> None:
    """Call a function and send (its result, None), or (None, error message) if it raises an error.

    This is the main function of the process that `_in_process` starts.

    Args:
        sender: end of the pipe to the parent process.
        function, arguments, environment: the arguments of `_in_process`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to all processes; the parent ends this one
    end_with_parent()
    os.environ |= environment
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):  # nnU-Net prints
            sender.send((function(*arguments), None))
    except SystemExit as end:  # of a trainer
        sender.send((None, str(end).removeprefix(ONE_LINE)))
    except Exception as error:
        sender.send((None, named(error)))


def _plan(dataset_id: int, planner: str, part: float) -> tuple[float, dict]:
    """Make plans with a smaller memory target, and return this target in GB and the plans.

    Args:
        dataset_id: ID of the data set.
        planner: class name of nnU-Net's experiment planner.
        part: the new memory target as a fraction of the planner's default.
    """
    planning = import_module("nnunetv2.experiment_planning")
    planner_class = recursive_find_python_class(planning.__path__[0], planner, current_module=planning.__name__)
    default = inspect.signature(planner_class.__init__).parameters["gpu_memory_target_in_gb"].default
    target = round(part * default, 1)
    os.environ["nnUNet_n_proc_DA"] = "1"  # nnU-Net's planner fails with 0
    name = f"{planner_class.__name__}_{target:g}GB"
    plan_experiments([dataset_id], planner, target, overwrite_plans_name=name)
    folder = nnunet_folder("nnUNet_preprocessed")
    return target, json.loads(next(folder.glob(f"Dataset{dataset_id:03d}_*/{name}.json")).read_text())


def measure(run: Run) -> Measurement | None:
    """Train some steps in this process and return their times and memory; None if the memory does not suffice."""
    # As nnUNetv2_train.
    torch.set_num_threads(multiprocessing.cpu_count() if run.device == "cpu" else 1)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    chosen = trainer_class(run.trainer)
    if run.unlabeled_batch_size is not None:
        settings = replace(chosen.training_settings, unlabeled_batch_size=run.unlabeled_batch_size)
        chosen = type(run.trainer, (chosen,), {"training_settings": settings})
    plans = json.loads(json.dumps(run.plans)) | {"continue_training": False}
    trainer = chosen(plans, run.configuration, run.fold, run.dataset_json, torch.device(run.device))
    trainer.disable_checkpointing = True
    try:
        trainer.on_train_start()
        return _measure_steps(trainer, run)
    except (RuntimeError, MemoryError, SystemExit) as error:
        if _lacks_memory(error):
            return None
        raise
    finally:
        for augmenter in (trainer.dataloader_train, trainer.dataloader_val):
            getattr(augmenter, "_finish", lambda: None)()


def _lacks_memory(error: BaseException | None) -> bool:
    """Return whether an error, or an error in its chain of `__context__`, reports a lack of memory.

    The chain matters because trainers of this package can raise SystemExit while they handle an out-of-memory error.
    """
    while error is not None:
        is_named = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))  # on a CPU or MPS
        if is_named or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        error = error.__context__
    return False


def _measure_steps(trainer: Any, run: Run) -> Measurement:
    _drain(trainer.dataloader_train)
    trainer.on_train_epoch_start()
    first, *_ = [sum(_timed_step(trainer)[:2]) for _ in range(_WARM_UP)]
    trainer.on_train_epoch_start()  # with new clocks
    steps: list[tuple[float, float, dict]] = []
    begin = perf_counter()
    while len(steps) < _MAX_STEPS and (len(steps) < _MIN_STEPS or perf_counter() - begin <= _SECONDS):
        steps.append(_timed_step(trainer))
    waits, computations, outputs = zip(*steps)
    seconds = [wait + computation for wait, computation in zip(waits, computations)]
    if isinstance(trainer, SemiSupervisedTrainer):
        trainer.on_train_epoch_end(list(outputs))
        parts = {
            name.removeprefix(SECONDS): curve[-1] for name, curve in trainer.curves.items() if name.startswith(SECONDS)
        }
    else:
        parts = {"data": statistics.fmean(waits), "step": statistics.fmean(computations)}
    validation = _validation_seconds(trainer)
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    per_epoch = median * trainer.num_iterations_per_epoch
    per_epoch += validation * trainer.num_val_iterations_per_epoch
    return Measurement(
        run.trainer, _device_name(trainer.device), trainer.batch_size, getattr(trainer, "unlabeled_batch_size", 0),
        median, (lower, upper), parts, first, validation, _peak_memory(trainer.device), len(seconds),
        {epochs: epochs * per_epoch / 3600 for epochs in _EPOCHS},
    )  # fmt: skip


def _drain(augmenter: Any) -> None:
    """Discard the batches that were prepared in advance.

    With these batches, the first measured steps would wait less for data than later steps of a training.

    Args:
        augmenter: nnU-Net's augmenter, an iterator of batches.
    """
    # Augmenters with processes have two queues of this length, and each process holds a batch.
    for _ in range(2 * getattr(augmenter, "num_cached", 0) + getattr(augmenter, "num_processes", 0)):
        next(augmenter)


def _timed_step(trainer: Any) -> tuple[float, float, dict]:
    """Train one step.

    Returns:
        The duration of the wait for the batch in seconds, the duration of `train_step` in seconds, and the output of
        `train_step`.
    """
    start = perf_counter()
    batch = next(trainer.dataloader_train)
    loaded = perf_counter()
    # It waits for the GPU: at its end in nnU-Net's trainer, before the update of the weights in ours.
    output = trainer.train_step(batch)
    return loaded - start, perf_counter() - loaded, output


def _validation_seconds(trainer: Any) -> float:
    trainer.on_validation_epoch_start()
    _drain(trainer.dataloader_val)
    seconds = []
    for _ in range(1 + _VALIDATION_STEPS):  # the first one may compile
        start = perf_counter()
        with torch.no_grad():
            trainer.validation_step(next(trainer.dataloader_val))
        seconds.append(perf_counter() - start)
    return statistics.median(seconds[1:])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' * (threads != 1)})" if device.type == "cpu" else device.type


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return torch.mps.driver_allocated_memory() if device.type == "mps" else peak_memory()


def _duration(hours: float) -> str:
    return f"{hours:.2g} h" if hours < 48 else f"{hours / 24:.2g} days"
