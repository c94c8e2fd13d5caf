"""Checks that need no data: packages, device, environment variables of nnU-Net, and nnU-Net's look-up of trainers."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from nnunet_dycon import __version__, trainers
from nnunet_dycon.doctor.findings import FAIL, NOTE, OK, WARNING, Finding, as_finding
from nnunet_dycon.errors import ONE_LINE, UnknownTrainer, UserError, first_line
from nnunet_dycon.system.environment import DISCOVERY, FOLDER_VARIABLES, nnunet_folder
from nnunet_dycon.system.files import require_writable

GIB = 2**30
_DISCOVERY = DISCOVERY.resolve()
_EXPORT = 'run: export nnUNet_extTrainer="$(nnunet_dycon trainers_path)${nnUNet_extTrainer:+:$nnUNet_extTrainer}"'
_TRUE = ("true", "1", "t")  # nnU-Net reads these values of nnUNet_compile as true, and all others as false
_FALSE = ("false", "0", "f", "no", "n", "off", "")
_SHARED_MEMORY = Path("/dev/shm")


def check_versions() -> Iterator[Finding]:
    """Check that the installed packages meet the version requirements of nnunet-dycon and of nnU-Net.

    Yield a FAIL for each unmet requirement of nnunet-dycon, a WARNING for each of nnU-Net, or a single OK.
    """
    from packaging.requirements import Requirement  # installed with matplotlib, which nnU-Net requires

    versions = [f"Python {platform.python_version()}", f"nnunet-dycon {__version__}"]
    unmet = False
    for package, status in (("nnunet-dycon", FAIL), ("nnunetv2", WARNING)):
        try:
            texts = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            if package == "nnunet-dycon":
                yield Finding(
                    "versions", NOTE,
                    "nnunet-dycon is imported from a folder without installation, so its requirements are not checked",
                    "to check them, install nnunet-dycon with pip and run the doctor again",
                )  # fmt: skip
            continue
        for requirement in map(Requirement, texts):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            wanted = f"{requirement.name}{requirement.specifier}"
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version, has = None, "is not installed"
            else:
                has = f"is {version}"
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                unmet = True
                yield Finding(
                    "versions", status, f"{requirement.name} {has}, but {package} requires {wanted}",
                    f"run: pip install '{wanted}'",
                )  # fmt: skip
            elif package == "nnunet-dycon":
                versions.append(f"{requirement.name} {version}")
    if not unmet:
        yield Finding("versions", OK, ", ".join(versions))


def check_device() -> Iterator[Finding]:
    """Check that torch can compute on a GPU, and on Linux that torch.compile finds the compiler it needs.

    Yield a finding with the name and the memory of the GPU, or with the reason why torch cannot use one. Yield a
    WARNING if the compiler is missing.
    """
    try:
        import torch
    except Exception as error:  # OSError if a library is missing
        reinstall = "install torch again, see https://pytorch.org/get-started"
        yield Finding("device", FAIL, f"torch cannot be imported ({first_line(error)})", reinstall)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        on_cpu = "train on the CPU with -device cpu (slow)"
        if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
            message = f"an NVIDIA driver is installed, but torch {torch.__version__} was built without CUDA"
            remedy = f"install torch with CUDA, see https://pytorch.org/get-started, or {on_cpu}"
            yield Finding("device", WARNING, message, remedy)
        elif caught:
            reason = str(caught[0].message).split("\n")[0]
            yield Finding("device", WARNING, f"torch cannot use the GPU ({reason})", f"fix the GPU driver, or {on_cpu}")
        else:
            yield Finding("device", NOTE, "no CUDA GPU found", on_cpu)
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    try:
        torch.ones(8, device="cuda").sum().item()
        free, total = torch.cuda.mem_get_info()
    except Exception as error:
        install = "install a version of torch that supports this GPU, or train with -device cpu"
        yield Finding("device", FAIL, f"torch {torch.__version__} cannot use {names[0]} ({first_line(error)})", install)
        return
    memory = f"{total / GIB:.0f} GiB ({free / GIB:.0f} GiB free)"
    yield Finding("device", OK, f"{names[0]}, {memory}" + (f"; {len(names)} GPUs in total" if len(names) > 1 else ""))
    if sys.platform == "linux" and os.environ.get("nnUNet_compile", "true").lower() in _TRUE:
        yield from _check_compiler()


def _check_compiler() -> Iterator[Finding]:
    """Yield a WARNING if the C compiler or Python's header files, which torch.compile needs, are not installed."""
    missing = []
    if not ("CC" in os.environ or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("Python's header files (python3-dev)")
    if missing:
        absent = " and ".join(missing)
        yield Finding(
            "compiler", WARNING, f"nnU-Net compiles its network on a GPU, which needs {absent}",
            f"install {absent}, or run: export nnUNet_compile=f",
        )  # fmt: skip


def check_settings() -> Iterator[Finding]:
    """Check the values of optional environment variables, and the size of /dev/shm.

    The variables are nnUNet_def_n_proc, nnUNet_n_proc_DA, OMP_NUM_THREADS, nnUNet_compile and nnUNet_wandb_enabled.
    /dev/shm is the shared memory through which the worker processes of nnU-Net pass batches to the training process.

    If all are OK, yield a single OK. Otherwise, yield one finding for each variable that is set, and a WARNING if
    /dev/shm is smaller than 1 GiB.
    """
    findings = [
        *_check_number("nnUNet_def_n_proc", least=1),
        *_check_number("nnUNet_n_proc_DA", least=0),
        *_check_number("OMP_NUM_THREADS", least=1),
        *_check_compile(),
        *_check_wandb(),
        *_check_shared_memory(),
    ]
    if all(finding.status == OK for finding in findings):
        message = ", ".join(finding.message for finding in findings) or "no optional variable of nnU-Net is set"
        findings = [Finding("settings", OK, message)]
    yield from findings


def _check_number(variable: str, least: int) -> Iterator[Finding]:
    value = os.environ.get(variable)
    if value is None:
        return
    if not value.strip().isdigit() or int(value) < least:
        # OpenMP ignores invalid values, nnU-Net fails.
        status = WARNING if variable.startswith("OMP") else FAIL
        message = f"{variable} is {value!r}, but must be an integer of at least {least}"
        yield Finding("settings", status, message, f"run: unset {variable}")
    elif int(value) == 0:
        message = f"{variable}=0: training uses no worker processes, but nnU-Net cannot plan with this value"
        yield Finding("settings", NOTE, message, f"before planning, run: unset {variable}")
    else:
        yield Finding("settings", OK, f"{variable}={value}")


def _check_compile() -> Iterator[Finding]:
    value = os.environ.get("nnUNet_compile")
    if value is not None:
        if value.lower() in _TRUE + _FALSE:
            yield Finding("settings", OK, f"nnUNet_compile={value}")
        else:
            message = f"nnU-Net reads nnUNet_compile={value!r} as false"
            remedy = "run: export nnUNet_compile=true, or: export nnUNet_compile=false"
            yield Finding("settings", WARNING, message, remedy)


def _check_wandb() -> Iterator[Finding]:
    value = os.environ.get("nnUNet_wandb_enabled")
    if value is None:
        return
    remedy = "run: unset nnUNet_wandb_enabled"
    if value not in ("0", "False", "false", "1", "True", "true"):
        yield Finding("settings", FAIL, f"nnUNet_wandb_enabled is {value!r}, but must be 0 or 1", remedy)
    elif value in ("1", "True", "true") and importlib.util.find_spec("wandb") is None:
        message = f"nnUNet_wandb_enabled={value}, but wandb is not installed"
        yield Finding("settings", FAIL, message, f"run: pip install wandb, or {remedy.removeprefix('run: ')}")
    else:
        yield Finding("settings", OK, f"nnUNet_wandb_enabled={value}")


def _check_shared_memory() -> Iterator[Finding]:
    if _SHARED_MEMORY.is_dir() and os.environ.get("nnUNet_n_proc_DA", "").strip() != "0":
        size = shutil.disk_usage(_SHARED_MEMORY).total
        if size < GIB:
            yield Finding(
                "settings", WARNING,
                f"{_SHARED_MEMORY} has {size / 2**20:.0f} MiB, too small for batches of nnU-Net's worker processes",
                "start the container with --shm-size=8g or --ipc=host, or run: export nnUNet_n_proc_DA=0",
            )  # fmt: skip


def check_folders() -> Iterator[Finding]:
    """Check the variables nnUNet_raw, nnUNet_preprocessed and nnUNet_results, and the folders that they name.

    Each variable must be set to an absolute path. nnUNet_raw must be readable, the other two folders writable. Yield
    one finding for each variable.
    """
    for variable in FOLDER_VARIABLES:
        # Training does not need raw data if all cases are preprocessed.
        worst = WARNING if variable == "nnUNet_raw" else FAIL
        value = os.environ.get(variable)
        if not value:
            yield Finding("folders", worst, f"{variable} is not set", f"run: export {variable}=/path/to/{variable}")
        elif value.startswith("~"):
            message = f"{variable}={value}: the ~ was quoted, so the shell has not expanded it"
            yield Finding("folders", WARNING, message, f'run: export {variable}="$HOME{value[1:]}"')
        elif (problem := _refusal(variable)) is not None:
            yield as_finding("folders", problem, worst)
        elif not os.path.isabs(value):
            message = f"{variable}={value} is not absolute, so it depends on the current folder"
            yield Finding("folders", WARNING, message, f'run: export {variable}="{os.path.abspath(value)}"')
        else:
            yield _examine_folder(variable, Path(value), worst)


def _refusal(variable: str) -> UserError | None:
    try:
        nnunet_folder(variable)
    except UserError as error:
        return error
    return None


def _examine_folder(variable: str, folder: Path, worst: str) -> Finding:
    existing = existing_part(folder)
    try:
        if variable == "nnUNet_raw":
            os.listdir(folder)
        else:
            require_writable(existing)
    except UserError as error:
        # Training writes nothing to nnUNet_preprocessed if all cases are preprocessed.
        return as_finding("folders", error, WARNING if variable == "nnUNet_preprocessed" else worst)
    except OSError as error:
        remedy = f"run: export {variable}=/path/to/{variable}"
        return Finding("folders", worst, f"{variable}={folder}: {error.strerror}", remedy)
    if existing != folder:
        return Finding("folders", NOTE, f"{variable}={folder} does not exist yet; nnU-Net creates it")
    return Finding("folders", OK, f"{variable}={folder}, {shutil.disk_usage(folder).free / 1e9:.0f} GB free")


def existing_part(folder: Path) -> Path:
    """Return the folder itself if it exists, else the nearest of its parent folders that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_ext_trainer() -> Iterator[Finding]:
    """Check that each folder in nnUNet_extTrainer exists, and is not a source folder of nnunet_dycon.

    nnU-Net imports the modules in these folders to find a trainer. It would import the modules of a source folder a
    second time, under other names. Worker processes could not find the classes in these second copies. The folder that
    `nnunet_dycon trainers_path` prints is allowed: its single module is written for nnU-Net's look-up of trainers.

    Yield one finding for each folder.
    """
    name = "nnUNet_extTrainer"
    harmful = _harmful_folders()
    for entry in _ext_entries():
        folder = Path(entry).resolve()
        if not folder.is_dir():
            message = f"the folder {entry} does not exist, so nnU-Net ignores it"
            yield Finding(name, WARNING, message, _correction(entry))
        elif folder in harmful:
            yield Finding(
                name, WARNING,
                f"{entry} is {harmful[folder]}: nnU-Net would load its modules twice, the second time under other "
                "names, and worker processes could not find their classes",
                f"use {_DISCOVERY} instead, the output of `nnunet_dycon trainers_path`",
            )  # fmt: skip
        else:
            yield Finding(name, OK, entry)


def _ext_entries() -> list[str]:
    return [entry for entry in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if entry.strip()]


def _harmful_folders() -> dict[Path, str]:
    """Return the source folders of nnunet_dycon that nnUNet_extTrainer must not contain.

    The keys are the paths. The values describe the folders in messages, such as "the package nnunet_dycon".
    """
    package = _DISCOVERY.parent
    return {
        package.parent: "the parent folder of the package nnunet_dycon",
        package: "the package nnunet_dycon",
        **{Path(folder).resolve(): "the folder of the trainers' modules" for folder in trainers.__path__},
    }


def _correction(entry: str) -> str:
    """Return the remedy for an entry of nnUNet_extTrainer that is not a folder.

    The remedy depends on the likely mistake: a quoted ~, a wrong separator between folders, or a wrong path.
    """
    if entry.startswith("~"):
        return "write $HOME instead of ~, which the shell does not expand in quotes"
    if os.path.isdir(entry.split(";" if os.pathsep == ":" else ":")[0]) or "," in entry:
        return f'separate folders by "{os.pathsep}"'
    return "correct it, or remove it from nnUNet_extTrainer"


# Run in a separate process, since the look-up in some folders of nnUNet_extTrainer would break modules of this process.
_LOOK_UP = """
import json, sys
sys.path[:] = [entry for entry in sys.path if entry]  # nnUNetv2_train does not import from the current folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
name = sys.argv[1]
found = recursive_find_trainer_class_by_name(name)
from nnunet_dycon.trainers import registered_name, trainer_class
own = trainer_class(name) if registered_name(name) is not None else found
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
print(json.dumps({
    "is_own": found is own,
    "is_semi_supervised": issubclass(found, SemiSupervisedTrainer),
    "module": found.__module__,
}))
"""


def check_look_up(trainer: str) -> Iterator[Finding]:
    """Check that nnU-Net finds the trainer, by running the look-up of nnUNetv2_train in a separate process.

    Yield a FAIL if the trainer is not found. Yield a WARNING if nnU-Net finds another class with the same name, or if
    the trainer is not semi-supervised. Otherwise, yield an OK.

    Args:
        trainer: name of the trainer (-tr).
    """
    try:
        trainers.registered_name(trainer)
    except UnknownTrainer as error:  # a removed trainer, or a wrong number of epochs
        yield _unknown(str(error))
        return
    result = subprocess.run([sys.executable, "-c", _LOOK_UP, trainer], capture_output=True, text=True)
    if result.returncode != 0:
        yield _failed_look_up(trainer, result.stdout, result.stderr)
        return
    found = json.loads(result.stdout.splitlines()[-1])
    if not found["is_own"]:
        message = f"nnU-Net finds another class named {trainer}, in the module {found['module']}"
        remedy = "in nnUNet_extTrainer, put the folder printed by `nnunet_dycon trainers_path` first, or list it alone"
        yield Finding("trainer", WARNING, message, remedy)
    elif not found["is_semi_supervised"]:
        message = f"{trainer} is not a semi-supervised trainer of nnunet_dycon, and would not use unlabeled cases"
        yield Finding("trainer", WARNING, message, "choose a trainer that `nnunet_dycon list` prints")
    else:
        yield Finding("trainer", OK, f"nnU-Net finds {trainer}")


def _unknown(reason: str) -> Finding:
    """Return a FAIL for a trainer that nnunet_dycon rejects, such as one that was removed.

    Args:
        reason: message of the error that nnunet_dycon raised, in the form "PROBLEM; REMEDY".
    """
    message, _, remedy = reason.partition("; ")
    return Finding("trainer", FAIL, message, remedy)


def _failed_look_up(trainer: str, output: str, errors: str) -> Finding:
    """Return a FAIL with the reason why nnU-Net's look-up did not find a trainer, and with the remedy.

    Args:
        trainer: name of the trainer.
        output: stdout of the look-up, in which nnU-Net lists the folders and modules it has searched.
        errors: stderr of the look-up, which ends with the error message.
    """
    error = next((line for line in reversed(errors.splitlines()) if line.strip()), "no error message")
    if error.startswith(ONE_LINE):  # raised by nnunet_dycon
        return _unknown(error.removeprefix(ONE_LINE))
    if "Could not find requested nnunet trainer" in error:
        message = f"nnU-Net does not find {trainer}"
        if not os.environ.get("nnUNet_extTrainer"):
            return Finding("trainer", FAIL, f"{message}, because nnUNet_extTrainer is not set", _EXPORT)
        if trainers.registered_name(trainer) is not None:
            return Finding("trainer", FAIL, f"{message} in the folders of nnUNet_extTrainer", _EXPORT)
        remedy = "choose a trainer that `nnunet_dycon list` prints, or add the folder of your own to nnUNet_extTrainer"
        return Finding("trainer", FAIL, message, remedy)
    folders, modules = (re.findall(rf"{text} *(.+)", output) for text in ("Searching in:", "Inspecting module:"))
    if not modules:
        remedy = "fix the problems reported above, or run: pip install --force-reinstall 'nnunetv2>=2.8.0,<2.9'"
        return Finding("trainer", FAIL, f"nnU-Net cannot be imported ({error})", remedy)
    file = Path(folders[-1], *modules[-1].split(".")).with_suffix(".py")
    message = f"{file} cannot be imported ({error}), which ends nnU-Net's search for trainers"
    return Finding("trainer", FAIL, message, f"fix this file, or remove {folders[-1]} from nnUNet_extTrainer")
