"""Parameters, memory and time of UXNet and DKUXNet, compared to nnU-Net's PlainConvUNet.

    python -m benchmarks.networks [--features 32 64 128 256 320] [--patch 96 96 96] [--timed_patch 32 32 32]

- The networks have one input channel, two classes, strides of 2 and deep supervision. A batch has two images.
- Memory is the size of the tensors that the forward pass saves for the backward pass, without parameters, for patches
  of --patch with autocast to 16 bits. It is computed from the shapes of the tensors, without a GPU. Each storage is
  counted once.
- Time is the measured CPU time of a forward and backward pass with patches of --timed_patch in float32, with one
  thread. The networks are run alternately. Times are medians, with the quartiles in brackets; the first pass is a
  warm-up.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.measuring import machine, markdown, summary, with_quartiles, write
from benchmarks.pretended_gpu import half_precision
from nnunet_dycon.networks import DKUXNet, UXNet

IMAGES, CLASSES = 2, 2


def build(name: str, features: list[int]) -> nn.Module:
    """Build a network with one input channel, two classes, strides of 2 and deep supervision.

    Args:
        name: name of its class: "PlainConvUNet", "UXNet" or "DKUXNet".
        features: number of features of each stage.
    """
    stages = len(features)
    planned: dict[str, Any] = {
        "features_per_stage": features,
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "conv_op": nn.Conv3d,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    if name == "PlainConvUNet":
        return PlainConvUNet(1, stages, num_classes=CLASSES, n_conv_per_stage=2, n_conv_per_stage_decoder=2, **planned)
    return {"UXNet": UXNet, "DKUXNet": DKUXNet}[name](1, CLASSES, **planned)


def kept_bytes(name: str, features: list[int], patch: list[int]) -> int:
    """Return the size in bytes of the tensors that the forward pass saves for the backward pass, without parameters.

    The size is computed, not measured: the network runs on fake CUDA tensors, with the autocast of a GPU to 16 bits.

    Args:
        name: name of the network's class, see `build`.
        features: number of features of each stage.
        patch: shape of a patch in voxels. The batch has `IMAGES` patches.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(), torch.device("cuda"):
        network = build(name, features)
        images = torch.randn(IMAGES, 1, *patch)
        with half_precision(), saved_tensors_hooks(keep, lambda tensor: tensor):
            network(images)
        for parameter in network.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in kept.values())


def take_passes(networks: dict[str, nn.Module], patch: list[int], repeats: int) -> dict[str, dict]:
    """Measure the CPU time of a forward and backward pass of each network.

    The networks are run alternately. The first pass of each is a warm-up and is not measured.

    Args:
        networks: name -> network.
        patch: shape of a patch in voxels. The batch has `IMAGES` patches.
        repeats: number of measured passes of each network.

    Returns:
        Name -> result of `summary`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    images = torch.randn(IMAGES, 1, *patch)
    for repeat in range(repeats + 1):
        for name, network in networks.items():
            start = time.process_time()
            torch.stack([level.square().mean() for level in network(images)]).sum().backward()
            if repeat > 0:
                seconds[name].append(time.process_time() - start)
    return {name: summary(values) for name, values in seconds.items()}


def main() -> None:
    """Compute or measure parameters, memory and time of the networks, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256, 320])
    parser.add_argument("--patch", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--timed_patch", type=int, nargs=3, default=[32, 32, 32])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ("PlainConvUNet", "UXNet", "DKUXNet")
    memory = {name: kept_bytes(name, arguments.features, arguments.patch) for name in names}
    networks = {name: build(name, arguments.features) for name in names}
    times = take_passes(networks, arguments.timed_patch, arguments.repeats)
    results = {
        name: times[name] | {"bytes_kept": memory[name], "parameters": sum(p.numel() for p in network.parameters())}
        for name, network in networks.items()
    }
    if arguments.json:
        patches = {"patch": arguments.patch, "timed_patch": arguments.timed_patch, "features": arguments.features}
        write(arguments.json, results, machine=machine("cpu"), **patches)
    print(as_markdown(results))


def as_markdown(results: dict[str, dict]) -> str:
    """Return a Markdown table with a row per network.

    - million parameters: number of parameters;
    - GB saved: computed size of the tensors that the forward pass saves for the backward pass;
    - seconds per pass: measured CPU time of a forward and backward pass, median with quartiles;
    - relative memory, relative time: "GB saved" and "seconds per pass" divided by those of the first network.

    Args:
        results: name of the network -> result of `summary`, with "bytes_kept" (result of `kept_bytes`) and "parameters"
            (number of parameters).
    """
    own = next(iter(results.values()))
    columns = ("network", "million parameters", "GB saved", "relative memory", "seconds per pass", "relative time")
    rows = []
    for name, its in results.items():
        more, longer = its["bytes_kept"] / own["bytes_kept"], its["seconds"] / own["seconds"]
        kept = f"{its['bytes_kept'] / 1e9:.2f}", f"{more:.2f}"
        rows.append((f"`{name}`", f"{its['parameters'] / 1e6:.1f}", *kept, with_quartiles(its), f"{longer:.2f}"))
    return markdown(columns, rows)


if __name__ == "__main__":
    main()
