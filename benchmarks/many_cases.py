"""Start-up and memory of a training with many unlabeled cases, compared to nnU-Net's own trainer.

    python -m benchmarks.many_cases --work <folder> [--cases 100 10000] [--json FILE]

The data set has 5 labeled phantoms of 24 x 24 x 24 voxels. Further unlabeled cases are hard links to the files of one
case, so only the number of files grows. Each trainer is measured in its own process, on the CPU with one thread:

- start-up: seconds from the construction of the trainer to its first batch, without the import of nnU-Net;
- memory: peak resident memory of the process until the first batch;
- epoch: seconds of the second epoch, which has 3 steps like the first one;
- preprocessing: seconds of `preprocess_unlabeled` per case, with one process, for 200 cases.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.measuring import machine, markdown, write
from benchmarks.preparation import SUPERVISED, trainer_class
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.system.environment import FOLDER_VARIABLES
from nnunet_dycon.system.processes import peak_memory

DATASET, CONFIGURATION, LABELED, PREPROCESSED, STEPS = "Dataset777_Many", "3d_fullres", 5, 200, 3


def environment(work: Path) -> dict[str, str]:
    folders = {name: str(work / name) for name in FOLDER_VARIABLES}
    return {**folders, "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}


def prepare(work: Path) -> None:
    """Write, plan and preprocess the data set with `PREPROCESSED` unlabeled cases.

    An earlier data set is replaced. The seconds of `preprocess_unlabeled` per case are written to the file
    seconds_per_case.

    Args:
        work: folder for the data and the file seconds_per_case.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    from nnunet_dycon.data.unlabeled import preprocess_unlabeled
    from nnunet_dycon.demo.phantom import write_dataset

    raw = work / "nnUNet_raw" / DATASET
    for folder in FOLDER_VARIABLES:
        shutil.rmtree(work / folder / DATASET, ignore_errors=True)
    write_dataset(raw, 0, {"labeled": LABELED, "unlabeled": 1}, shape=(24, 24, 24), lesion_radii=(2, 4))
    source = next((raw / "imagesUn").iterdir())
    for number in range(PREPROCESSED):
        os.link(source, raw / "imagesUn" / f"many_{number:05d}_0000.nii.gz")
    source.unlink()
    extract_fingerprints([777], num_processes=1)
    os.environ["nnUNet_n_proc_DA"] = "1"  # nnU-Net's planner fails with 0
    plan_experiments([777])
    file = work / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    planned = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    planned["features_per_stage"] = [8] * planned["n_stages"]
    file.write_text(json.dumps(plans))
    preprocess([777], configurations=[CONFIGURATION], num_processes=[1])
    start = time.perf_counter()
    preprocess_unlabeled("777", CONFIGURATION)
    (work / "seconds_per_case").write_text(str((time.perf_counter() - start) / PREPROCESSED))


def repeat(work: Path, cases: int) -> None:
    """Change the number of unlabeled cases, both in the raw and in the preprocessed data.

    Added cases are hard links to the files of the first case. Surplus cases are deleted. manifest.json, the file in the
    folder of the preprocessed unlabeled cases that lists their image files, is rewritten.

    Args:
        work: folder with the data that `prepare` wrote.
        cases: new number of unlabeled cases, at least 1.
    """
    raw = work / "nnUNet_raw" / DATASET / "imagesUn"
    folder = next((work / "nnUNet_preprocessed" / DATASET).glob("*_unlabeled"))
    names = {f"many_{number:05d}" for number in range(cases)}
    manifest = json.loads((folder / "manifest.json").read_text())
    known, first = set(manifest["files"]), "many_00000"
    for case in names ^ known:
        files = [(raw, "_0000.nii.gz"), *((folder, ending) for ending in (".b2nd", "_seg.b2nd", ".pkl"))]
        for place, ending in files:
            if case in names:
                os.link(place / f"{first}{ending}", place / f"{case}{ending}")
            else:
                (place / f"{case}{ending}").unlink()
    (_, size), *_ = manifest["files"][first]
    manifest["files"] = {case: [[f"{case}_0000.nii.gz", size]] for case in sorted(names)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure(name: str) -> dict[str, float]:
    """Measure a trainer with the class name `name` in this process, as the module docstring describes.

    Returns:
        "startup" (seconds), "bytes" (peak resident memory) and "epoch" (seconds).
    """
    torch.set_num_threads(1)
    trainer_type = trainer_class(name)
    base = Path(os.environ["nnUNet_preprocessed"]) / DATASET
    plans = json.loads((base / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((base / "dataset.json").read_text())
    start = time.perf_counter()
    trainer = trainer_type(plans, CONFIGURATION, "all", dataset_json, torch.device("cpu"))
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    started = time.perf_counter() - start
    memory = peak_memory()
    trainer.num_iterations_per_epoch, seconds = STEPS, 0.0
    for _ in range(2):
        begin = time.perf_counter()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        outputs = [trainer.train_step(batch)]
        outputs += [trainer.train_step(next(trainer.dataloader_train)) for _ in range(STEPS - 1)]
        trainer.on_train_epoch_end(outputs)
        seconds, batch = time.perf_counter() - begin, next(trainer.dataloader_train)
    return {"startup": started, "bytes": memory, "epoch": seconds}


def as_markdown(results: dict) -> str:
    """Return a Markdown table with a row per trainer and number of unlabeled cases.

    The measured columns are start-up in s, peak memory in MiB, and epoch in s, see the module docstring.

    Args:
        results: "trainings" -> name of the trainer -> number of unlabeled cases -> result of `measure`.
    """
    rows = [
        [name, cases, f"{its['startup']:.1f}", f"{its['bytes'] / 2**20:.0f}", f"{its['epoch']:.1f}"]
        for name, by_cases in results["trainings"].items()
        for cases, its in by_cases.items()
    ]
    columns = ["trainer", "unlabeled cases", "start-up, s", "peak memory, MiB", f"epoch of {STEPS} steps, s"]
    return markdown(columns, rows)


def main() -> None:
    """Prepare the data, measure both trainers with each number of cases, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data; its data set 777 is overwritten")
    parser.add_argument("--cases", type=int, nargs="+", default=[100, 10_000], help="numbers of unlabeled cases")
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # trainer to measure in this process
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    os.environ |= environment(work)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    prepare(work)
    trainings: dict[str, dict[int, dict]] = {SUPERVISED: {}, RECOMMENDED: {}}
    for cases in arguments.cases:
        repeat(work, cases)
        for name in trainings:
            command = [sys.executable, "-m", "benchmarks.many_cases", "--work", str(work), "--measure", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            trainings[name][cases] = json.loads(output.splitlines()[-1])
    results = {"trainings": trainings, "preprocessing": float((work / "seconds_per_case").read_text())}
    if arguments.json:
        write(arguments.json, results, machine=machine("cpu"))
    print(as_markdown(results))
    print(f"preprocess_unlabeled: {results['preprocessing']:.3f} s per case")


if __name__ == "__main__":
    main()
