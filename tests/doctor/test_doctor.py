"""The doctor command: text and JSON output, exit codes, and findings instead of tracebacks."""

import json
import os
import subprocess
import sys

import pytest

import nnunet_dycon
from nnunet_dycon.cli import main
from nnunet_dycon.doctor import installation
from nnunet_dycon.doctor.findings import FAIL, NOTE, OK, WARNING


def test_healthy_data_set_has_no_warnings(tiny, capsys):
    before = sorted(tiny.rglob("*"))
    assert main(["doctor", "-d", "901", "-f", "0"]) == 0
    assert sorted(tiny.rglob("*")) == before
    *lines, empty, verdict = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith(("warning", "FAIL"))]
    checks = {line[9:].split(":")[0] for line in lines if not line.startswith(" ")}
    assert checks == {
        "versions", "device", "settings", "folders", "nnUNet_extTrainer", "trainer", "raw data", "case names",
        "headers", "duplicates", "labeled", "unlabeled", "split", "results", "disk", "GPU memory",
    }  # fmt: skip
    python = sys.version.split()[0]
    assert f"versions: Python {python}, nnunet-dycon {nnunet_dycon.__version__}, nnunetv2 2.8" in lines[0]
    assert [line for line in lines if "5 labeled, 4 unlabeled, 2 test; 1 channel" in line]
    command = "nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerWeakToStrong -device cpu"
    assert (empty, verdict.partition("; ")[2]) == ("", f"training should work: {command}")
    assert max(map(len, lines)) < 300


def test_json_contains_findings_and_summary(tiny, no_look_up, capsys):
    arguments = ["-d", "901", "-c", "3d_lowres", "-p", "Mine", "-f", "all", "-tr", "nnUNetTrainerMeanTeacher"]
    assert main(["doctor", "--json", *arguments]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["version"] == nnunet_dycon.__version__
    assert all(set(finding) == {"check", "status", "message", "remedy"} for finding in printed["findings"])
    summary = printed["summary"]
    assert summary["command"] == "nnUNetv2_train 901 3d_lowres all -tr nnUNetTrainerMeanTeacher -p Mine -device cpu"
    assert not summary["would_train"]
    statuses = [finding["status"] for finding in printed["findings"]]
    assert {status: statuses.count(status) for status in (OK, NOTE, WARNING, FAIL)}.items() <= summary.items()


def test_without_a_data_set_only_the_installation_is_checked(tiny, no_look_up, capsys):
    assert main(["doctor"]) == 0
    *lines, verdict, hint = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "Dataset901_Tiny" in line]
    assert "training should work: nnUNetv2_train ID 3d_fullres FOLD" in verdict
    assert "-d ID" in hint


@pytest.mark.parametrize("fold", ["x", "-1", "All"])
def test_a_fold_is_a_number_or_all(fold):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "-f", fold])
    assert stopped.value.code == 2


def test_broken_packages_are_findings(tiny, tmp_path):
    """If torch cannot be imported, every check that needs it fails with the reason."""
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so: cannot open shared object file')")
    command = [sys.executable, "-m", "nnunet_dycon.cli", "doctor", "-d", "901"]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert [line[9:].split(":")[0] for line in failed] == ["device", "trainer", "data set"]
    assert all("libcudart.so: cannot open shared object file" in line for line in failed)


def test_error_in_a_check_is_a_warning_and_other_checks_run(tiny, doctor, find, monkeypatch):
    def check_settings():
        yield installation.Finding("settings", OK, "before")
        raise ZeroDivisionError("float division\nmore")

    monkeypatch.setattr(installation, "check_settings", check_settings)
    code, findings = doctor("")
    find(findings, "settings", OK, "before")
    find(findings, "settings", WARNING, "the check itself failed (ZeroDivisionError: float division)")
    find(findings, "folders", OK, "nnUNet_raw=")
    assert code == 0
