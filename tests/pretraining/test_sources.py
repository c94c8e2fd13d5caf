"""Tests of reading checkpoints: layouts, and files that are damaged or could execute code."""

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.pretraining.sources import read_source
from tests.pretraining.networks import adaptation_plan, save

WEIGHTS = {"encoder.stages.0.weight": torch.ones(2, 3), "decoder.bias": torch.zeros(2)}


class Executes:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("key", ["network_weights", "state_dict", "model_state_dict", "model", None])
@pytest.mark.parametrize("is_zipped", [True, False])
def test_state_dict_is_found_in_every_layout(tmp_path, key, is_zipped):
    content = OrderedDict(WEIGHTS) if key is None else {"epoch": 3, key: OrderedDict(WEIGHTS)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zipped)
    source = read_source(tmp_path / "a.pth")
    torch.testing.assert_close(source.weights, WEIGHTS, rtol=0, atol=0)
    assert source.init_args == source.nnssl_plan == {}


def test_checkpoint_of_nnunet_with_numpy_scalars_is_read(tmp_path):
    content = {
        "network_weights": WEIGHTS,
        "optimizer_state": {"state": {}},
        "logging": {"dice_per_class_or_region": [[np.float32(0.5)]], "ema_fg_dice": [np.float64(0.25)]},
        "_best_ema": np.float64(0.25),
        "init_args": {"plans": {"plans_name": "nnUNetPlans"}, "configuration": "3d_fullres"},
        "trainer_name": "nnUNetTrainer",
    }
    source = read_source(save(tmp_path / "a.pth", content))
    assert source.init_args == content["init_args"]
    assert source.weights.keys() == WEIGHTS.keys()


def test_checkpoint_of_nnssl_is_read_with_its_plan_and_citations(tmp_path):
    citations = [{"type": "Dataset", "name": "OpenMind"}, {"type": "Architecture", "name": "ResEncL"}, {}, "text"]
    content = {"network_weights": WEIGHTS, "nnssl_adaptation_plan": adaptation_plan(), "citations": citations}
    source = read_source(save(tmp_path / "a.pth", content))
    assert source.nnssl_plan["key_to_stem"] == "encoder.stem"
    assert source.citations == ("OpenMind", "ResEncL")


def one_line(file: Path, error: type[UserError] = UserError) -> str:
    with pytest.raises(error) as refused:
        read_source(file)
    message = str(refused.value)
    assert "\n" not in message
    assert str(file) in message
    return message


@pytest.mark.parametrize("is_zipped", [True, False])
def test_file_with_code_is_refused_without_executing_it(tmp_path, is_zipped):
    file, made = tmp_path / "a.pth", tmp_path / "made"
    content = {"network_weights": WEIGHTS, "extra": Executes(made)}
    torch.save(content, file, _use_new_zipfile_serialization=is_zipped)
    assert "contains objects other than tensors and plain data" in one_line(file)
    file.write_bytes(pickle.dumps(content["extra"]))
    one_line(file)
    assert not made.exists()


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_truncated_file_is_refused(tmp_path, kept):
    file = save(tmp_path / "a.pth", {"network_weights": {"a.weight": torch.randn(5000)}})
    file.write_bytes(file.read_bytes()[:kept])
    assert "is damaged or not a checkpoint of PyTorch" in one_line(file)


def test_wrong_checksum_is_refused(tmp_path):
    file = save(tmp_path / "a.pth", {"network_weights": {"a.weight": torch.randn(5000)}})
    content = bytearray(file.read_bytes())
    content[10_000] ^= 1
    file.write_bytes(content)
    assert "the checksum of" in one_line(file)


@pytest.mark.parametrize("content", [b"text", b"{}", b"\x89HDF\r\n\x1a\n", b"<html></html>"])
def test_other_file_is_refused(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    assert "is damaged or not a checkpoint of PyTorch" in one_line(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [{}, [1], {"epoch": 3}, {"state_dict": {"a": 1}}, torch.ones(3)])
def test_file_without_weights_is_refused(tmp_path, content):
    assert "contains no weights" in one_line(save(tmp_path / "a.pth", content))


def test_missing_file_is_refused(tmp_path):
    assert "does not exist" in one_line(tmp_path / "a.pth", UsageError)
