"""The trainers keep to nnU-Net's contract, and notice when nnU-Net changes what they had to write again."""

import hashlib
import inspect
import pickle

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer

every_trainer = pytest.mark.parametrize("name", TRAINERS)
OWN_NETWORK = {"nnUNetTrainerDKUXNet", "nnUNetTrainerUXNet"}


@every_trainer
def test_constructor_is_nnunets_letter_for_letter(name):
    """nnU-Net looks each parameter of the subclass up among its own local variables."""
    ours = inspect.signature(trainer_class(name).__init__).parameters
    theirs = inspect.signature(nnUNetTrainer.__init__).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@every_trainer
def test_the_name_fits_nnunets_folders(name):
    """nnU-Net splits folder names at "__"; a class of nnU-Net's own name would be taken instead of ours."""
    cls = trainer_class(name)
    assert "__" not in name
    assert cls.__name__ == name
    assert issubclass(cls, SemiSupervisedTrainer) == (not TRAINERS[name].is_supervised)
    assert pickle.loads(pickle.dumps(cls)) is cls


@every_trainer
def test_the_network_is_nnunets_own_or_built_by_the_class(name):
    """So nnUNetv2_predict can load the weights; its own ones can be used without this package, too."""
    build = trainer_class(name).build_network_architecture
    assert (build is nnUNetTrainer.build_network_architecture) == (name not in OWN_NETWORK)
    ours, theirs = (inspect.signature(f).parameters for f in (build, nnUNetTrainer.build_network_architecture))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


# Methods of nnU-Net that are written again because they have no hooks inside. If one of these tests fails, read what
# nnU-Net has changed, follow it in nnunet_dycon/data (loader.make_loaders, augmenters.start) or in
# nnunet_dycon/training/step.py, and add the new hash.
KNOWN = {
    "get_dataloaders": {"5f59e2b907cfa2d1eb1e77ab2a5b8893161e7af8567fc5669c62a4810334899e"},
    "train_step": {"c8993de84c8c419f6471f619f82839931c8e7d1bae0b0eddca42951fcab90819"},
}


@pytest.mark.parametrize("method", KNOWN)
def test_the_methods_we_rewrote_have_not_changed_in_nnunet(method):
    source = inspect.getsource(getattr(nnUNetTrainer, method))
    assert hashlib.sha256(source.encode()).hexdigest() in KNOWN[method]


def test_nothing_else_is_copied_from_the_parent():
    """Less than 10 substantial lines of a method of ours stand in the method of nnU-Net's that it overrides."""
    for name, function in vars(SemiSupervisedTrainer).items():
        parent = getattr(nnUNetTrainer, name, None)
        if not inspect.isfunction(function) or parent is None or name in KNOWN:
            continue
        lines = {line.strip() for line in inspect.getsource(parent).splitlines()}
        ours = [line.strip() for line in inspect.getsource(function).splitlines()]
        copied = [line for line in ours if len(line) > 20 and line in lines]
        assert len(copied) < 10, (name, copied)
