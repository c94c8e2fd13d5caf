"""nnU-Net finds the trainers in a fresh process, from any folder, from an editable and from a regular install."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nnunet_dycon.registry import BUILDERS, TRAINERS

CHECK = """
import pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
names = {names!r}
classes = [find(name) for name in names]
for name, cls in zip(names, classes):
    assert cls.__name__ == name, cls
    assert cls.__module__.startswith("nnunet_dycon.trainers."), cls.__module__
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert find(name) is cls
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
assert issubclass(find("nnUNetTrainerDyCON_noFeCL"), nnUNetTrainerDyCON)
import nnunet_dycon
print("FOUND", len(classes), nnunet_dycon.__file__)
"""


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet")}
    inherited.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


def trainers_path(cwd: Path, **environment: str) -> str:
    code = "import sys; from nnunet_dycon.cli import main; sys.exit(main(['trainers_path']))"
    result = run_python(code, cwd, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


NAMES = [*TRAINERS, *BUILDERS]


def test_from_the_install_of_this_environment(tmp_path):
    result = run_python(CHECK.format(names=NAMES), tmp_path, nnUNet_extTrainer=trainers_path(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"FOUND {len(NAMES)}" in result.stdout


@pytest.mark.parametrize("where", ["another folder", "the checkout"])
def test_from_a_regular_install(tmp_path, installed_wheel, where):
    """In the checkout, Python imports the checkout's package, which lacks the two mapped folders, instead."""
    cwd = tmp_path if where == "another folder" else Path(__file__).parents[1]
    site = str(installed_wheel)
    path = trainers_path(tmp_path, PYTHONPATH=site)
    assert path.startswith(site)
    result = run_python(CHECK.format(names=NAMES), cwd, nnUNet_extTrainer=path, PYTHONPATH=site)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1].startswith(site if where == "another folder" else str(cwd))


def test_from_a_folder_on_the_python_path(tmp_path):
    """As on a machine where nothing can be installed. -S and no site-packages hook: the editable install is off."""
    root = Path(__file__).parents[1]
    code = "import nnunet_dycon.trainers, nnunet_dycon.dataset_conversion, sys; print(nnunet_dycon.trainers.__file__)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(root / "trainers" / "__init__.py")


def test_an_unknown_trainer_is_refused_by_nnunet(tmp_path):
    code = CHECK.format(names=["nnUNetTrainerUnknown"])
    result = run_python(code, tmp_path, nnUNet_extTrainer=trainers_path(tmp_path))
    assert "Could not find requested nnunet trainer nnUNetTrainerUnknown" in result.stderr


def test_a_trainer_that_lacks_a_package_does_not_break_the_others(tmp_path):
    code = """
import nnunet_dycon.registry as registry
registry.TRAINERS["nnUNetTrainerLacking"] = registry.Trainer("lacking", "needs what is not there", "")
import sys, types
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "nnunet_dycon.trainers.lacking":
            raise ModuleNotFoundError("No module named 'left_out'", name="left_out")
sys.meta_path.insert(0, Finder())
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
print("FOUND", find("nnUNetTrainerMeanTeacher").__name__)
find("nnUNetTrainerLacking")
"""
    result = run_python(code, tmp_path, nnUNet_extTrainer=trainers_path(tmp_path))
    assert "FOUND nnUNetTrainerMeanTeacher" in result.stdout
    assert "No module named 'left_out'" in result.stderr


def test_a_look_up_imports_one_trainer(tmp_path):
    code = """
import sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
find("nnUNetTrainerMeanTeacher")
assert "nnunet_dycon.trainers.nnUNetTrainerDyCON" not in sys.modules
assert "nnunet_dycon_trainers" not in sys.modules
"""
    result = run_python(code, tmp_path, nnUNet_extTrainer=trainers_path(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def installed_wheel(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked as pip would into site-packages."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site
