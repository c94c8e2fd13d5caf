"""All checks that need a GPU, in one run of limited time.

    python -m benchmarks.gpu_check --data <la_125mm> --work <folder> --minutes 12
    python -m benchmarks.gpu_check --data <la_125mm> --work <folder> --device cpu --tiny --results <folder>

The steps are environment (device and versions), data (plans and preprocessing, if necessary), tests (`pytest -m gpu`),
the benchmarks train_step, loader and losses, and training (`benchmarks.gpu_training`) for the remaining time.

- Each step runs in its own process. Its time limit is a fraction of the remaining time. If a step fails or is stopped
  at its limit, the next step starts. If the step data does not succeed, train_step, loader and training are
  skipped. The log of a step is <work>/gpu_check/<step>.log.
- The result of each step is written to <results>/gpu_<step>.json, with status, seconds, date, commit, device and
  versions. The result of a stopped step contains the measurements that the step had written until then.
- With --prepare, only the data is prepared, which needs no GPU. <work>/nnUNet_preprocessed can then be moved to another
  machine, where --data is not needed.
- With --tiny, networks, images and numbers of steps are small enough for a CPU.

The exit code is 0 if all steps have succeeded, 1 if not, and 2 if there is no CUDA device.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.la import LEFT_ATRIUM
from benchmarks.measuring import commit, machine, markdown
from benchmarks.preparation import HERE, Preparation, add_arguments
from benchmarks.train_step import LABELED
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.system.files import replacing
from nnunet_dycon.system.processes import exiting_on_sigterm

_PACKAGES = (
    "nnunetv2", "torch", "triton", "numpy", "batchgenerators", "batchgeneratorsv2", "acvl-utils", "blosc2",
    "dynamic-network-architectures", "monai", "SimpleITK",
)  # fmt: skip
_NO_CUDA = (
    "error: PyTorch finds no CUDA device; check the driver with nvidia-smi and that torch.version.cuda is not None, or "
    "try the script with --device cpu --tiny\n"
)
_GRACE = 10  # seconds between SIGTERM and SIGKILL
_IMPORT_SECONDS = 60.0  # more than importing PyTorch and nnU-Net takes
_FEWEST_MINUTES = 5  # with fewer, most steps are stopped before they have a result
_ABSOLUTE_PATH = re.compile(r"(?<![\w/.])/(?:[^\s/:\"']+/)+([^\s/:\"']*)")
_ENVIRONMENT, _DATA = "environment", "data"


@dataclass(frozen=True)
class Step:
    """A step of the check.

    Attributes:
        name: name of the step, used in the names of its log and its result file.
        fraction: time limit of the step, as a fraction of the remaining time.
        command: arguments of the Python interpreter. "{file}" is replaced by the path of the file that the step must
            write, "{seconds}" by the time limit.
        describe: function that turns the result into a line of text.
        read: function that turns the content of the written file into the result.
        needs_data: whether the step is skipped if the step "data" has not succeeded.
    """

    name: str
    fraction: float
    command: Sequence[str]
    describe: Callable[[dict], str]
    read: Callable[[str], dict] = json.loads
    needs_data: bool = False


def perform(
    steps: Sequence[Step], deadline: float, results: Path, logs: Path, about: dict
) -> list[tuple[str, str, str, str]]:
    """Run the steps one after the other, write the result of each to gpu_NAME.json, and print a line for each.

    If a step does not succeed, and its gpu_NAME.json of an earlier run has the status "ok", this file is kept.

    Args:
        steps: the steps. The result of the first one, with device and versions, is added to all results.
        deadline: value of time.monotonic() at which the last step must end.
        results: folder of the results, which is created.
        logs: folder of the logs, which is created.
        about: further entries of all results, such as the commit.

    Returns:
        For each step: name, status ("ok", "failed (exit code N)", "failed (no result)", "stopped after N s" or
        "skipped"), seconds as text, and description of the result.
    """
    results.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    about = {"device": None, "versions": None, **about}
    rows: list[tuple[str, str, str, str]] = []
    for number, step in enumerate(steps, 1):
        if step.needs_data and any(name == _DATA and status != "ok" for name, status, *_ in rows):
            rows.append((step.name, "skipped", "0", "there is no data"))
            print(f"[{number}/{len(steps)}] {step.name}: skipped; there is no data", flush=True)
            continue
        start = time.monotonic()
        log, file = logs / f"{step.name}.log", logs / f"{step.name}.out"
        file.unlink(missing_ok=True)
        limit = max(1.0, step.fraction * (deadline - start))
        if step is steps[0]:
            limit = max(_IMPORT_SECONDS, limit)  # all results need it
        filled = [part.replace("{file}", str(file)).replace("{seconds}", f"{limit:.0f}") for part in step.command]
        status, seconds = run_limited([sys.executable, *filled], log, limit), time.monotonic() - start
        result, text = {}, ""
        try:
            result = step.read(file.read_text())
            text = step.describe(result)
        except (OSError, ValueError, KeyError, ElementTree.ParseError):
            status = "failed (no result)" if status == "ok" else status
        if step is steps[0]:
            about |= result
        if status != "ok":
            result = {**result, "last_lines_of_log": _last_lines(log)}
            text = "; ".join(filter(None, (text, f"see {log}")))
        when = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        result = {**result, "status": status, "step_seconds": seconds, "date": when, **about}
        written = results / f"gpu_{step.name}.json"
        if status != "ok" and _is_ok(written):
            text += f"; the earlier {written.name} is kept"
        else:
            with replacing(written) as partial_file:
                partial_file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"[{number}/{len(steps)}] {step.name}: {status}, {seconds:.0f} s; {text}", flush=True)
        rows.append((step.name, status, f"{seconds:.0f}", text))
    return rows


def _is_ok(result: Path) -> bool:
    try:
        return json.loads(result.read_text())["status"] == "ok"
    except (OSError, ValueError, KeyError):
        return False


def _last_lines(log: Path) -> list[str]:
    """Return the last ten lines of a log, with only the names of files and folders instead of absolute paths."""
    lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
    return [_ABSOLUTE_PATH.sub(r"\1", line) for line in lines[-10:]]


def run_limited(command: Sequence[str], log: Path, seconds: float) -> str:
    """Run a command in a process group of its own, and stop the group at the time limit.

    Args:
        command: the command and its arguments. Its working folder is the root of the repository.
        log: file for the output.
        seconds: time limit. At the limit, the processes get SIGTERM, and SIGKILL at most 10 s later.

    Returns:
        "ok", "failed (exit code N)" or "stopped after N s".
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=HERE.parent, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            return f"failed (exit code {code})" if code else "ok"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                _signal(process, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
            _signal(process, signal.SIGKILL)  # also worker processes that have lost their parent
            process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def environment(device: str) -> dict:
    """Return a description of the device, the system and the installed versions.

    Args:
        device: "cpu" or "cuda".

    Returns:
        "device" (name), "system", "cpus" (number), and "versions" (of Python and packages). With "cuda" also
        "gpu_bytes" (memory), "driver" (if nvidia-smi is found), "cuda" and "cudnn" (versions).
    """
    found: dict = {"device": machine(device)["device"], "system": platform.platform(), "cpus": os.cpu_count()}
    if device == "cuda":
        found["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
        if command := shutil.which("nvidia-smi"):
            query = [command, "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {**found, "versions": versions}


def prepare(arguments: argparse.Namespace) -> dict:
    """Plan and preprocess the data if necessary.

    Args:
        arguments: parsed command line with the arguments of `add_arguments`.

    Returns:
        "plans" (plans identifier), and "features_per_stage", "spacing", "patch_size" and "batch_size" of the
        configuration 3d_fullres.
    """
    preparation = Preparation(arguments, LEFT_ATRIUM)
    preparation.prepare([LABELED])
    folder = preparation.work / "nnUNet_preprocessed" / preparation.dataset(LABELED)
    plans = json.loads((folder / f"{preparation.plans}.json").read_text())["configurations"]["3d_fullres"]
    features = plans["architecture"]["arch_kwargs"]["features_per_stage"]
    return {"plans": preparation.plans, "features_per_stage": features} | {
        key: plans[key] for key in ("spacing", "patch_size", "batch_size")
    }


def counts(junit: str, may_skip: bool = False) -> dict[str, int]:
    """Return the numbers "tests", "failures", "errors" and "skipped" from a JUnit XML file (pytest --junitxml).

    Args:
        junit: content of the file.
        may_skip: whether all tests may be skipped.

    Raises:
        ValueError: all tests were skipped, and `may_skip` is False.
    """
    suite = next(ElementTree.fromstring(junit).iter("testsuite"))
    found = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    if found["skipped"] == found["tests"] and not may_skip:
        raise ValueError("all tests were skipped")
    return found


def steps(arguments: argparse.Namespace) -> list[Step]:
    """Return the steps for a parsed command line."""
    device, tiny = ["--device", arguments.device], arguments.tiny
    data = ["--data", str(arguments.data), "--work", str(arguments.work), *device]
    data += ["--spacing", str(arguments.spacing), "--features", *map(str, arguments.features)]
    own = ["-m", "benchmarks.gpu_check", *data, "--commit", arguments.commit, "--json", "{file}", "--one"]
    tests = ["-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", "--junitxml", "{file}"]
    train_step = ["-m", "benchmarks.train_step", *data, "--json", "{file}"]
    train_step += ["--trainers", RECOMMENDED, "nnUNetTrainerDyCON", *(["--repeats", "2", "--warmup", "1"] * tiny)]
    loader = ["-m", "benchmarks.loader", *data, "--json", "{file}", *(["--repeats", "10"] * tiny)]
    small = ["--repeats", "2", "--cases", "UnCL, B=4, 2x96x96x96: released", "UnCL, B=4, 2x96x96x96: ours"]
    losses = ["-m", "benchmarks.losses", *device, "--json", "{file}", *(small * tiny)]
    training = ["-m", "benchmarks.gpu_training", *data, "--json", "{file}", "--seconds", "{seconds}"]
    training += ["--epochs", "5" if tiny else "50", *(["--iterations", "2"] * tiny)]
    return [
        Step(_ENVIRONMENT, 0.1, [*own, _ENVIRONMENT], _machine),
        Step(_DATA, 0.5, [*own, _DATA], lambda its: f"{its['plans']}, patches {its['patch_size']}"),
        Step("tests", 0.25, tests, _counted, partial(counts, may_skip=arguments.device != "cuda")),
        Step("train_step", 0.5, train_step, _times, needs_data=True),
        Step("loader", 0.35, loader, _times, needs_data=True),
        Step("losses", 0.5, losses, _times),
        Step("training", 1.0, training, _trained, needs_data=True),
    ]


def _machine(result: dict) -> str:
    torch_version, nnunet_version = (result["versions"].get(name) for name in ("torch", "nnunetv2"))
    return f"{result['device']}, torch {torch_version}, nnunetv2 {nnunet_version}, commit {result['commit']}"


def _counted(result: dict) -> str:
    return ", ".join(f"{count} {name}" for name, count in result.items())


def _times(result: dict) -> str:
    return ", ".join(
        f"{name} {its['error'] if 'error' in its else format(its['seconds'], '.3g') + ' s'}"
        for name, its in result["results"].items()
    )


def _trained(result: dict) -> str:
    return ", ".join(
        f"{name} {len(its['seconds'])} epochs"
        + (f" of {statistics.median(its['seconds']):.3g} s" if its["seconds"] else "")
        for name, its in result["results"].items()
    )


def main() -> None:
    """Run all steps, each in its own process, and print a table.

    With --prepare, only the data is prepared. With --one, only the step "environment" or "data" runs, in this process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data set; not needed if the data is prepared")
    add_arguments(parser, replace(LEFT_ATRIUM, spacing=1.25, features=(), needs_data=False))
    parser.set_defaults(device="cuda")
    parser.add_argument("--minutes", type=float, default=12, help="time for all steps (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny settings for a CPU; changes --spacing and --features")
    parser.add_argument("--prepare", action="store_true", help="only prepare the data, on any machine")
    parser.add_argument("--commit", default=commit(), help="commit of this copy, if it is not in a git repository")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=(_ENVIRONMENT, _DATA), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.data is not None and not arguments.data.is_dir():
        parser.error(f"--data: {arguments.data} is no folder")
    arguments.work = arguments.work.resolve()
    arguments.data = (arguments.data or arguments.work).resolve()
    if arguments.tiny:
        arguments.spacing, arguments.features = 3.5, [16, 32, 64]
    if arguments.prepare:
        print(prepare(arguments))
    elif arguments.one:
        done = prepare(arguments) if arguments.one == _DATA else environment(arguments.device)
        arguments.json.write_text(json.dumps({**done, "commit": arguments.commit}))
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, _NO_CUDA)
    else:
        if arguments.minutes < _FEWEST_MINUTES:
            print(f"warning: with less than {_FEWEST_MINUTES} minutes, most steps have no result; raise --minutes")
        deadline = time.monotonic() + 60 * arguments.minutes
        try:
            with exiting_on_sigterm():
                about, logs = {"commit": arguments.commit}, arguments.work / "gpu_check"
                rows = perform(steps(arguments), deadline, arguments.results, logs, about)
        except KeyboardInterrupt:
            parser.exit(130, f"interrupted; the results of the finished steps are in {arguments.results}\n")
        print(f"\n{markdown(('step', 'status', 'seconds', 'result'), rows)}")
        sys.exit(any(status != "ok" for _, status, *_ in rows))


if __name__ == "__main__":
    main()
