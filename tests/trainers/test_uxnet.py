"""Tests of trainers with 3D UX-Net or DK-UXNet: plans, optimizer, pretrained weights, prediction."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon.cli import main
from nnunet_dycon.networks import DKUXNet, UXNet
from nnunet_dycon.trainers.nnUNetTrainerDKUXNet import nnUNetTrainerDKUXNet
from nnunet_dycon.trainers.nnUNetTrainerUXNet import nnUNetTrainerUXNet
from nnunet_dycon.training.settings import TrainingSchedule
from tests.tiny import PREPROCESSED, tiny_volume
from tests.trainers.training import make_trainer, narrow


@pytest.fixture
def small(tiny) -> Path:
    narrow(tiny / PREPROCESSED)
    return tiny


def test_queries_are_released_after_the_step(small, train):
    trainer = train(nnUNetTrainerDKUXNet, epochs=1)
    assert trainer._queries.take() is None  # otherwise they would keep the whole graph in memory


def test_optimizer_is_that_of_the_release_with_the_schedule_of_nnunet(small):
    for trainer_class in (nnUNetTrainerDKUXNet, nnUNetTrainerUXNet):
        trainer = make_trainer(trainer_class)
        trainer.initialize()
        assert isinstance(trainer.optimizer, torch.optim.AdamW)
        (group,) = trainer.optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (1e-4, 1e-2)
        assert {id(p) for p in group["params"]} == {id(p) for p in trainer.network.parameters()}
        trainer.lr_scheduler.step(500)
        assert group["lr"] == pytest.approx(1e-4 * 0.5**0.9)


def test_network_is_built_from_plans_and_settings(small):
    class FewQueries(nnUNetTrainerDKUXNet):
        method_settings = type(nnUNetTrainerDKUXNet.method_settings)(queries=9)

    trainer = make_trainer(FewQueries)
    trainer.initialize()
    assert type(trainer.network) is DKUXNet
    assert trainer.network.kmax.centers.shape == (9, 8)
    assert trainer.network.encoder.output_channels == [4, 6, 8, 8]
    assert trainer.settings["method_settings"]["queries"] == 9
    assert trainer.settings["optimizer_settings"] == {"learning_rate": 1e-4, "weight_decay": 1e-2}
    supervised = make_trainer(nnUNetTrainerUXNet)
    supervised.initialize()
    assert type(supervised.network) is UXNet


def test_fewer_queries_than_classes_raise(small):
    class OneQuery(nnUNetTrainerDKUXNet):
        method_settings = type(nnUNetTrainerDKUXNet.method_settings)(queries=1)

    message = "OneQuery cannot build its network: each class needs a query of its own: there are 3 classes, but only 1"
    with pytest.raises(NotImplementedError, match=message) as refused:
        make_trainer(OneQuery).run_training()
    assert refused.value.code.startswith("nnunet_dycon: error: ")


def test_single_region_raises_for_dkuxnet_only(small):
    file = small / PREPROCESSED / "dataset.json"
    description = json.loads(file.read_text())
    description |= {"labels": {"background": 0, "all": [1, 2]}, "regions_class_order": [1]}
    file.write_text(json.dumps(description))
    with pytest.raises(NotImplementedError, match="nnUNetTrainerDKUXNet needs at least two classes") as refused:
        make_trainer(nnUNetTrainerDKUXNet)
    assert "\n" not in refused.value.code
    make_trainer(nnUNetTrainerUXNet)


def test_dkuxnet_without_deep_supervision_raises(small):
    trainer = make_trainer(nnUNetTrainerDKUXNet)
    trainer.enable_deep_supervision = False
    with pytest.raises(NotImplementedError, match="nnUNetTrainerDKUXNet needs deep supervision"):
        trainer.initialize()


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerDKUXNet, nnUNetTrainerUXNet])
def test_pretrained_weights_may_have_another_number_of_classes(small, tmp_path, trainer_class):
    source, target = make_trainer(trainer_class), make_trainer(trainer_class)
    source.label_manager._all_labels.append(7)
    for trainer in (source, target):
        trainer.initialize()
    assert source.label_manager.num_segmentation_heads == target.label_manager.num_segmentation_heads + 1
    torch.save({"network_weights": source.network.state_dict()}, tmp_path / "weights.pth")
    load_pretrained_weights(target.network, str(tmp_path / "weights.pth"))
    for (name, there), here in zip(source.network.state_dict().items(), target.network.state_dict().values()):
        assert torch.equal(there, here) if "seg_layers" not in name else there.shape != here.shape


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerDKUXNet, nnUNetTrainerUXNet])
def test_plans_without_stages_raise(small, trainer_class):
    file = small / PREPROCESSED / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    del architecture["arch_kwargs"]["strides"], architecture["arch_kwargs"]["features_per_stage"]
    file.write_text(json.dumps(plans))
    manager = PlansManager(str(file))
    with pytest.raises(NotImplementedError, match="needs features_per_stage, strides in the plans, but"):
        trainer_class.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 3)


class ShortUXNet(nnUNetTrainerUXNet):
    training_settings = TrainingSchedule(num_epochs=1, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1)


def test_supervised_training_on_regions_requires_no_unlabeled_cases(small):
    shutil.rmtree(small / PREPROCESSED / "nnUNetPlans_3d_fullres_unlabeled")
    shutil.rmtree(small / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn")
    file = small / PREPROCESSED / "dataset.json"
    regions = {"labels": {"background": 0, "both": [1, 2], "small": [2]}, "regions_class_order": [1, 2]}
    file.write_text(json.dumps(json.loads(file.read_text()) | regions))
    trainer = make_trainer(ShortUXNet)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", -1))
    again = make_trainer(ShortUXNet)
    maybe_load_checkpoint(again, continue_training=False, validation_only=True)
    torch.testing.assert_close(again.network.state_dict(), trainer.network.state_dict())


def save_model(trainer_class: type, base: Path) -> tuple[nnUNetTrainer, Path]:
    """Return an untrained trainer and its model folder."""
    trainer = make_trainer(trainer_class, fold=0)
    trainer.initialize()
    folder = Path(trainer.output_folder)
    for name, source in (("plans.json", "nnUNetPlans.json"), ("dataset.json", "dataset.json")):
        shutil.copy(base / source, folder.parent / name)
    trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    return trainer, folder.parent


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerDKUXNet, nnUNetTrainerUXNet])
def test_nnunet_predicts_with_the_network(small, trainer_class):
    """As nnUNetv2_predict: nnU-Net looks up the trainer by its name and builds the network with it."""
    trainer, model = save_model(trainer_class, small / PREPROCESSED)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    assert type(predictor.network) is type(trainer.network)
    torch.testing.assert_close(predictor.network.state_dict(), trainer.network.state_dict(), rtol=0, atol=0)
    image = tiny_volume(0)[0][None]
    assert predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]}).shape == image.shape[1:]


def test_export_to_plain_nnunet_raises_for_other_networks(small, capsys):
    _, model = save_model(nnUNetTrainerUXNet, small / PREPROCESSED)
    assert main(["export_vanilla", "-m", str(model), "-o", str(small / "vanilla")]) == 1
    assert "nnU-Net cannot build the network of nnUNetTrainerUXNet" in capsys.readouterr().err
