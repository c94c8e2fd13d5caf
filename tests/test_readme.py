"""The README names what there is."""

from pathlib import Path

import pytest

from nnunet_dycon.registry import CONVERTERS, TRAINERS

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("name", [f"`{trainer}`" for trainer in TRAINERS] + [f"convert {name}" for name in CONVERTERS])
def test_every_trainer_and_converter_is_in_the_readme(name):
    assert name in README


def test_the_two_commands_are_on_the_first_screen():
    assert {"make demo", "make test"} <= {line.split("#")[0].strip() for line in README.splitlines()[:25]}
