"""Tests of `nnunet_dycon adapt_weights`: the file for -pretrained_weights, and plans like those of a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon.cli import main
from nnunet_dycon.pretraining.adaptation import HEADS
from nnunet_dycon.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_dycon.trainers.nnUNetTrainerUXNet import nnUNetTrainerUXNet
from nnunet_dycon.trainers.nnUNetTrainerWeakToStrong import nnUNetTrainerWeakToStrong
from tests.pretraining.networks import RESIDUAL, adaptation_plan, architecture, network, save
from tests.trainers.training import deterministic, make_trainer


def adapt(*arguments) -> int:
    return main(["adapt_weights", "-d", "901", *map(str, arguments)])


def refusal(capsys, *arguments) -> str:
    assert adapt(*arguments) in (1, 2)
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


def read_plans(base: Path, name: str = "nnUNetPlans") -> dict:
    return json.loads((base / f"{name}.json").read_text())


def with_channels(base: Path, number: int) -> None:
    """Change plans and dataset.json as if the images had a number of channels."""
    dataset, plans = json.loads((base / "dataset.json").read_text()), read_plans(base)
    dataset["channel_names"] = {str(i): f"MRI{i}" for i in range(number)}
    configuration = plans["configurations"]["3d_fullres"]
    for entry in ("normalization_schemes", "use_mask_for_norm"):
        configuration[entry] = configuration[entry][:1] * number
    (base / "dataset.json").write_text(json.dumps(dataset))
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))


@pytest.fixture
def checkpoint(base, tmp_path) -> Path:
    """Return a checkpoint of nnU-Net for the same plans with one channel, but other classes."""
    plans = read_plans(base)
    planned = PlansManager(plans).get_configuration("3d_fullres")
    torch.manual_seed(1)
    arguments = PlansManager(plans), planned, 1, 7, True
    weights = nnUNetTrainer.build_network_architecture(*arguments).state_dict()
    init_args = {"plans": plans, "configuration": "3d_fullres", "fold": 0}
    content = {"network_weights": weights, "init_args": init_args, "trainer_name": "nnUNetTrainer"}
    return save(tmp_path / "checkpoint_final.pth", content)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("base_class", [nnUNetTrainer, nnUNetTrainerWeakToStrong, nnUNetTrainerCPS])
def test_nnunet_loads_the_written_file(base, tmp_path, checkpoint, capsys, base_class, channels):
    with_channels(base, channels)
    assert adapt("-w", checkpoint, "-o", tmp_path / "adapted.pth", "-tr", base_class.__name__) == 0
    printed = capsys.readouterr().out
    for part in ("stem", "encoder", "decoder", "heads"):
        assert f"\n{part} " in printed
    assert f"-tr {base_class.__name__} -p nnUNetPlans -pretrained_weights {tmp_path / 'adapted.pth'}" in printed
    trainer = make_trainer(base_class)
    maybe_load_checkpoint(trainer, False, False, str(tmp_path / "adapted.pth"))
    source = torch.load(checkpoint, weights_only=True)["network_weights"]
    for name, tensor in trainer.network.state_dict().items():
        if HEADS not in name and tensor.shape == source[name].shape:
            assert torch.equal(tensor, source[name]), name


def test_teacher_starts_from_the_adapted_weights(base, tmp_path, checkpoint):
    assert adapt("-w", checkpoint, "-o", tmp_path / "adapted.pth") == 0
    trainer = make_trainer(deterministic(nnUNetTrainerWeakToStrong))
    maybe_load_checkpoint(trainer, False, False, str(tmp_path / "adapted.pth"))
    trainer.on_train_start()
    student = trainer.network.state_dict()
    torch.testing.assert_close(trainer.method.teacher.network.state_dict(), student, rtol=0, atol=0)
    source = torch.load(checkpoint, weights_only=True)["network_weights"]
    name = "encoder.stages.1.0.convs.0.conv.weight"
    assert torch.equal(student[name], source[name])


def test_the_same_seed_writes_the_same_weights(base, tmp_path, checkpoint):
    encoder = {name: tensor for name, tensor in torch.load(checkpoint)["network_weights"].items() if "encoder" in name}
    save(tmp_path / "encoder.pth", encoder)
    before = torch.get_rng_state()
    written = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert adapt("-w", tmp_path / "encoder.pth", "-o", tmp_path / f"{name}.pth", "--seed", seed) == 0
        written.append(torch.load(tmp_path / f"{name}.pth", weights_only=True)["network_weights"])
    name = "decoder.stages.0.convs.0.conv.weight"
    assert torch.equal(written[0][name], written[1][name])
    assert not torch.equal(written[0][name], written[2][name])
    assert torch.equal(torch.get_rng_state(), before)


def test_architecture_of_another_trainer_is_refused(base, tmp_path, checkpoint, capsys):
    line = refusal(capsys, "-w", checkpoint, "-o", tmp_path / "adapted.pth", "-tr", nnUNetTrainerUXNet.__name__)
    assert "architecture class" in line
    assert not (tmp_path / "adapted.pth").exists()


def test_wrong_usage_is_one_line_and_files_are_not_replaced(base, tmp_path, checkpoint, capsys):
    existing = tmp_path / "there.pth"
    existing.write_text("mine")
    new = tmp_path / "new.pth"
    assert "there.pth already exists; choose another file" in refusal(capsys, "-w", checkpoint, "-o", existing)
    assert existing.read_text() == "mine"
    assert "-w needs -o" in refusal(capsys, "-w", checkpoint)
    assert "is for --plans_like" in refusal(capsys, "-w", checkpoint, "-o", new, "-overwrite_plans_name", "a")
    assert "does not exist; create the folder" in refusal(capsys, "-w", checkpoint, "-o", tmp_path / "no" / "a.pth")
    assert "is damaged or not a checkpoint" in refusal(capsys, "-w", existing, "-o", new)
    assert "has no configuration 2d_x" in refusal(capsys, "-w", checkpoint, "-o", new, "-c", "2d_x")
    assert "cannot find the trainer nnUNetTrainerX" in refusal(
        capsys, "-w", checkpoint, "-o", new, "-tr", "nnUNetTrainerX"
    )
    assert not new.exists()


def test_plans_like_a_checkpoint_of_nnunet(base, tmp_path, capsys):
    theirs = read_plans(base)
    planned = theirs["configurations"]["3d_fullres"]
    changes = {
        "spacing": [2.0, 1.0, 1.0], "patch_size": [16, 32, 32], "batch_size": 3, "architecture": architecture(RESIDUAL),
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
    }  # fmt: skip
    planned |= changes
    source = network(kind=RESIDUAL, seed=1)
    content = {
        "network_weights": source.state_dict(), "trainer_name": "nnUNetTrainer",
        "init_args": {"plans": theirs, "configuration": "3d_fullres"},
    }  # fmt: skip
    file = save(tmp_path / "a.pth", content)
    with_channels(base, 2)
    before = (base / "nnUNetPlans.json").read_bytes()
    assert adapt("--plans_like", file, "-o", tmp_path / "adapted.pth") == 0
    printed = capsys.readouterr().out
    assert "spacing: 2 x 1 x 1 mm, of the checkpoint" in printed
    assert (
        "normalization: CTNormalization, CTNormalization (planned: ZScoreNormalization, ZScoreNormalization)" in printed
    )
    assert "nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans_pretrained -c 3d_fullres" in printed
    assert (base / "nnUNetPlans.json").read_bytes() == before
    written = read_plans(base, "nnUNetPlans_pretrained")
    assert written["plans_name"] == "nnUNetPlans_pretrained"
    assert list(written["configurations"]) == ["3d_fullres"]
    new = written["configurations"]["3d_fullres"]
    both = {"normalization_schemes": ["CTNormalization"] * 2, "use_mask_for_norm": [False] * 2}
    assert {key: new[key] for key in changes} == changes | both
    assert new["data_identifier"] == "nnUNetPlans_pretrained_3d_fullres"
    manager = PlansManager(written)
    target = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 2, 3, True)
    load_pretrained_weights(target, str(tmp_path / "adapted.pth"))
    name = "encoder.stages.1.blocks.0.conv1.conv.weight"
    assert torch.equal(target.state_dict()[name], source.state_dict()[name])
    assert "already exists; choose another name" in refusal(capsys, "--plans_like", file)
    assert adapt("--plans_like", file, "-overwrite_plans_name", "Mine") == 0
    assert read_plans(base, "Mine")["configurations"]["3d_fullres"]["data_identifier"] == "Mine_3d_fullres"


def nnssl_checkpoint(file: Path, **changes) -> Path:
    weights = network(kind=RESIDUAL, seed=1).state_dict()
    return save(file, {"network_weights": weights, "nnssl_adaptation_plan": adaptation_plan(**changes)})


def test_plans_like_a_checkpoint_of_nnssl(base, tmp_path, capsys):
    file = nnssl_checkpoint(tmp_path / "a.pth")
    assert adapt("--plans_like", file, "-o", tmp_path / "adapted.pth") == 0
    new = read_plans(base, "nnUNetPlans_pretrained")["configurations"]["3d_fullres"]
    assert (new["spacing"], new["patch_size"], new["batch_size"]) == ([1, 1, 1], [16, 16, 16], 2)
    assert new["architecture"] == architecture(RESIDUAL)
    assert new["use_mask_for_norm"] == [False]
    assert "100 %" in capsys.readouterr().out


def test_nnssl_preset_without_resampling_keeps_the_planned_spacing(base, tmp_path):
    configuration = {"spacing": None, "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
    file = nnssl_checkpoint(
        tmp_path / "a.pth",
        architecture_plans={"arch_class_name": "ResEncL", "arch_kwargs": None},
        pretrain_plan={"configurations": {"noresample": configuration}},
        recommended_downstream_patchsize=[160, 160, 160],
    )
    assert adapt("--plans_like", file) == 0
    new = read_plans(base, "nnUNetPlans_pretrained")["configurations"]["3d_fullres"]
    assert new["spacing"] == read_plans(base)["configurations"]["3d_fullres"]["spacing"]
    assert new["architecture"]["arch_kwargs"]["features_per_stage"] == [32, 64, 128, 256, 320, 320]
    assert new["patch_size"] == [160, 160, 160]


def primus() -> dict:
    return {"architecture_plans": {"arch_class_name": "PrimusM", "arch_kwargs": None}}


def harmful(key: str, value: str) -> dict:
    described = architecture(RESIDUAL)
    name = described["network_class_name"]
    kwargs = described["arch_kwargs"] | ({} if key == "class" else {key: value})
    return {"architecture_plans": {"arch_class_name": value if key == "class" else name, "arch_kwargs": kwargs}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (primus(), "networks of the class PrimusM are not supported"),
        (harmful("class", "subprocess.Popen"), "its network Popen is not one of nnU-Net's own"),
        (harmful("nonlin", "os.system"), "its nonlin os.system is not a class of torch.nn"),
        (harmful("nonlin", "torch.nn.parallel.distributed.os.system"), "is not a class of torch.nn"),
        (harmful("norm_op", "torch.nn.modules.module.OrderedDict.x"), "is not a class of torch.nn"),
        (harmful("n_stages", None), "its plans are incomplete; use another checkpoint"),
        (harmful("strides", None), "its plans are incomplete; use another checkpoint"),
        ({"recommended_downstream_patchsize": [18, 16, 16]}, "18 x 16 x 16 is not divisible by the strides"),
        ({"recommended_downstream_patchsize": [16, 16]}, "was trained in 2D"),
        ({"pretrain_plan": {"configurations": {}}}, "its plans are incomplete; use another checkpoint"),
        ({"recommended_downstream_patchsize": None}, "its plans are incomplete; use another checkpoint"),
    ],
)
def test_unsuitable_plans_of_a_checkpoint_are_refused(base, tmp_path, capsys, changes, reason):
    file = nnssl_checkpoint(tmp_path / "a.pth", **changes)
    assert reason in refusal(capsys, "--plans_like", file)
    assert not (base / "nnUNetPlans_pretrained.json").exists()


def test_channels_with_different_normalization_are_refused_for_another_number_of_channels(base, tmp_path, capsys):
    schemes = ["CTNormalization", "ZScoreNormalization"]
    configuration = {"spacing": [1, 1, 1], "normalization_schemes": schemes, "use_mask_for_norm": [False, False]}
    file = nnssl_checkpoint(tmp_path / "a.pth", pretrain_plan={"configurations": {"a": configuration}})
    line = refusal(capsys, "--plans_like", file)
    assert "normalized in different ways (CTNormalization, ZScoreNormalization), and the data set has 1" in line
    with_channels(base, 2)
    assert adapt("--plans_like", file) == 0
    new = read_plans(base, "nnUNetPlans_pretrained")["configurations"]["3d_fullres"]
    assert new["normalization_schemes"] == schemes


@pytest.mark.parametrize("options", [["-tr", "nnUNetTrainerX"], ["-tr", nnUNetTrainerUXNet.__name__]])
def test_no_plans_are_written_if_the_weights_cannot_be_adapted(base, tmp_path, capsys, options):
    file = nnssl_checkpoint(tmp_path / "a.pth")
    refusal(capsys, "--plans_like", file, "-o", tmp_path / "adapted.pth", *options)
    assert not (base / "nnUNetPlans_pretrained.json").exists()
    assert not (tmp_path / "adapted.pth").exists()


def test_plans_like_of_a_configuration_that_refers_to_others(base, tmp_path, capsys):
    plans = read_plans(base)
    plans["configurations"]["3d_fullres"]["next_stage"] = "3d_cascade_fullres"
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    plans["configurations"]["cascade"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    file = nnssl_checkpoint(tmp_path / "a.pth")
    assert adapt("--plans_like", file, "-c", "mine", "-o", tmp_path / "adapted.pth") == 0
    written = read_plans(base, "nnUNetPlans_pretrained")["configurations"]
    assert list(written) == ["mine"]
    assert not {"inherits_from", "next_stage"} & written["mine"].keys()
    assert "is a cascade" in refusal(capsys, "--plans_like", file, "-c", "cascade", "-overwrite_plans_name", "Other")


def test_printed_commands_contain_the_id_of_a_data_set_given_by_name(base, tmp_path, capsys):
    file = nnssl_checkpoint(tmp_path / "a.pth")
    assert main(["adapt_weights", "-d", "Dataset901_Tiny", "--plans_like", str(file)]) == 0
    assert "nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans_pretrained" in capsys.readouterr().out


def test_state_dict_has_no_plans(base, tmp_path, capsys):
    file = save(tmp_path / "a.pth", network().state_dict())
    assert "contains no plans" in refusal(capsys, "--plans_like", file)
