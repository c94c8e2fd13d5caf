"""Shell completion: the generated scripts are valid, and bash completes commands, options and folders with them."""

import shutil
import subprocess

import pytest

from nnunet_dycon.cli import main
from tests.commands import COMMANDS


def script(capsys, shell: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", shell])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def completed(capsys, tmp_path):
    """Return a function: words of a command line, the last one unfinished -> what bash offers for it in tmp_path."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    file = tmp_path / "completion.bash"
    file.write_text(script(capsys, "bash"))
    subprocess.run(["bash", "-n", file], check=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.json").touch()

    def complete(*words: str) -> list[str]:
        code = (
            'source completion.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            '"$(complete -p nnunet_dycon | sed "s/.*-F \\([^ ]*\\).*/\\1/")"; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "--norc", "-c", code, "bash", "nnunet_dycon", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()

    return complete


def test_bash_completes_commands(completed):
    assert completed("pre") == ["preprocess_unlabeled", "predict_both", "predict_uncertainty"]
    assert sorted(completed("")) == sorted(command for command in COMMANDS if " " not in command)
    assert completed("--print-completion", "b") == ["bash"]


def test_bash_completes_options_of_commands_and_converters(completed):
    assert completed("sparsify", "--s") == ["--scribbles", "--seed"]
    assert completed("convert", "fo") == ["folder"]
    assert completed("convert", "folder", "--cha") == ["--channel"]
    assert completed("convert", "isles22", "--h") == ["--help", "--harmonize_adc"]
    assert completed("convert", "brats19", "--target", "w") == ["wt"]
    assert completed("select", "--strategy", "d") == ["diverse"]


def test_bash_completes_folders_and_files(completed):
    assert completed("convert", "la", "-i", "f") == ["folder"]
    assert completed("predict_uncertainty", "-i", "folder", "f") == ["folder"]
    assert sorted(completed("convert", "la", "--split", "f")) == ["file.json", "folder"]


@pytest.mark.parametrize(("shell", "start"), [("zsh", "#compdef nnunet_dycon"), ("fish", "# AUTO"), ("tcsh", "# AUTO")])
def test_scripts_for_other_shells_contain_commands_and_options(shell, start, capsys):
    text = script(capsys, shell)
    assert text.startswith(start)
    for name in ("preprocess_unlabeled", "pancreas_ct", "harmonize_adc"):
        assert name in text
    assert {"zsh": "_files -/", "fish": "__fish_complete_directories", "tcsh": "complete nnunet_dycon"}[shell] in text
