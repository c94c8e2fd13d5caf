"""nnU-Net's look-up of trainers in a new process, from any folder, with an editable and a regular installation."""

import os
import subprocess
import sys
import zipfile
from itertools import cycle
from pathlib import Path

import pytest

from nnunet_dycon.registry import BUILDERS, TRAINERS
from tests import processes

CHECK = """
import pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
names = {names!r}
classes = [find(name) for name in names]
for name, cls in zip(names, classes):
    assert cls.__name__ == cls.__qualname__ == name, cls
    assert (cls.__module__ + ".").startswith("nnunet_dycon.trainers."), cls.__module__
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert find(name) is cls
import nnunet_dycon
print("FOUND", len(classes), nnunet_dycon.__file__)
"""


def run_python(
    code: str, cwd: Path, is_interpreter_new: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet")}
    inherited.pop("PYTHONPATH", None)
    environment = inherited | environment
    if is_interpreter_new:
        return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    return processes.run_python(code, cwd=cwd, environment=environment)


def trainers_path(cwd: Path, **environment: str) -> str:
    code = "import sys; from nnunet_dycon.cli import main; sys.exit(main(['trainers_path']))"
    result = run_python(code, cwd, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


LENGTHS = [f"{name}_{ending}" for name, ending in zip(TRAINERS, cycle(("smoke", "7epochs", "finetune_7epochs")))]
NAMES = [*TRAINERS, *BUILDERS, *LENGTHS]
FEW = NAMES[::5]


def test_trainers_are_found_in_this_environment(tmp_path):
    result = run_python(CHECK.format(names=NAMES), tmp_path, nnUNet_extTrainer=trainers_path(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"FOUND {len(NAMES)}" in result.stdout


@pytest.mark.parametrize("where", ["another folder", pytest.param("the checkout", marks=pytest.mark.slow)])
def test_trainers_are_found_in_a_regular_installation(tmp_path, installed_wheel, where):
    """Started in the checkout, Python imports its package instead, where trainers/ is outside of the package."""
    cwd = tmp_path if where == "another folder" else Path(__file__).parents[1]
    site = str(installed_wheel)
    path = trainers_path(tmp_path, PYTHONPATH=site)
    assert path.startswith(site)
    result = run_python(CHECK.format(names=FEW), cwd, nnUNet_extTrainer=path, PYTHONPATH=site)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1].startswith(site if where == "another folder" else str(cwd))


def test_checkout_on_pythonpath_can_be_imported(tmp_path):
    """Without an installation: -S disables site-packages, and thereby the editable installation."""
    root = Path(__file__).parents[1]
    code = "import nnunet_dycon.trainers, nnunet_dycon.dataset_conversion, sys; print(nnunet_dycon.trainers.__file__)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(root / "trainers" / "__init__.py")


NO_TRAINER = {
    "nnUNetTrainerUnknown": "no trainer is called nnUNetTrainerUnknown; run `nnunet_dycon list` for all trainers",
    "nnUNetTrainerDyCOM": "no trainer is called nnUNetTrainerDyCOM; did you mean nnUNetTrainerDyCON? ",
    "nnUNetTrainerDyCN_finetune": "did you mean nnUNetTrainerDyCON, with _finetune",
    "nnUNetTrainerDyCON_50epochs_finetune": "with _finetune before the length, as in _finetune_50epochs? ",
    "nnUNetTrainerDyCON_0epochs": "nnUNetTrainerDyCON_0epochs: the number of epochs starts with 0; use",
    "nnUNetTrainerUXNet_05epochs": "for example nnUNetTrainerUXNet_50epochs",
    "nnUNetTrainerDyCON_paper": "nnUNetTrainerDyCON_paper was removed; use nnUNetTrainerDyCON, the published method",
    "nnUNetTrainerDyCON_noUnCL_50epochs": "derive a class from nnUNetTrainerDyCON with uncl_weight=0",
    "nnUNetTrainerDyCON_paper_finetune": "nnUNetTrainerDyCON_paper was removed; use nnUNetTrainerDyCON",
    "nnUNetTrainerDyCON_finetune_0epochs": "the number of epochs starts with 0; use",
}


def test_unknown_trainer_is_a_one_line_error(tmp_path):
    code = f"""
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
for name in {list(NO_TRAINER)!r}:
    try:
        find(name)
    except RuntimeError as error:  # the error of nnU-Net's own look-up
        assert isinstance(error, SystemExit)
        print("LINE", name, error.code)
find("nnUNetTrainerUnknown")
"""
    result = run_python(code, tmp_path, nnUNet_extTrainer=trainers_path(tmp_path))
    lines = dict(line.split(" ", 2)[1:] for line in result.stdout.splitlines() if line.startswith("LINE"))
    assert lines.keys() == NO_TRAINER.keys(), result.stderr
    for name, message in NO_TRAINER.items():
        assert lines[name].startswith("nnunet_dycon: error: ")
        assert message in lines[name]
        assert "\n" not in lines[name]
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == lines["nnUNetTrainerUnknown"]


def test_trainer_in_a_later_folder_is_found(tmp_path):
    """Unknown names raise an error only if no later folder of nnUNet_extTrainer can contain them."""
    source = "from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON\n"
    source += "class nnUNetTrainerDyCON_tau01(nnUNetTrainerDyCON): pass\n"
    (tmp_path / "mine.py").write_text(source)
    code = "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
    code += "print('FOUND', find('nnUNetTrainerDyCON_tau01').__module__)"
    result = run_python(code, tmp_path, nnUNet_extTrainer=f"{trainers_path(tmp_path)}{os.pathsep}{tmp_path}")
    assert "FOUND mine" in result.stdout, result.stderr


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_worker_processes_unpickle_a_trainer_with_another_length(tmp_path, method):
    code = f"""
import multiprocessing, pathlib
pathlib.Path("mine.py").write_text("def name(cls): return cls.__name__, cls.training_settings.num_epochs")
if __name__ == "__main__":
    from nnunet_dycon.trainers import trainer_class
    import mine
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        print("FOUND", *pool.apply(mine.name, (trainer_class("nnUNetTrainerUGPL_3epochs"),)))
"""
    (tmp_path / "main.py").write_text(code)
    run = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path('main.py', run_name='__main__')"
    result = run_python(run, tmp_path, True, PYTHONPATH=str(tmp_path))
    assert "FOUND nnUNetTrainerUGPL_3epochs 3" in result.stdout, result.stderr


def test_missing_package_breaks_only_the_trainer_that_needs_it(tmp_path):
    code = """
import nnunet_dycon.registry as registry
registry.TRAINERS["nnUNetTrainerLacking"] = registry.Trainer("baselines", "needs a missing package", "")
import sys, types
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "nnunet_dycon.trainers.nnUNetTrainerLacking":
            raise ModuleNotFoundError("No module named 'left_out'", name="left_out")
sys.meta_path.insert(0, Finder())
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
print("FOUND", find("nnUNetTrainerMeanTeacher").__name__)
find("nnUNetTrainerLacking")
"""
    result = run_python(code, tmp_path, nnUNet_extTrainer=trainers_path(tmp_path))
    assert "FOUND nnUNetTrainerMeanTeacher" in result.stdout
    assert "No module named 'left_out'" in result.stderr


def test_look_up_imports_only_the_requested_trainer(tmp_path):
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
    """Return a folder like site-packages with the unpacked wheel."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site
