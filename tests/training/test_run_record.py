"""Tests of the record of a run."""

import json

from nnunet_dycon.training.run_record import record_file, write_record


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
