"""Checks of the installation with one fault each."""

import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nnunet_dycon
import nnunet_dycon.trainers
from nnunet_dycon.doctor import installation
from nnunet_dycon.doctor.findings import FAIL, NOTE, OK, WARNING

PACKAGE = Path(nnunet_dycon.__file__).parent
DISCOVERY = PACKAGE / "discovery"
TRAINERS = nnunet_dycon.trainers.__path__[0]

# variable, its value (None: unset), then status, message and remedy of the finding
FOLDERS = {
    "no raw": ("nnUNet_raw", None, WARNING, "nnUNet_raw is not set", "export nnUNet_raw="),
    "no preprocessed": ("nnUNet_preprocessed", "", FAIL, "nnUNet_preprocessed is not set", "export nnUNet_preproc"),
    "no results": ("nnUNet_results", None, FAIL, "nnUNet_results is not set", "export nnUNet_results="),
    "absent raw": ("nnUNet_raw", "/absent", WARNING, "nnUNet_raw=/absent: No such file", "export nnUNet_raw="),
    "absent results": ("nnUNet_results", "{tmp}/a/b", NOTE, "does not exist yet; nnU-Net creates it", None),
    "results in a file": ("nnUNet_results", "{file}/a", FAIL, "cannot be written to (Not a dir", "change"),
    "data in a file": ("nnUNet_preprocessed", "{file}/a", WARNING, "cannot be written to", "change"),
    "relative": ("nnUNet_results", "a", WARNING, "nnUNet_results=a is not absolute", 'nnUNet_results="/'),
    "Windows line end": ("nnUNet_preprocessed", "{file}/a\r", FAIL, "has a Windows line end", "export nnUNet_pre"),
    "quotes": ("nnUNet_raw", "'/a'", WARNING, "contains quotes", "export nnUNet_raw="),
    "quoted ~": ("nnUNet_results", "~/a", WARNING, "the ~ was quoted", 'nnUNet_results="$HOME/a"'),
}
SETTINGS = {
    "no number": ("nnUNet_n_proc_DA", "x", FAIL, "nnUNet_n_proc_DA is 'x', but must be", "unset nnUNet_n_proc_DA"),
    "no process": ("nnUNet_def_n_proc", "0", FAIL, "nnUNet_def_n_proc is '0'", "unset nnUNet_def_n_proc"),
    "no workers": ("nnUNet_n_proc_DA", "0", NOTE, "nnU-Net cannot plan", "before planning"),
    "threads": ("OMP_NUM_THREADS", "-1", WARNING, "OMP_NUM_THREADS is '-1'", "unset OMP_NUM_THREADS"),
    "compile": ("nnUNet_compile", "yes", WARNING, "nnUNet_compile='yes' as false", "nnUNet_compile=true"),
    "wandb": ("nnUNet_wandb_enabled", "yes", FAIL, "nnUNet_wandb_enabled is 'yes'", "unset nnUNet_wandb"),
    "no wandb": ("nnUNet_wandb_enabled", "1", FAIL, "wandb is not installed", "pip install wandb"),
}
ENTRIES = {
    "absent": ("nnUNet_extTrainer", "/absent:{ours}", WARNING, "the folder /absent does not exist", "remove it"),
    "quoted ~": ("nnUNet_extTrainer", "~/a:{ours}", WARNING, "the folder ~/a does not exist", "$HOME"),
    "separator": ("nnUNet_extTrainer", "{tmp};{ours}", WARNING, "does not exist", 'separate folders by ":"'),
    "package": ("nnUNet_extTrainer", str(PACKAGE), WARNING, "is the package nnunet_dycon", str(DISCOVERY)),
    "root": ("nnUNet_extTrainer", str(PACKAGE.parent), WARNING, "is the parent folder", str(DISCOVERY)),
    "trainers": ("nnUNet_extTrainer", TRAINERS, WARNING, "the folder of the trainers' modules", str(DISCOVERY)),
}
FAULTS = [
    pytest.param(check, *fault, id=f"{check}: {name}")
    for check, faults in (("folders", FOLDERS), ("settings", SETTINGS), ("nnUNet_extTrainer", ENTRIES))
    for name, fault in faults.items()
]


@pytest.mark.parametrize(("check", "variable", "value", "status", "message", "remedy"), FAULTS)
def test_faulty_variables(tiny, doctor, find, monkeypatch, tmp_path, check, variable, value, status, message, remedy):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    file = tmp_path / "file"
    file.touch()
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value.format(tmp=tmp_path, file=file, ours=DISCOVERY))
    code, findings = doctor("")
    find(findings, check, status, message, remedy)
    assert code == (status == FAIL)
    others = [finding for finding in findings if finding.check not in (check, "device")]
    assert {finding.status for finding in others} == {OK}


def test_little_shared_memory_is_a_warning(tiny, doctor, find, monkeypatch):
    """Containers have 64 MiB by default, which suffices only without worker processes."""
    monkeypatch.setattr(installation, "_SHARED_MEMORY", tiny)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26, free=2**26))
    monkeypatch.setenv("nnUNet_n_proc_DA", "4")
    find(doctor("")[1], "settings", WARNING, "has 64 MiB", "--shm-size")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert not [finding for finding in doctor("")[1] if finding.status == WARNING]


