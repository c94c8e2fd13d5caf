"""README and documentation: commands, links, and generated parts."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from docs import figures, tables
from nnunet_dycon.cli import build_parser
from nnunet_dycon.registry import RECOMMENDED, TRAINERS
from tests.commands import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def code_of(text: str) -> list[str]:
    """Return all that is set as code: in backticks, and lines of blocks."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return [*re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)), *"".join(blocks).splitlines()]


def test_the_first_training_command_names_the_recommended_trainer():
    (block, *_) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "nnUNetv2_train" in block]
    command = next(shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("nnUNetv2_train"))
    assert command[command.index("-tr") + 1] == RECOMMENDED


def test_every_trainer_has_a_page():
    for name in TRAINERS:
        assert f"`{name}`" in (ROOT / "docs" / "reference" / "methods" / tables.method_page(name)).read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/reference/methods/dycon.md"])
def test_readers_of_a_page_are_warned_of_the_published_dycon(page):
    text = " ".join((ROOT / page).read_text().replace("\n> ", " ").split())
    caveat = TRAINERS["nnUNetTrainerDyCON"].caveat
    assert caveat in text
    assert RECOMMENDED in caveat
    assert "nnUNetTrainerDyCON_adapted" in caveat


@pytest.mark.parametrize("page", tables.all_pages(), ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_generated_parts_of_a_page_are_up_to_date(page):
    text = page.read_text()
    assert tables.filled(text) == text, f"{page.name} is out of date; run: make tables"


def test_figures_are_up_to_date():
    for file, svg in figures.files().items():
        assert file.read_text() == svg, f"{file.name} is out of date; run: make tables"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_reference(command):
    text = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert re.search(rf"^#+ nnunet_dycon {command}$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        if not anchor:
            continue
        headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                    for line in file.read_text().splitlines() if line.startswith("#")]  # fmt: skip
        assert anchor in headings, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_written_as_the_parser_wants_them(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():  # which may go on in the next one
            words = shlex.split(line.partition(" > ")[0], comments=True)
            if words[:1] == ["nnunet_dycon"] and "--print-completion" not in words:  # which prints, and exits
                build_parser(words[1:]).parse_args(words[1:])


def test_the_two_commands_are_on_the_first_screen():
    assert {"make demo", "make test"} <= {line.split("#")[0].strip() for line in README.splitlines()[:25]}


def test_script_for_scribbles_changes_the_values(tmp_path):
    page = (ROOT / "docs" / "how-to" / "sparse_annotations.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    voxels = np.array([[[0, 1, 2, 3]]], np.uint8)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1, 2, 3))
    (tmp_path / "scribbles").mkdir()
    sitk.WriteImage(image, str(tmp_path / "scribbles" / "case.nii.gz"))
    subprocess.run([sys.executable, "-c", script, "scribbles", "new/labelsTr", "3"], cwd=tmp_path, check=True)
    changed = sitk.ReadImage(str(tmp_path / "new" / "labelsTr" / "case.nii.gz"))
    assert sitk.GetArrayFromImage(changed).tolist() == [[[3, 1, 2, 0]]]
    assert changed.GetSpacing() == (1, 2, 3)
