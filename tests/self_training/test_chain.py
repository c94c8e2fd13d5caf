"""Tests of `nnunet_dycon self_train`."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunet_dycon.cli import main
from nnunet_dycon.data.unlabeled import preprocess_unlabeled
from nnunet_dycon.errors import UserError
from nnunet_dycon.inference.model_folders import trainer_class
from nnunet_dycon.self_training import chain, pseudo_labels
from nnunet_dycon.system.locks import Lock
from tests.processes import ONE_THREAD
from tests.self_training.conftest import MODEL, other_plans
from tests.self_training.test_pseudo_labels import pseudo_label
from tests.tiny import LABELED, UNLABELED, few_samples, set_environment
from tests.trainers.training import deterministic, draw_no_pictures, make_trainer, weights

TRAINER = "nnUNetTrainerDyCON_smoke"
NAMES = ["Dataset901_Tiny", "Dataset911_Tiny_PseudoLabels", "Dataset912_Tiny_PseudoLabels"]


def self_train(*options: object, ids: str = "911,912", trainer: str = TRAINER) -> int:
    arguments = ["self_train", "-d", 901, "-c", "3d_fullres", "--ids", ids, "-tr", trainer, "--folds", 0, 1]
    return main([*map(str, arguments), "-device", "cpu", "-np", "0", "--disable_tta", *map(str, options)])


@pytest.fixture
def commands(own, copied, monkeypatch) -> list[str]:
    """Return the list of the commands that are run: trainings copy a trained fold, and pseudo_label runs here."""
    monkeypatch.setattr(pseudo_labels, "draw_or_warn", lambda *arguments: None)
    ran = []
    trained = own / "trained"
    shutil.copytree(own / MODEL, trained)

    def run(command):
        ran.append(" ".join(command[:2] if command[0] == "nnunet_dycon" else command))
        name = command[0]
        if name == "nnunet_dycon":
            assert main(command[1:]) == 0
        elif name == "nnUNetv2_extract_fingerprint":
            fingerprint = next((own / "nnUNet_preprocessed").glob(f"Dataset{command[2]}*")) / "dataset_fingerprint.json"
            fingerprint.write_text('{"spacings": []}')
        elif name == "nnUNetv2_preprocess":
            (own / "nnUNet_preprocessed" / NAMES[int(command[2]) - 910] / "nnUNetPlans_3d_fullres").mkdir(exist_ok=True)
        elif name == "nnUNetv2_train":
            dataset = next(folder.name for folder in (own / "nnUNet_raw").glob(f"Dataset{command[1]}*"))
            model = Path(str(own / MODEL).replace(NAMES[0], dataset))
            model.mkdir(parents=True, exist_ok=True)
            for file in ("dataset.json", "plans.json"):
                shutil.copy(trained / file, model)
            shutil.copytree(trained / f"fold_{command[3]}", model / f"fold_{command[3]}", dirs_exist_ok=True)
            validation = model / f"fold_{command[3]}" / "validation"
            validation.mkdir(exist_ok=True)
            (validation / "summary.json").write_text("{}")

    monkeypatch.setattr(chain, "run", run)
    return ran


def train(dataset: int, fold: int, *options: str) -> str:
    command = f"nnUNetv2_train {dataset} 3d_fullres {fold} -tr {TRAINER} -p nnUNetPlans -device cpu"
    return " ".join((command, *options))


ROUNDS = [
    command
    for number in (911, 912)
    for command in (
        "nnunet_dycon pseudo_label",
        f"nnUNetv2_extract_fingerprint -d {number} -np 1 --clean",
        f"nnUNetv2_preprocess -d {number} -plans_name nnUNetPlans -c 3d_fullres -np 1",
        train(number, 0),
        train(number, 1),
    )
]


def test_chain_trains_labels_and_trains_again(own, commands, capsys):
    shutil.rmtree(own / MODEL / "fold_1")
    assert self_train() == 0
    assert commands == [train(901, 1), *ROUNDS]
    printed = capsys.readouterr().out
    assert "[1/12] " + train(901, 0) + "  (finished by an earlier call)" in printed
    assert f"nnUNetv2_predict -d 912 -c 3d_fullres -tr {TRAINER} -p nnUNetPlans -f 0 1" in printed
    records = [json.loads((own / "nnUNet_raw" / name / "pseudo_labels.json").read_text()) for name in NAMES[1:]]
    assert [record["rated_by"] for record in records] == ["expected_dice", "previous_dice"]
    for before, record in zip(NAMES, records):
        assert {member["model"].split("/")[0] for member in record["members"]} == {before}


@pytest.mark.parametrize("is_half_done", [False, True])
@pytest.mark.parametrize("stage", range(5))
def test_interrupted_chain_resumes(own, commands, monkeypatch, stage, is_half_done):
    run = chain.run

    def interrupted(command):
        if len(commands) == stage:
            if is_half_done:
                run(command)  # interrupted before the stage is known as finished
            raise KeyboardInterrupt
        run(command)

    monkeypatch.setattr(chain, "run", interrupted)
    assert self_train(ids="911") == 130
    monkeypatch.setattr(chain, "run", run)
    assert self_train(ids="911") == 0
    # Repeated: the interrupted stage, unless it left its result, and pseudo_label, which then changes nothing.
    assert list(dict.fromkeys(commands)) == ROUNDS[:5]
    assert len([command for command in commands if command.startswith("nnUNetv2_train")]) == 2


def test_resumed_training_continues_and_finished_training_is_validated(own, commands):
    fold = own / MODEL / "fold_0"
    shutil.rmtree(fold / "validation")
    (own / MODEL / "fold_1" / "checkpoint_final.pth").rename(own / MODEL / "fold_1" / "checkpoint_latest.pth")
    shutil.rmtree(own / MODEL / "fold_1" / "validation")
    assert self_train(ids="911") == 0
    assert commands[:2] == [train(901, 0, "--val"), train(901, 1, "--c")]


def test_chain_resumes_a_training_that_had_just_been_started(own, commands):
    shutil.rmtree(own / MODEL)
    (own / MODEL / "fold_0").mkdir(parents=True)
    assert self_train(ids="911") == 0
    assert commands[0] == train(901, 0)


def test_dry_run_only_prints_the_commands(own, commands, capsys):
    before = sorted(own.rglob("*"))
    assert self_train("--dry_run", "--keep", "50%", "--confidence", 0.7) == 0
    assert commands == []
    assert sorted(own.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert "--keep 50% --confidence 0.7 --disable_tta -p nnUNetPlans -device cpu -np 0 --previous 911" in lines[7]


def foreign_data_set(own: Path) -> None:
    (own / "nnUNet_raw" / NAMES[1]).mkdir()


def models_of_an_earlier_data_set(own: Path) -> None:
    (own / "nnUNet_results" / NAMES[1]).mkdir()


BAD = [
    (foreign_data_set, [], "911,912", "was not written by self_train with these options"),
    (lambda own: (own / "nnUNet_raw/Dataset912_Other").mkdir(), [], "911,912", "choose another with --ids"),
    (lambda own: None, [], "911,911", "given twice"),
    (lambda own: None, [], "901", "is that of Dataset901_Tiny"),
    (lambda own: None, ["-p", "none"], "911", "none.json does not exist"),
    (other_plans, [], "911", "differs from the plans of"),
    (lambda own: None, ["--keep", "100%"], "911", "with --keep 100%, all 4 unlabeled cases"),
    (lambda own: None, ["--keep", "4"], "911", "with --keep 4, all 4 unlabeled cases"),
    (lambda own: None, [], "1000", "nnU-Net accepts IDs from 1 to 999"),
    (lambda own: None, ["-c", "3d_lowres"], "911", "has no configuration 3d_lowres"),
    (lambda own: None, ["--folds", "x"], "911", "must be numbers, or all"),
    (lambda own: None, ["--confidence", "5"], "911", "--confidence must be above"),
    (models_of_an_earlier_data_set, [], "911", "has models of an earlier data set of this name"),
    (lambda own: None, ["-tr", "nnUNetTrainerDyCONN"], "911", "nnUNetTrainerDyCONN"),
    (lambda own: None, ["-tr", "nnUNetTrainerDyCON_paper"], "911", "was removed"),
    (lambda own: None, ["-step_size", "2"], "911", "step size"),
]


@pytest.mark.parametrize(("spoil", "options", "ids", "message"), BAD, ids=[message for *_, message in BAD])
def test_invalid_input_is_reported_in_one_line_before_work_starts(own, commands, capsys, spoil, options, ids, message):
    spoil(own)
    assert self_train(*options, ids=ids) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert commands == []


def test_chain_after_a_new_training_of_the_first_model_is_refused(own, commands, capsys):
    assert self_train(ids="911") == 0
    checkpoint = own / MODEL / "fold_0" / "checkpoint_final.pth"
    shutil.copy2(own / MODEL / "fold_1" / "checkpoint_final.pth", checkpoint)
    capsys.readouterr()
    assert self_train(ids="911") == 2
    assert "was not written by self_train with these options and models, and these" in capsys.readouterr().err


def test_chains_that_share_a_data_set_exclude_each_other(own, commands, capsys):
    lock = Lock(own / "nnUNet_raw" / f".{NAMES[0]}.self_train.lock", "self-training with Dataset901_Tiny")
    lock.acquire()
    assert self_train(ids="912") == 1
    assert "self-training with Dataset901_Tiny" in capsys.readouterr().err
    lock.close()
    assert commands == []


def test_removed_preprocessed_folder_is_made_again(own, commands):
    assert self_train(ids="911") == 0
    del commands[:]
    shutil.rmtree(own / "nnUNet_preprocessed" / NAMES[1] / "nnUNetPlans_3d_fullres")
    assert self_train(ids="911") == 0
    assert commands == [ROUNDS[0], ROUNDS[2]]


def test_chain_with_other_options_or_images_is_refused(own, commands, capsys):
    assert self_train("--keep", "1", ids="911") == 0
    unlabeled = own / "nnUNet_raw" / NAMES[0] / "imagesUn"
    for options in (["--keep", "1%"], ["--keep", "1", "-step_size", "0.9"], ["--keep", "1"]):
        if options == ["--keep", "1"]:
            shutil.copy(unlabeled / f"{UNLABELED[0]}_0000.nii.gz", unlabeled / "new_0000.nii.gz")
        capsys.readouterr()
        assert self_train(*options, ids="911") == 2
        assert "was not written by self_train with these options" in capsys.readouterr().err


def test_failing_command_is_named_and_environment_is_complete(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"python -c .* failed with exit code 3; .* repeat the call"):
        chain.run(["python", "-c", "import sys; sys.exit(3)"])
    monkeypatch.setenv("nnUNet_extTrainer", "/elsewhere")
    file = tmp_path / "seen"
    chain.run(["python", "-c", f"import os; open({str(file)!r}, 'w').write(os.environ['nnUNet_extTrainer'])"])
    assert file.read_text().split(":")[0].endswith("discovery")
    assert file.read_text().split(":")[1] == "/elsewhere"


def preprocess_all() -> None:
    with few_samples():
        extract_fingerprints([911], num_processes=1, check_dataset_integrity=False)
    preprocess([911], "nnUNetPlans", ["3d_fullres"], [1])
    preprocess_unlabeled("911", "3d_fullres")


def test_nnunets_trainer_and_ours_train_on_the_result_and_start_from_each_other(own, copied, monkeypatch):
    """The validation cases are annotated, and the weights fit those of a training on the annotated cases alone."""
    draw_no_pictures(monkeypatch)
    assert pseudo_label(own, "--keep", 2, "--confidence", 0.5) == 0
    preprocess_all()
    for trainer in ("nnUNetTrainer", "nnUNetTrainerWeakToStrong_smoke"):
        made = make_trainer(trainer_class(trainer), fold=1, dataset=NAMES[1])
        made.num_epochs, made.num_iterations_per_epoch, made.num_val_iterations_per_epoch = 1, 1, 1
        made.initialize()
        train, val = made.do_split()
        assert set(val) <= set(LABELED)
        assert sorted(train) == sorted({*LABELED, *(name for name in train if name.startswith("pseudo_"))} - set(val))
        assert len([name for name in train if name.startswith("pseudo_")]) == 2
        load_pretrained_weights(made.network, str(own / MODEL / "fold_0" / "checkpoint_final.pth"))
        made.run_training()
    file = Path(made.output_folder) / "checkpoint_final.pth"
    annotated = make_trainer(trainer_class("nnUNetTrainerWeakToStrong_smoke"), fold=0)
    annotated.initialize()
    load_pretrained_weights(annotated.network, str(file))
    expected = torch.load(file, weights_only=False)["network_weights"]
    taken = {name for name, tensor in annotated.network.state_dict().items() if torch.equal(tensor, expected[name])}
    assert {name for name in expected if ".seg_layers." not in name} <= taken
    assert "decoder.seg_layers.2.weight" not in taken  # heads start anew


def test_held_back_labels_have_no_influence_on_the_weights_of_a_round(own, monkeypatch):
    """From prediction to the weights of the training; as a control, an annotated label does have influence."""
    draw_no_pictures(monkeypatch)
    raw = own / "nnUNet_raw"

    def trained() -> dict[str, torch.Tensor]:
        for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
            shutil.rmtree(own / folder / NAMES[1], ignore_errors=True)
        assert pseudo_label(own, "-f", 0, "--keep", 2) == 0
        preprocess_all()
        trainer = make_trainer(deterministic(trainer_class("nnUNetTrainerWeakToStrong"), 1), dataset=NAMES[1])
        trainer.run_training()
        return weights(trainer)

    def write_labels(folder: str, cases: list[str], value: int) -> None:
        (raw / NAMES[0] / folder).mkdir(exist_ok=True)
        for case in cases:
            volume = sitk.GetImageFromArray(np.full((24, 32, 40), value, np.uint8))
            sitk.WriteImage(volume, str(raw / NAMES[0] / folder / f"{case}.nii.gz"))

    found = []
    for value in (0, 1):
        write_labels("labelsUn", UNLABELED, value)
        write_labels("labelsTs", ["test_00", "test_01"], value)
        found.append(trained())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    write_labels("labelsTr", LABELED[:1], 1)
    changed = trained()
    assert not all(torch.equal(tensor, changed[name]) for name, tensor in found[0].items())


@pytest.mark.slow
def test_killed_chain_with_nnunets_commands_can_be_repeated(root, tmp_path, monkeypatch):
    """The chain runs the installed commands, and is killed once while it trains and once while it predicts."""
    own = tmp_path / "own"
    shutil.copytree(root, own)
    set_environment(monkeypatch, own)
    monkeypatch.setenv("PYTHONPATH", ONE_THREAD)
    shutil.rmtree(own / MODEL)
    command = [Path(sys.executable).with_name("nnunet_dycon"), "self_train", "-d", "901", "--ids", "911"]
    command += ["-tr", TRAINER, "--folds", "0", "1", "-device", "cpu", "-np", "0", "--disable_tta"]
    for seen in (f"{MODEL}/fold_0/training_log_*.txt", "nnUNet_raw/.*.predictions/member_0/*.nii.gz"):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while not list(own.glob(seen)):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            process.kill()
            process.wait()
    assert self_train(ids="911") == 0
    for name in NAMES[:2]:
        for fold in (0, 1):
            model = str(own / MODEL).replace(NAMES[0], name)
            assert (Path(model) / f"fold_{fold}" / "validation" / "summary.json").is_file()
