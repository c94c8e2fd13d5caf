"""The command line: fast help, exit codes, one-line messages for user errors."""

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from nnunet_dycon import __version__
from nnunet_dycon.cli import build_parser, main
from nnunet_dycon.registry import CONVERTERS, RECOMMENDED, TRAINERS, groups
from tests.commands import COMMANDS


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_does_not_import_torch(command):
    """Importing torch takes seconds. Help of a converter imports its module, which needs NumPy and nnU-Net."""
    heavy = {"torch"} if command.startswith("convert ") else {"torch", "numpy", "nnunetv2"}
    code = f"""
import sys
from nnunet_dycon.cli import main
try:
    main([*{command.split()}, "--help"])
except SystemExit:
    print(sorted({heavy} & set(sys.modules)))
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert any("usage: nnunet_dycon" in line for line in lines)
    assert lines[-1] == "[]"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("convert", "trainers_path")])
def test_example_in_the_help_is_a_valid_call(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    _, _, example = capsys.readouterr().out.partition("example: ")
    words = shlex.split(example)
    assert words[:1] == ["nnunet_dycon"]
    assert words[1 : 1 + len(command.split())] == command.split()
    build_parser(words[1:]).parse_args(words[1:])


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_no_unexpanded_percent_sign(command, capsys):
    """argparse expands %% in the help of an option, but not in a description or epilog."""
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert "%%" not in capsys.readouterr().out


def test_without_arguments_the_first_steps_are_printed(capsys):
    """The exit code is that of other wrong usage, and nothing is written to stdout, which a script may read."""
    assert main([]) == 2
    out, steps = capsys.readouterr()
    assert not out
    lines = [shlex.split(line) for line in steps.splitlines() if line.startswith("  nn")]
    ours = [words[1:] for words in lines if words[0] == "nnunet_dycon"]
    assert [words[0] for words in ours] == ["demo", "convert", "doctor", "evaluate"]
    for words in ours:
        build_parser(words).parse_args(words)
    assert [words[0] for words in lines if words[0] != "nnunet_dycon"] == [
        "nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict",
    ]  # fmt: skip
    assert "$(nnunet_dycon trainers_path)" in steps
    assert RECOMMENDED in steps
    assert "nnunet_dycon --help" in steps


def test_help_lists_every_command_once_in_a_group(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["options:", "data:", "training:", "results:", "annotation and self-training:", "help:"]
    listed = [line.split()[0] for line in lines[lines.index("data:") :] if re.match(r"  \w", line)]
    assert sorted(listed) == sorted(command for command in COMMANDS if " " not in command)


def test_trainers_path_prints_the_discovery_folder_in_one_line(capsys):
    assert main(["trainers_path"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert [file.name for file in Path(line).glob("*.py")].count("nnunet_dycon_trainers.py") == 1


def test_list_prints_all_trainers_and_converters(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in (*TRAINERS, *CONVERTERS):
        assert name in printed
    assert RECOMMENDED in printed.splitlines()[2]  # below the heading of its group, the first one
    assert all(f" {group}\n" in printed for group in groups())
    assert "NAME_50epochs" in printed
    assert "NAME_finetune" in printed
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
def test_old_nnunet_is_refused(monkeypatch, capsys, version, command):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"nnU-Net {version} is too old" in error
    assert "pip install 'nnunetv2>=2.8.0,<2.9'" in error


@pytest.mark.parametrize("version", ["2.8", "2.8.0", "2.8.1", "2.8.1+fork", "2.8.2rc1", "2.10.0", "3"])
def test_recent_nnunet_is_accepted(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert main(["trainers_path"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
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
def test_wrong_usage_has_exit_code_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2


def test_closed_pipe_prints_no_traceback():
    """As in `nnunet_dycon list --json | head -n 1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nnunet_dycon.cli", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    process.stdout.close()
    _, error = process.communicate()
    assert not error


@pytest.mark.parametrize(
    ("value", "problem"),
    [("~/raw", "starts with ~"), ("/data/raw\r", "Windows line end"), ('"/data/raw"', "contains quotes")],
)
def test_folders_that_the_shell_did_not_expand_raise(monkeypatch, capsys, value, problem):
    monkeypatch.setenv("nnUNet_raw", value)
    assert main(["convert", "folder", "-i", ".", "-d", "7", "--channel", "CT={case}.nii"]) in (1, 2)
    monkeypatch.setenv("nnUNet_preprocessed", value)
    assert main(["preprocess_unlabeled", "-d", "7"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert problem in error
    assert "run: export nnUNet_" in error
