"""Wheel and sdist contain all modules of the checkout, also sub-packages that pyproject.toml must list."""

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nnunet_dycon import __version__

ROOT = Path(__file__).parents[1]
FOLDERS = {"nnunet_dycon": "nnunet_dycon", "trainers": "nnunet_dycon/trainers"}
FOLDERS["dataset_conversion"] = "nnunet_dycon/dataset_conversion"


def shipped_modules() -> set[str]:
    """Return the paths in a wheel of all modules of the checkout."""
    return {
        f"{target}/{file.relative_to(ROOT / folder)}"
        for folder, target in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }


def test_wheel_contains_every_module_and_one_top_level_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == shipped_modules()
    assert "nnunet_dycon/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nnunet_dycon"}


def test_wheel_has_command_and_license(wheel):
    archive = zipfile.ZipFile(wheel)
    entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "nnunet_dycon = nnunet_dycon.cli:main" in archive.read(entry_points).decode()
    metadata = archive.read(entry_points.replace("entry_points.txt", "METADATA")).decode()
    assert "License-Expression: Apache-2.0" in metadata


def test_sdist_contains_every_module_and_what_the_tests_need(source_copy, tmp_path):
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), str(source_copy)]
    subprocess.run(build, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        f"{folder}/{file.relative_to(ROOT / folder)}" for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")
    }
    wanted |= {
        str(file.relative_to(ROOT))
        for folder in ("tests", "docs", "benchmarks", ".ci")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    wanted |= {
        "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "pyproject.toml",
        "mkdocs.yml", ".pre-commit-config.yaml",
    }  # fmt: skip
    assert wanted <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_citation_and_changelog_have_the_version_of_the_package():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    first = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] in (__version__, "Unreleased")


def test_run_time_dependencies_have_lower_bounds():
    run_time = [Requirement(text) for text in requires("nnunet-dycon") if "extra ==" not in text]
    assert {requirement.name for requirement in run_time} == {
        "nnunetv2", "torch", "dynamic-network-architectures", "batchgenerators", "batchgeneratorsv2", "SimpleITK",
        "acvl-utils", "monai", "h5py", "shtab",
    }  # fmt: skip
    for requirement in run_time:
        assert any(bound.operator == ">=" for bound in requirement.specifier), requirement


LIGHT = [
    "", ".registry", ".errors", ".system.environment", ".system.files", ".cli", ".trainers", ".dataset_conversion",
    ".discovery",
]  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_numpy_nor_nnunet(module):
    """The command line imports these modules before it runs a sub-command."""
    code = f"import sys, nnunet_dycon{module}; assert not {{'torch', 'numpy', 'nnunetv2'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
