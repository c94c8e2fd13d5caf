"""The command line: quick help, exit codes, one line for what a user can mend."""

import json
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from nnunet_dycon import __version__
from nnunet_dycon.cli import main
from nnunet_dycon.registry import CONVERTERS, RECOMMENDED, TRAINERS, groups

COMMANDS = [
    "convert",
    "convert la",
    "convert isles22",
    "convert brats19",
    "convert pancreas_ct",
    "convert msd",
    "convert folder",
    "preprocess_unlabeled",
    "trainers_path",
    "list",
    "evaluate",
    "compare",
    "export_vanilla",
    "predict_both",
    "predict_uncertainty",
    "doctor",
    "demo",
]


def seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick(command):
    """Best of three: under 0.3 s of a core, whatever else runs on it; no import of torch would leave that."""
    seconds = []
    for _ in range(3):
        before = seconds_of_children()
        call = [sys.executable, "-m", "nnunet_dycon.cli", *command.split(), "--help"]
        result = subprocess.run(call, capture_output=True, text=True, check=True)
        seconds.append(seconds_of_children() - before)
        assert "usage: nnunet_dycon" in result.stdout
        if seconds[-1] < 0.3:
            return
    raise AssertionError(f"--help took {min(seconds):.2f} s")


def test_trainers_path_is_one_line_that_names_the_discovery_folder(capsys):
    assert main(["trainers_path"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert [file.name for file in Path(line).glob("*.py")].count("nnunet_dycon_trainers.py") == 1


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in (*TRAINERS, *CONVERTERS):
        assert name in printed
    assert RECOMMENDED in printed.splitlines()[2]  # below the heading of its group, which is the first
    assert all(f" {group}\n" in printed for group in groups())
    assert "NAME_50epochs" in printed
    assert TRAINERS["nnUNetTrainerDyCON"].caveat in printed


def test_list_as_json(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["version"] == __version__
    assert listed["trainers"].keys() == TRAINERS.keys()
    assert listed["converters"].keys() == CONVERTERS.keys()
    assert listed["trainers"]["nnUNetTrainerDyCON"]["paper"].endswith("arXiv:2504.04566")


@pytest.mark.parametrize("version", ["2.7.0", "2.6.2", "1.7.1"])
@pytest.mark.parametrize("command", [["trainers_path"], ["preprocess_unlabeled", "-d", "1"], ["demo", "-o", "x"]])
def test_an_old_nnunet_is_refused(monkeypatch, capsys, version, command):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"nnU-Net {version} is too old" in error
    assert "pip install 'nnunetv2>=2.8.0,<2.9'" in error


@pytest.mark.parametrize("version", ["2.8", "2.8.0", "2.8.1", "2.8.1+fork", "2.8.2rc1", "2.10.0", "3"])
def test_a_recent_nnunet_is_accepted(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert main(["trainers_path"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "unknown",
        "convert unknown",
        "preprocess_unlabeled",
        "evaluate -ref a",
        "compare -ref a",
        "export_vanilla -m a -o b --teacher -chk c",
        "convert la -i a -d 0",
        "convert la -i a -d 1 --labeled 2 --split b",
    ],
)
def test_wrong_use_is_exit_code_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
