"""Gradients of the loss terms of DyCON during a training, compared with the gradient of the supervised loss.

    python -m benchmarks.gradients hippocampus --data <Task04_Hippocampus> --work <folder> --json FILE --picture FILE

The trainers are trained as in `benchmarks.comparison`. The gradient of each loss term with respect to the student's
parameters is computed separately, every 20 steps (--every), before the step. UnCL has two terms: the consistency,
which is weighted by the uncertainty, and the entropy. For each trainer, the JSON file contains a list of these
measurements (points). A point has the entries:

- step, ramp: the step, and the ramp-up factor of the unsupervised terms;
- terms: name -> "value" (unweighted), "weight" (with ramp-up), "norm" (of the gradient, unweighted), and "cosine" (of
  the angle to the gradient of the supervised loss);
- student_entropy, teacher_entropy: mean over the voxels, in nats;
- distance: mean of the squared distance between the probabilities of student and teacher;
- uncertainty_weight: mean of the weight 2 / (e^(βH_s) + e^(βH_t)) of the consistency; 1 if all voxels are certain;
- embedding_cosine: mean cosine between the FeCL embeddings of two different patches of an image;
- embedding_rank: effective rank of these embeddings: exp of the entropy of their normalized singular values, at most
  the number of dimensions.

The entropies, the distance and the uncertainty weight are means over all images. If unlabeled images are mixed, they
are means over the labeled images only.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.comparison import ITERATIONS_PER_EPOCH
from benchmarks.hippocampus import HIPPOCAMPUS
from benchmarks.la import LEFT_ATRIUM
from benchmarks.measuring import machine, markdown, write
from benchmarks.phantom import PHANTOMS
from benchmarks.preparation import LabeledSet, Preparation, add_arguments, trainer_class
from nnunet_dycon.components.batches import StudentOutput
from nnunet_dycon.data.loader import to_batches
from nnunet_dycon.losses import uncl_loss
from nnunet_dycon.losses.entropy import softmax_and_entropy
from nnunet_dycon.system.pictures import in_default_style, new_figure, save
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from nnunet_dycon.training.step import autocast

DATA_SETS = {"hippocampus": HIPPOCAMPUS, "la": LEFT_ATRIUM, "phantom": PHANTOMS}
TRAINERS = ("nnUNetTrainerDyCON", "nnUNetTrainerDyCON_adapted")
_TERMS = {"consistency": "UnCL, consistency", "entropy": "UnCL, entropy", "fecl": "FeCL"}
_COLORS = {"supervised": "black", "consistency": "#1c7ed6", "entropy": "#e8590c", "fecl": "#1faa59"}


def train(name: str, preparation: Preparation, labeled: LabeledSet, arguments: argparse.Namespace) -> list[dict]:
    """Train a DyCON trainer and return the measured points, whose entries the module docstring describes.

    Args:
        name: name of the trainer.
        preparation: the prepared data.
        labeled: the labeled cases.
        arguments: parsed command line, with iterations, every, seed and device.
    """
    base = trainer_class(name)
    budget = {"num_epochs": arguments.iterations // ITERATIONS_PER_EPOCH, "num_iterations_per_epoch": 100}
    settings = replace(base.training_settings, **budget)
    measured = type(f"{name}_gradients", (base,), {"training_settings": settings})
    folder = preparation.work / "nnUNet_preprocessed" / preparation.dataset(labeled)
    plans = json.loads((folder / f"{preparation.plans}.json").read_text()) | {"continue_training": False}
    np.random.seed(arguments.seed)  # noqa: NPY002 (the generator of nnU-Net's loaders)
    torch.manual_seed(arguments.seed)
    dataset_json = json.loads((folder / "dataset.json").read_text())
    trainer = measured(plans, "3d_fullres", "all", dataset_json, torch.device(arguments.device))
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    points = []
    while trainer.current_epoch < trainer.num_epochs:
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        outputs = []
        for number in range(trainer.num_iterations_per_epoch):
            batch = next(trainer.dataloader_train)
            step = trainer.current_epoch * trainer.num_iterations_per_epoch + number
            if step % arguments.every == 0:
                points.append({"step": step, **measure(trainer, batch)})
            outputs.append(trainer.train_step(batch))
        trainer.on_train_epoch_end(outputs)
        trainer.current_epoch += 1
        print(f"{name}: {trainer.current_epoch} of {trainer.num_epochs} epochs", flush=True)
    trainer._lock.close()
    return points


def measure(trainer: SemiSupervisedTrainer, batch: dict) -> dict[str, Any]:
    """Measure the gradients and outputs of one training step, without updating the weights.

    Args:
        trainer: a DyCON trainer whose training has started.
        batch: a batch of its loader.

    Returns:
        A point: the entries that the module docstring describes, except "step".
    """
    method = trainer.method
    found: dict[str, Any] = {}
    hooks = [
        method.teacher.register_forward_hook(lambda module, inputs, output: found.update(teacher=output)),
        method.head.register_forward_hook(lambda module, inputs, output: found.update(embedding=output.detach())),
    ]

    def student(images: torch.Tensor) -> StudentOutput:
        found["student"] = trainer._student(images)
        return found["student"]

    labeled, unlabeled = to_batches(batch, trainer.device)
    with autocast(trainer.device):
        terms = method(student, labeled, unlabeled, trainer.progress)
    for hook in hooks:
        hook.remove()
    settings, ramp, beta = method.settings, float(terms["ramp"]), float(terms["beta"])
    logits, teacher_logits = found["student"].logits[0], found["teacher"].logits[0]
    weights = {"supervised": 1.0, "consistency": ramp * settings.uncl_weight, "fecl": ramp * settings.fecl_weight}
    losses = {"supervised": terms["supervised"], "consistency": terms["uncl"], "fecl": terms["fecl"]}
    if settings.entropy_weight:  # images are not mixed, so that logits of student and teacher belong together
        losses["consistency"] = uncl_loss(logits, teacher_logits, beta, entropy_weight=0.0)
        losses["entropy"] = terms["uncl"] - losses["consistency"]
        weights["entropy"] = weights["consistency"]
    parameters = list(trainer.network.parameters())
    gradients = {name: _gradient(loss, parameters) for name, loss in losses.items()}
    direction = gradients["supervised"]
    compared = None if settings.mixing == "none" else len(labeled)
    outputs = (logits.detach()[:compared], teacher_logits[:compared])
    (p, entropy), (q, teacher_entropy) = map(softmax_and_entropy, outputs)
    return {
        "ramp": ramp,
        "terms": {
            name: {
                "value": losses[name].item(),
                "weight": weights[name],
                "norm": gradient.norm().item(),
                "cosine": torch.nn.functional.cosine_similarity(gradient, direction, dim=0).item(),
            }
            for name, gradient in gradients.items()
        },
        "student_entropy": entropy.mean().item(),
        "teacher_entropy": teacher_entropy.mean().item(),
        "distance": (p - q).square().sum(1).mean().item(),
        "uncertainty_weight": (2 / (torch.exp(beta * entropy) + torch.exp(beta * teacher_entropy))).mean().item(),
        **_spread(found["embedding"]),
    }


def _gradient(loss: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(p).ravel() if g is None else g.ravel() for g, p in zip(found, parameters)])


def _spread(embedding: torch.Tensor) -> dict[str, float]:
    """Return "embedding_cosine" and "embedding_rank" (see module docstring) of embeddings (B, N, D) of N patches."""
    unit = torch.nn.functional.normalize(embedding.float(), dim=-1)
    number = unit.shape[1]
    cosines = (unit @ unit.transpose(1, 2)).sum((1, 2)) - number
    values = torch.linalg.svdvals(unit.flatten(0, 1))
    shares = values / values.sum()
    rank = torch.special.entr(shares).sum().exp()
    return {"embedding_cosine": (cosines / (number * (number - 1))).mean().item(), "embedding_rank": rank.item()}


def as_markdown(results: dict[str, list[dict]]) -> str:
    """Return a Markdown table with a row per trainer and term.

    - relative norm: norm of the weighted gradient of the term, divided by that of the supervised loss;
    - cosine: cosine of the angle between these two gradients.

    Both are medians over the points after the ramp-up (ramp 1), or over all points if there are none, with the
    quartiles in brackets.

    Args:
        results: name of the trainer -> points, see `measure`.
    """
    rows = []
    for name, points in results.items():
        ramped = [point["terms"] for point in points if point["ramp"] == 1] or [point["terms"] for point in points]
        for term in (term for term in ramped[0] if term != "supervised"):
            shares = [its[term]["weight"] * its[term]["norm"] / its["supervised"]["norm"] for its in ramped]
            cosines = [its[term]["cosine"] for its in ramped]
            rows.append((f"`{name}`", _TERMS[term], _quartiles(shares, ".1%"), _quartiles(cosines, "+.2f")))
    return markdown(("trainer", "term", "relative norm", "cosine"), rows)


def _quartiles(values: list[float], form: str) -> str:
    low, median, high = np.percentile(values, (25, 50, 75))
    return f"{median:{form}} [{low:{form}}, {high:{form}}]"


@in_default_style
def draw(results: dict[str, list[dict]], file: Path) -> None:
    """Write a figure with a row per trainer and four plots over the steps.

    The plots show the weighted gradient norms, the cosines to the supervised gradient, entropies and distance of
    student and teacher, and the mean cosine of the embeddings.

    Args:
        results: name of the trainer -> points, see `measure`.
        file: PNG file to write.
    """
    figure = new_figure(14, 3.2 * len(results))
    for row, (name, points) in zip(figure.subplots(len(results), 4, squeeze=False), results.items()):
        steps = [point["step"] for point in points]
        norms, cosines, uncl, embeddings = row
        for term in points[0]["terms"]:
            of_term = [point["terms"][term] for point in points]
            weighted = [its["weight"] * its["norm"] for its in of_term]
            norms.plot(steps, _smooth(weighted), color=_COLORS[term], label=term)
            if term != "supervised":
                cosines.plot(steps, _smooth([its["cosine"] for its in of_term]), color=_COLORS[term], label=term)
        norms.set(yscale="log", ylabel=name.removeprefix("nnUNetTrainer"), title="gradient norm, weighted")
        cosines.axhline(0, color="gray", linewidth=0.8)
        cosines.set(title="cosine to the supervised gradient")
        for key, color in (("student_entropy", "#e8590c"), ("teacher_entropy", "#ae3ec9"), ("distance", "#1c7ed6")):
            uncl.plot(steps, _smooth([point[key] for point in points]), color=color, label=key.replace("_", " "))
        uncl.set(yscale="log", title="student and teacher")
        embeddings.plot(steps, _smooth([point["embedding_cosine"] for point in points]), color="#1faa59")
        embeddings.set(title="mean cosine of embeddings", ylim=(-0.1, 1.02))
        for axes in (norms, cosines, uncl):
            axes.legend(fontsize=7)
        for axes in row:
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
    save(figure, file)


def _smooth(values: list[float], width: int = 5) -> np.ndarray:
    """Return the moving median over `width` values (odd), with the first and last values repeated at the ends."""
    padded = np.pad(values, width // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def main() -> None:
    """Train the trainers, write the results, and draw the figure."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("data_set", choices=DATA_SETS)
    chosen, others = chooser.parse_known_args()
    data_set = DATA_SETS[chosen.data_set]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, data_set)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--labels", type=int, choices=data_set.labels, default=data_set.labels[0])
    parser.add_argument("--iterations", type=int, default=data_set.iterations, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=20, help="steps between two points (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--picture", type=Path, help="PNG file for the figure")
    arguments = parser.parse_args(others)
    preparation, labeled = Preparation(arguments, data_set), LabeledSet(arguments.labels)
    preparation.prepare([labeled])
    os.environ |= preparation.folders | {"nnUNet_n_proc_DA": "0"}
    results = {}
    for name in arguments.trainers:
        results[name] = train(name, preparation, labeled, arguments)
        about = {"machine": machine(arguments.device), "data_set": data_set.name, "plans": preparation.plans}
        about |= {name: getattr(arguments, name) for name in ("labels", "iterations", "every", "seed")}
        write(arguments.json, results, **about)
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
