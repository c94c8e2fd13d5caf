"""Tests of curves, plots, pages of pseudo-labels and additional loggers of a training."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from nnunet_dycon.components.diagnostics import AGREEMENTS
from nnunet_dycon.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_dycon.trainers.nnUNetTrainerDKUXNet import nnUNetTrainerDKUXNet
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.nnUNetTrainerDyCON_released import nnUNetTrainerDyCON_released
from nnunet_dycon.trainers.nnUNetTrainerDyCONCoTraining import nnUNetTrainerDyCONCoTraining
from nnunet_dycon.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_dycon.trainers.nnUNetTrainerUGPL import nnUNetTrainerUGPL
from nnunet_dycon.training import pseudo_label_page
from tests.tiny import PREPROCESSED, UNLABELED
from tests.trainers.training import deterministic, make_trainer, narrow

SECONDS = {f"seconds_{part}" for part in ("data", "teacher", "student", "losses", "backward", "update")}
PSEUDO_LABELS = {"pseudo_foreground", "student_teacher_dice"}
CO_TRAINING = {"pseudo_foreground", "students_dice", "ramp"}
SHARED = PSEUDO_LABELS | CO_TRAINING | {"views_dice", "kept_fraction", "ignored_patches"}


def of_both(*terms: str) -> set[str]:
    """Return the names of terms of both networks, including the supervised loss."""
    return {f"{term}{ending}" for term in ("supervised", *terms) for ending in ("", "_second")}


CURVES = {
    nnUNetTrainerDyCON: {"supervised", "uncl", "fecl", "beta", "ramp", "ignored_patches", *PSEUDO_LABELS},
    nnUNetTrainerDyCON_released: {"supervised", "uncl", "fecl", "beta", "ramp", "ignored_patches", *PSEUDO_LABELS},
    nnUNetTrainerMeanTeacher: {"supervised", "consistency", "ramp", *PSEUDO_LABELS},
    nnUNetTrainerDKUXNet: {
        "supervised",
        "query",
        "segmentation_consistency",
        "query_consistency",
        "ramp",
        "pseudo_foreground",
        "views_dice",
    },
    nnUNetTrainerCPS: of_both("cross") | CO_TRAINING,
    nnUNetTrainerUGPL: of_both("mistake", "cross", "filtered", "contrast") | CO_TRAINING | {"kept_fraction"},
    nnUNetTrainerDyCONCoTraining: of_both("uncl", "fecl") | CO_TRAINING | {"beta", "ignored_patches"},
}


IN_DEFAULT_SUITE = (nnUNetTrainerDyCON, nnUNetTrainerUGPL)


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(base, id=base.__name__, marks=() if base in IN_DEFAULT_SUITE else pytest.mark.slow)
        for base in CURVES
    ],
)
def test_curves_have_a_value_per_epoch_and_are_plotted_and_logged(tiny, train, base):
    narrow(tiny / "nnUNet_preprocessed" / "Dataset901_Tiny")
    trainer = train(base, epochs=2)
    labeler = trainer.method.labeler
    seconds = {name.replace("teacher", labeler or "student") for name in SECONDS}
    assert trainer.curves.keys() == {"loss", *CURVES[base], *seconds}
    assert all(len(curve) == 2 for curve in trainer.curves.values())
    assert all(type(value) is float for curve in trainer.curves.values() for value in curve)
    for name in SHARED & CURVES[base]:
        for value, foreground in zip(trainer.curves[name], trainer.curves["pseudo_foreground"]):
            assert 0 <= value <= 1 or (name in AGREEMENTS and foreground == 0)  # Dice is undefined without foreground
    folder = Path(trainer.output_folder)
    plot = matplotlib.image.imread(folder / "ssl_progress.png")
    assert plot.shape[0] > 400
    log = next(folder.glob("training_log*")).read_text()
    for name in CURVES[base]:
        assert f"{name} {trainer.curves[name][-1]:.4f}" in log
    assert f"seconds a step: data {trainer.curves['seconds_data'][-1]:.3f}" in log


def test_logged_schedules_equal_those_of_the_steps(tiny, train):
    trainer = train(epochs=2)
    first = np.mean([5 * 0.1 ** (step / 6) for step in range(3)])
    assert trainer.curves["beta"][0] == pytest.approx(first)
    assert trainer.curves["ramp"][0] < trainer.curves["ramp"][1]


def test_page_of_pseudo_labels_is_drawn_with_each_latest_checkpoint_and_at_the_end(tiny):
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON, 3))
    trainer.save_every = 2
    trainer.run_training()
    pages = sorted(file.name for file in Path(trainer.output_folder).glob("pseudo_labels_*"))
    assert pages == ["pseudo_labels_epoch_0001.png", "pseudo_labels_epoch_0002.png"]
    assert trainer.method.teacher._tap.take() is None  # features are released


def test_page_shows_labels_and_entropy_of_the_teacher(tiny, train, monkeypatch):
    # A narrower network predicts most foreground at the border, where nnU-Net's sums in half precision are inaccurate.
    file = tiny / PREPROCESSED / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 32, 64]
    file.write_text(json.dumps(plans))
    drawn = {}
    monkeypatch.setattr(
        pseudo_label_page, "draw_pseudo_labels", lambda cases, names, **options: drawn.update(cases=cases, names=names)
    )
    trainer = train(epochs=1)
    assert drawn["names"] == ["background", "large", "small"]
    assert [case.case for case in drawn["cases"]] == [UNLABELED[0], UNLABELED[2], UNLABELED[3]]
    case = drawn["cases"][0]
    dataset = pseudo_label_page.UnlabeledDataset(trainer.unlabeled_cases.folder, UNLABELED)
    image = torch.from_numpy(dataset.load_image(UNLABELED[0])[:])
    with torch.no_grad():
        probabilities = trainer.method.teacher(image[None]).logits[0][0].softmax(0)  # one patch covers this case
    torch.testing.assert_close(torch.from_numpy(case.image), image[0, case.index])
    assert (case.label == probabilities.argmax(0)[case.index].numpy()).mean() > 0.99  # nnU-Net sums in half precision
    entropy = torch.special.entr(probabilities[:, case.index]).sum(0).numpy()
    np.testing.assert_allclose(case.entropy, entropy, atol=0.02)
    assert case.foreground == pytest.approx((probabilities.argmax(0) > 0).float().mean().item(), abs=0.01)


def test_settings_are_passed_to_additional_loggers_of_nnunet(tiny):
    class Recorder:
        def __init__(self):
            self.config = {}

        def log(self, key, value, step):
            pass

        def update_config(self, config):
            self.config |= config

    trainer = make_trainer(deterministic(nnUNetTrainerDyCON, 2))
    recorder = Recorder()
    trainer.logger.loggers.append(recorder)
    trainer.on_train_start()
    assert recorder.config["method_settings"]["uncl_weight"] == 0.5
    assert recorder.config["training_settings"]["num_epochs"] == 2
