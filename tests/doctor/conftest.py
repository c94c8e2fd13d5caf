"""Fixtures that run the doctor and return its findings as objects."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from nnunet_dycon.cli import main
from nnunet_dycon.doctor import installation
from nnunet_dycon.doctor.findings import Finding
from tests.processes import run_python


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def fast_look_up(monkeypatch):
    """Run the look-up of trainers in a fork of a process that has imported nnU-Net."""

    def run(command, **options):
        return run_python(command[2], *command[3:])

    monkeypatch.setattr(installation, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def pretend_a_gpu(monkeypatch) -> Callable:
    """pretend_a_gpu(24) simulates a GPU of 24 GiB."""

    def pretend(gib: float) -> None:
        memory = round(gib * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Pretended")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory // 2, memory))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=memory))
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))

    return pretend


@pytest.fixture
def no_look_up(monkeypatch):
    """Skip the look-up of trainers, which starts a process and takes seconds."""
    monkeypatch.setattr(installation, "check_look_up", lambda trainer: [])


@pytest.fixture
def doctor(no_look_up, capsys) -> Callable:
    """doctor("-d 901 -f 0") returns the exit code and the findings, without the look-up of trainers."""

    def run(arguments: str) -> tuple[int, list[Finding]]:
        code = main(["doctor", "--json", *arguments.split()])
        return code, [Finding(**finding) for finding in json.loads(capsys.readouterr().out)["findings"]]

    return run


@pytest.fixture
def find() -> Callable:
    """find(findings, check, status, message, remedy) returns the finding that contains these texts, or fails."""

    def search(findings: list[Finding], check: str, status: str, message: str, remedy: str | None = None) -> Finding:
        for finding in findings:
            if (finding.check, finding.status) == (check, status) and message in finding.message:
                assert remedy is None or remedy in finding.remedy
                return finding
        raise AssertionError("\n".join(finding.as_text() for finding in findings))

    return search
