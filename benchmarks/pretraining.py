"""Comparison of trainings with and without pretraining by masked autoencoding, on hippocampus MRI.

    python -m benchmarks.pretraining --data <Task04_Hippocampus> --work <folder> --labels 4 --seeds 0 1 2

By default, the methods are `METHODS`: nnU-Net's own trainer and the recommended trainer, each with and without
pretraining, and the latter also with the schedule of the trainers named _finetune. The scores are written to
benchmarks/results/hippocampus_pretraining.csv. `benchmarks.comparison` describes the CSV and the other arguments.

A method with +mae1000 in its name starts from a network that was pretrained for 1000 steps on the unlabeled images of
its data set, without any label: the network of the plans reconstructs patches of which 75 % are hidden in cubes (the
masked autoencoder of nnssl's BaseMAETrainer, with smaller patches and cubes). The checkpoint is saved in the layout of
nnssl and adapted with `nnunet_dycon adapt_weights`, which takes only the encoder, and passed to nnU-Net with
-pretrained_weights. Both files are in the folder pretrained of the working folder. All seeds of a method start from the
same weights.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from benchmarks.comparison import compare
from benchmarks.hippocampus import HIPPOCAMPUS
from benchmarks.preparation import LOWER_BOUND
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.system.files import replacing

METHODS = (
    LOWER_BOUND,
    f"{LOWER_BOUND}+mae1000",
    RECOMMENDED,
    f"{RECOMMENDED}+mae1000",
    f"{RECOMMENDED}+mae1000:learning_rate_factor=0.1,warmup=0.05",
)
DATA_SET = replace(HIPPOCAMPUS, table="hippocampus_pretraining", protocol="hippocampus")
HIDDEN = 0.75  # fraction of a patch
CUBE = 4  # edge of the hidden cubes, in voxels
LEARNING_RATE, BATCH = 1e-3, 4


def pretrain(dataset: str, plans_name: str, steps: int, output: Path, seed: int = 0) -> list[float]:
    """Pretrain the network of the plans on the unlabeled images, write a checkpoint, and return the loss of each step.

    The loss is the mean squared error on the hidden voxels. The images are normalized by nnU-Net's preprocessing.

    Args:
        dataset: ID of the data set, whose unlabeled cases are preprocessed for 3d_fullres.
        plans_name: plans identifier.
        steps: number of steps.
        output: the checkpoint to write, in the layout of nnssl.
        seed: seed of weights, patches and masks.
    """
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    from nnunet_dycon.data.loader import UnlabeledDataset
    from nnunet_dycon.data.unlabeled import UnlabeledCases

    cases = UnlabeledCases.of_dataset(dataset, "3d_fullres", plans_name)
    plan, images = cases.configuration, UnlabeledDataset(cases.folder, cases.identifiers())
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    architecture = plan.configuration["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
        cases.channels, cases.channels, deep_supervision=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = PolyLRScheduler(optimizer, LEARNING_RATE, steps)
    losses = []
    for step in range(steps):
        schedule.step(step)
        drawn = rng.choice(images.identifiers, BATCH)
        patches = torch.stack([_patch(np.asarray(images.load_image(case)[:]), plan.patch_size, rng) for case in drawn])
        hidden = _hidden(patches.shape[2:])
        loss = (network(patches * ~hidden) - patches)[hidden.expand_as(patches)].square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    described = {
        "arch_class_name": architecture["network_class_name"].rpartition(".")[2],
        "arch_kwargs": architecture["arch_kwargs"],
        "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
    }
    pretraining = {
        "spacing": plan.spacing, "patch_size": plan.patch_size, "normalization_schemes": plan.normalization_schemes,
        "use_mask_for_norm": plan.use_mask_for_norm,
    }  # fmt: skip
    adaptation_plan = {
        "architecture_plans": described,
        "pretrain_plan": {"configurations": {"3d_fullres": pretraining}},
        "pretrain_num_input_channels": cases.channels,
        "recommended_downstream_patchsize": plan.patch_size,
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": network.keys_to_in_proj,
        "key_to_lpe": None,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        torch.save({"network_weights": network.state_dict(), "nnssl_adaptation_plan": adaptation_plan}, partial)
    return losses


def _patch(image: np.ndarray, size: list[int], rng: np.random.Generator) -> torch.Tensor:
    """Return a patch (C, *size) at a random position, mirrored at random; smaller images are padded with 0."""
    padding = [(0, 0), *((0, max(0, wanted - there)) for wanted, there in zip(size, image.shape[1:]))]
    image = np.pad(image, padding)
    starts = [rng.integers(0, there - wanted + 1) for wanted, there in zip(size, image.shape[1:])]
    box = [slice(None), *(slice(start, start + wanted) for start, wanted in zip(starts, size))]
    axes = tuple(axis for axis in range(1, image.ndim) if rng.random() < 0.5)
    return torch.from_numpy(np.flip(image[tuple(box)], axes).copy())


def _hidden(size: torch.Size) -> torch.Tensor:
    """Return a mask (1, 1, *size) that is True in random cubes, for the whole batch."""
    cubes = torch.rand(1, 1, *(-(-length // CUBE) for length in size)) < HIDDEN
    mask = interpolate(cubes.float(), scale_factor=CUBE).bool()
    box = [slice(None), slice(None), *(slice(length) for length in size)]
    return mask[tuple(box)]


def main() -> None:
    """Run `pretrain` as a command, as `benchmarks.comparison` does before the first training of a method."""
    parser = argparse.ArgumentParser(description=pretrain.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True)
    parser.add_argument("-p", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("-o", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    losses = pretrain(arguments.d, arguments.p, arguments.steps, arguments.o)
    last = np.mean(losses[-100:])
    print(f"mean squared error on hidden voxels: {losses[0]:.3f} in the first step, {last:.3f} in the last ones")


if __name__ == "__main__":
    others = sys.argv[1:]
    compare(DATA_SET, __doc__, others if "--methods" in others else [*others, "--methods", *METHODS])
