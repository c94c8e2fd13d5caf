"""Tests of the compatibility of trainers with nnU-Net: signatures, names and reimplemented methods."""

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
def test_constructor_has_the_signature_of_nnunets(name):
    """nnU-Net reads the parameters of the subclass from local variables of its own constructor."""
    ours = inspect.signature(trainer_class(name).__init__).parameters
    theirs = inspect.signature(nnUNetTrainer.__init__).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@every_trainer
def test_names_of_trainers_are_valid(name):
    """nnU-Net splits folder names at "__", and it would prefer its own class of the same name."""
    cls = trainer_class(name)
    assert "__" not in name
    assert cls.__name__ == name
    assert issubclass(cls, SemiSupervisedTrainer) == (not TRAINERS[name].is_supervised)
    assert pickle.loads(pickle.dumps(cls)) is cls


@every_trainer
def test_network_is_built_by_nnunet_or_by_a_static_method(name):
    """Required by nnUNetv2_predict. Networks of nnU-Net can be used without this package, too."""
    build = trainer_class(name).build_network_architecture
    assert (build is nnUNetTrainer.build_network_architecture) == (name not in OWN_NETWORK)
    ours, theirs = (inspect.signature(f).parameters for f in (build, nnUNetTrainer.build_network_architecture))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


# Methods of nnU-Net that are reimplemented because they have no hooks inside. If one of these tests fails, read the
# changes in nnU-Net, make the same changes in nnunet_dycon/data (loader.make_loaders, augmenters.start) or in
# nnunet_dycon/training/step.py, and add the new hash.
KNOWN = {
    "get_dataloaders": {"5f59e2b907cfa2d1eb1e77ab2a5b8893161e7af8567fc5669c62a4810334899e"},
    "train_step": {"c8993de84c8c419f6471f619f82839931c8e7d1bae0b0eddca42951fcab90819"},
}


@pytest.mark.parametrize("method", KNOWN)
def test_reimplemented_methods_have_not_changed_in_nnunet(method):
    source = inspect.getsource(getattr(nnUNetTrainer, method))
    assert hashlib.sha256(source.encode()).hexdigest() in KNOWN[method]


def test_other_methods_are_not_copied_from_nnunet():
    """Each overriding method has fewer than 10 long lines in common with the method of nnU-Net that it overrides."""
    for name, function in vars(SemiSupervisedTrainer).items():
        parent = getattr(nnUNetTrainer, name, None)
        if not inspect.isfunction(function) or parent is None or name in KNOWN:
            continue
        lines = {line.strip() for line in inspect.getsource(parent).splitlines()}
        ours = [line.strip() for line in inspect.getsource(function).splitlines()]
        copied = [line for line in ours if len(line) > 20 and line in lines]
        assert len(copied) < 10, (name, copied)
