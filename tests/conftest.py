"""Command-line options of the tests, and shared fixtures."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunet_dycon.data.unlabeled import preprocess_unlabeled
from nnunet_dycon.trainers import trainer_class
from tests.processes import NNUNETV2_PREDICT, run_command, use_forkserver
from tests.tiny import plan_and_preprocess, set_environment, write_raw_dataset
from tests.tiny_network import labeled_batch, unlabeled_batch
from tests.trainers.training import make_trainer


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


@pytest.fixture(scope="session", autouse=True)
def fast_workers():
    """Start worker processes without importing nnU-Net anew, which takes ten seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        use_forkserver(patch)
        yield


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """Return the parent of nnUNet_raw and nnUNet_preprocessed with Dataset901_Tiny. Tests must not change it."""
    root = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, root)
        write_raw_dataset(root / "nnUNet_raw" / "Dataset901_Tiny")
        patch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner fails with 0
        plan_and_preprocess(901)
        preprocess_unlabeled("901", "3d_fullres")
    return root


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
def trained_tiny(tiny_root, tmp_path_factory) -> Path:
    """Return a copy of `tiny_root` with nnUNetTrainerDyCON_smoke trained on fold 0. Tests must not change it."""
    root = tmp_path_factory.mktemp("trained") / "tiny"
    shutil.copytree(tiny_root, root)
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, root)
        trainer = make_trainer(trainer_class("nnUNetTrainerDyCON_smoke"), fold=0)
        trainer.run_training()
        trainer.perform_actual_validation()
    return root


@pytest.fixture(scope="session")
def tiny_predictions(trained_tiny) -> dict[str, Path]:
    """Return nnUNetv2_predict's folders for the test cases, by network, with probabilities. Do not change them."""
    images = trained_tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs"
    folders = {name: trained_tiny / name for name in ("student", "teacher")}
    predict = ["-d", "901", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerDyCON_smoke", "-i", images]
    predict += ["--save_probabilities", "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta"]
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, trained_tiny)
        for name, checkpoint in (("student", "checkpoint_final.pth"), ("teacher", "checkpoint_final_teacher.pth")):
            run_command(NNUNETV2_PREDICT, *predict, "-chk", checkpoint, "-o", folders[name])
    return folders


@pytest.fixture(scope="session")
def source_copy(tmp_path_factory) -> Path:
    """Return a copy of the sources, because a build writes files next to them."""
    root = Path(__file__).parents[1]
    copy = tmp_path_factory.mktemp("source") / "nnunet-dycon"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("nnunet_dycon", "trainers", "dataset_conversion"):
        shutil.copytree(root / folder, copy / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / file, copy)
    return copy


@pytest.fixture(scope="session")
def wheel(source_copy, tmp_path_factory) -> Path:
    """Return the wheel for a regular installation."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), str(source_copy)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def labeled():
    return labeled_batch()


@pytest.fixture
def unlabeled():
    return unlabeled_batch()
