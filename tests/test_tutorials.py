"""The code of the tutorials: it parses, and that of docs/tutorials/annotate.md runs from top to bottom (slow)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dycon.demo.phantom import phantom
from tests.processes import ONE_THREAD

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
ANNOTATE = next(page for page in TUTORIALS if page.name == "annotate.md")


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return language and code of all blocks with bash or Python code, in their order."""
    return re.findall(r"```(bash|python)\n(.*?)```", page.read_text(), re.DOTALL)


def as_script(page: Path) -> str:
    """Return a bash script that runs all blocks, and that ends at the first command that fails."""
    parts = ["set -euo pipefail"]
    for language, code in blocks_of(page):
        parts.append(code if language == "bash" else f"python3 - <<'END_OF_BLOCK'\n{code}END_OF_BLOCK")
    return "\n".join(parts)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_code_of_tutorials_parses(page):
    for language, code in blocks_of(page):
        if language == "python":
            compile(code, page.name, "exec")
    subprocess.run(["bash", "-n"], input=as_script(page), text=True, check=True)


@pytest.mark.slow
def test_annotation_tutorial_runs_from_top_to_bottom(tmp_path):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": ONE_THREAD,
        "OMP_NUM_THREADS": "1",
        "nnUNet_n_proc_DA": "1",  # nnU-Net's planner fails with 0
        "nnUNet_def_n_proc": "1",
    }
    result = subprocess.run(
        ["bash"], input=as_script(ANNOTATE), cwd=tmp_path, env=inherited | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    source = tmp_path / "raw" / "Dataset900_Phantom"
    assert len(list((source / "imagesTr").iterdir())) == 6
    assert len(list((source / "imagesUn").iterdir())) == 4
    added = [file for file in (source / "labelsTr").iterdir() if int(file.name[8:11]) > 3]
    assert len(added) == 2
    for file in added:
        _, truth = phantom(np.random.default_rng([0, int(file.name[8:11])]), (20, 32, 40), (2, 5))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), truth)
    compared = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert {each["method"] for each in compared["means"]} == {"round1", "round2"}
