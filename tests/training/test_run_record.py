"""Tests of the record of a run."""

import json

from nnunet_dycon.training.run_record import record_file, update_record, write_record


def test_record_contains_settings_cases_hash_and_versions(tmp_path):
    cases = {"labeled": ["a"], "unlabeled": ["b", "c"]}
    write_record(tmp_path, "nnUNetTrainerX", {"method_settings": {"weight": 0.5}}, cases)
    record = json.loads(record_file(tmp_path).read_text())
    assert record["trainer"] == "nnUNetTrainerX"
    assert record["method_settings"] == {"weight": 0.5}
    assert record["cases"] == cases
    assert {"nnunet-dycon", "nnunetv2", "torch"} <= record["versions"].keys()
    digest = record["cases_sha256"]
    write_record(tmp_path, "nnUNetTrainerX", {}, {"labeled": ["a"], "unlabeled": ["b", "d"]})
    assert json.loads(record_file(tmp_path).read_text())["cases_sha256"] != digest


def test_record_of_a_resumed_training_changes_only_with_its_cases(tmp_path):
    cases, lines = {"labeled": ["a"], "unlabeled": ["b"]}, []
    update_record(tmp_path, "nnUNetTrainerX", {"method_settings": {"weight": 1}}, cases, True, lines.append)
    written = record_file(tmp_path).read_bytes()
    update_record(tmp_path, "nnUNetTrainerX", {}, cases, False, lines.append)
    assert (record_file(tmp_path).read_bytes(), lines) == (written, [])
    update_record(tmp_path, "nnUNetTrainerX", {}, cases | {"unlabeled": ["b", "c"], "sparse": []}, False, lines.append)
    assert lines == ["WARNING: the cases have changed since this training started: unlabeled 1, now 2"]
    assert json.loads(record_file(tmp_path).read_text())["cases"]["unlabeled"] == ["b", "c"]
    record_file(tmp_path).write_text("{")
    update_record(tmp_path, "nnUNetTrainerX", {}, cases, False, lines.append)
    assert json.loads(record_file(tmp_path).read_text())["cases"] == cases
    assert len(lines) == 1
