"""Command-line options of the tests, and shared fixtures."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from nnunet_dycon.data.unlabeled import preprocess_unlabeled
from tests.processes import NNUNETV2_PREDICT, run_command, run_script, use_forkserver
from tests.tiny import plan_and_preprocess, set_environment, write_raw_dataset
from tests.tiny_network import labeled_batch, unlabeled_batch

TRAIN = ("901", "3d_fullres", "0", "-tr", "nnUNetTrainerDyCON_smoke", "-device", "cpu")  # arguments of nnUNetv2_train

collect_ignore = ["one_thread"]  # its module would change this process


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --runslow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: sums are reproducible, and parallel tests do not compete for cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_sigterm_handler():
    """Check that each test restores the handler of SIGTERM: later tests fork workers that are ended by this signal."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture(scope="session", autouse=True)
def fast_workers():
    """Start worker processes without importing nnU-Net anew, which takes ten seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        use_forkserver(patch)
        yield


@pytest.fixture(scope="session")
def built_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """built_once(name, build) returns a folder that build(folder) fills; a single worker of pytest-xdist does so."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers

    def run(name: str, build: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker whose build failed
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return run


@pytest.fixture(scope="session")
def tiny_root(built_once) -> Path:
    """Return the parent of nnUNet_raw and nnUNet_preprocessed with Dataset901_Tiny. Tests must not change it."""

    def build(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, root)
            write_raw_dataset(root / "nnUNet_raw" / "Dataset901_Tiny")
            patch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner fails with 0
            plan_and_preprocess(901)
            preprocess_unlabeled("901", "3d_fullres")

    return built_once("tiny", build)


@pytest.fixture
def tiny(tiny_root, tmp_path, monkeypatch) -> Path:
    """Return a copy of `tiny_root` that the test may change; nnU-Net's variables point to it."""
    root = tmp_path / "tiny"
    shutil.copytree(tiny_root, root)
    set_environment(monkeypatch, root)
    return root


@pytest.fixture
def base(tiny) -> Path:
    return tiny / "nnUNet_preprocessed" / "Dataset901_Tiny"


@pytest.fixture
def raw(tiny) -> Path:
    return tiny / "nnUNet_raw" / "Dataset901_Tiny"


@pytest.fixture(scope="session")
def trained_tiny(tiny_root, built_once) -> Path:
    """Return a copy of `tiny_root` with nnUNetTrainerDyCON_smoke trained on fold 0. Tests must not change it."""

    def build(root: Path) -> None:
        shutil.copytree(tiny_root, root, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, root)
            run_script("nnUNetv2_train", *TRAIN, "--npz", nnUNet_n_proc_DA="1")

    return built_once("trained", build)


@pytest.fixture(scope="session")
def tiny_predictions(trained_tiny, built_once) -> dict[str, Path]:
    """Return nnUNetv2_predict's folders for the test cases, by network, with probabilities. Do not change them."""
    images = str(trained_tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs")
    predict = ["-d", "901", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerDyCON_smoke", "-i", images]
    predict += ["--save_probabilities", "-device", "cpu", "--disable_tta"]

    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, trained_tiny)
            run_script("nnUNetv2_predict", *predict, "-npp", "0", "-nps", "0", "-o", str(folder / "student"))
            teacher = ("-chk", "checkpoint_final_teacher.pth", "-npp", "0", "-nps", "0", "-o", folder / "teacher")
            run_command(NNUNETV2_PREDICT, *predict, *teacher)

    folder = built_once("predictions", build)
    return {name: folder / name for name in ("student", "teacher")}


@pytest.fixture(scope="session")
def source_copy(tmp_path_factory) -> Path:
    """Return a copy of the sources, because a build writes files next to them."""
    root = Path(__file__).parents[1]
    copy = tmp_path_factory.mktemp("source") / "nnunet-dycon"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("nnunet_dycon", "trainers", "dataset_conversion", "tests", "docs", "benchmarks", ".ci"):
        shutil.copytree(root / folder, copy / folder, ignore=ignored)
    for name in (
        "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff",
        "LICENSE", ".pre-commit-config.yaml", "mkdocs.yml",
    ):  # fmt: skip
        shutil.copy(root / name, copy)
    return copy


@pytest.fixture(scope="session")
def wheel(source_copy, built_once) -> Path:
    """Return the wheel for a regular installation."""

    def build(folder: Path) -> None:
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), str(source_copy)]
        subprocess.run(command, check=True, capture_output=True)

    return next(built_once("wheel", build).glob("*.whl"))


@pytest.fixture
def labeled():
    return labeled_batch()


@pytest.fixture
def unlabeled():
    return unlabeled_batch()