def test_unmet_requirements_fail(tiny, doctor, find, monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "monai":
            raise metadata.PackageNotFoundError(name)
        return "2.9.0" if name == "nnunetv2" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    code, findings = doctor("")
    assert code == 1
    find(findings, "versions", FAIL, "monai is not installed, but nnunet-dycon requires monai", "pip install 'monai>=")
    find(findings, "versions", FAIL, "nnunetv2 is 2.9.0, but nnunet-dycon requires", "pip install 'nnunetv2")
    assert [finding.status for finding in findings if finding.check == "versions"] == [FAIL, FAIL]


def test_unmet_requirements_of_nnunet_are_warnings(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.0" if name == "torch" else real(name))
    (finding,) = installation.check_versions()
    assert finding.status == WARNING
    assert finding.message.startswith("torch is 2.9.0, but nnunetv2 requires torch")


def test_gpu_without_compiler_is_a_warning(pretend_a_gpu, monkeypatch, tmp_path):
    pretend_a_gpu(24)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("nnUNet_compile", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu, compiler = installation.check_device()
    assert (gpu.status, gpu.message) == (OK, "Pretended, 24 GiB (12 GiB free)")
    assert (compiler.check, compiler.status) == ("compiler", WARNING)
    assert "needs a C compiler" in compiler.message
    assert "nnUNet_compile=f" in compiler.remedy
    monkeypatch.setenv("nnUNet_compile", "F")
    assert list(installation.check_device()) == [gpu]


def test_gpu_that_torch_cannot_use_fails(pretend_a_gpu, monkeypatch):
    pretend_a_gpu(24)

    def ones(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch, "ones", ones)
    (finding,) = installation.check_device()
    assert finding.status == FAIL
    assert "cannot use Pretended (CUDA error: no kernel image is available)" in finding.message


BASE = "from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON\n"
OWN = BASE + "class nnUNetTrainerMine(nnUNetTrainerDyCON): pass"
COPY = BASE + "class nnUNetTrainerDyCON(nnUNetTrainerDyCON): pass"
EXPORT = 'export nnUNet_extTrainer="$(nnunet_dycon trainers_path)'


def look_up(name: str, code: str, path: str | None, trainer: str, *finding, slow: bool = False):
    return pytest.param(code, path, trainer, *finding, id=name, marks=pytest.mark.slow if slow else ())


# Each imports nnU-Net in a separate process.
LOOK_UPS = [
    look_up("unset", "", None, "DyCON", FAIL, "does not find nnUNetTrainerDyCON, because nnUNet_ext", EXPORT),
    look_up("elsewhere", "", "{tmp}", "DyCON", FAIL, "nnUNetTrainerDyCON in the folders", EXPORT, slow=True),
    look_up(
        "unknown",
        "",
        "{ours}",
        "Other",
        FAIL,
        "no trainer is called nnUNetTrainerOther",
        "nnunet_dycon list",
        slow=True,
    ),
    look_up("retired", "", "{tmp}", "DyCON_paper", FAIL, "nnUNetTrainerDyCON_paper was removed", "nnUNetTrainerDyCON"),
    look_up("no length", "", None, "UGPL_05epochs", FAIL, "number of epochs starts with 0", "use for example"),
    look_up("broken", "import lost", "{tmp}:{ours}", "DyCON", FAIL, "/ext/a.py cannot be imported (Mod", "fix this"),
    look_up("behind", "import lost", "{ours}:{tmp}", "DyCON", OK, "finds nnUNetTrainerDyCON", None, slow=True),
    look_up("own", OWN, "{tmp}:{ours}", "Mine", OK, "nnU-Net finds nnUNetTrainerMine", None, slow=True),
    look_up(
        "copy", COPY, "{tmp}:{ours}", "DyCON", WARNING, "another class named nnUNetTrainerDyCON, in", "first", slow=True
    ),
    look_up("root", "", "{root}:{ours}", "DyCON", WARNING, "another class named nnUNetTrainerDy", "alone", slow=True),
    look_up(
        "nnU-Net's",
        "",
        "{ours}",
        "",
        WARNING,
        "is not a semi-supervised trainer of nnunet_dycon",
        "nnunet_dycon list",
        slow=True,
    ),
]


@pytest.mark.parametrize(("code", "path", "trainer", "status", "message", "remedy"), LOOK_UPS)
def test_look_up_of_trainers(tiny, find, monkeypatch, tmp_path, code, path, trainer, status, message, remedy):
    folder = tmp_path / "ext"
    folder.mkdir()
    (folder / "a.py").write_text(code)
    if path is None:
        monkeypatch.delenv("nnUNet_extTrainer")
    else:
        monkeypatch.setenv("nnUNet_extTrainer", path.format(tmp=folder, ours=DISCOVERY, root=PACKAGE.parent))
    (finding,) = installation.check_look_up(f"nnUNetTrainer{trainer}")
    find([finding], "trainer", status, message, remedy)


def test_subclass_outside_the_package_is_checked_in_full(tiny, doctor, find, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}:{DISCOVERY}")
    code, findings = doctor("-d 901 -f 0 -tr nnUNetTrainerMine")
    find(findings, "trainer", OK, "nnUNetTrainerMine can train 3d_fullres")
    find(findings, "GPU memory", NOTE, "2 labeled and 2 unlabeled patches")
    assert code == 0
