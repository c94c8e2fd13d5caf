"""Calculated time of a training step with DDP on 1 to 64 GPUs. Nothing is measured.

    python -m benchmarks.scaling [--gpu_seconds 0.35] [--network_gbit 100] [--cores 8] [--storage_gb 2] ...

The times follow from the assumptions in `Cluster`. The batch size per GPU is constant. With N GPUs, n of them per
machine:

- **Computing** takes the time of a step on one GPU.
- **Gradients** have G bytes, 4 bytes for each trained parameter. In a ring all-reduce, each GPU sends and receives
  2 (N - 1) / N · G bytes. If N <= n, the bandwidth between the GPUs of a machine determines the time. If N > n, the
  network of each machine transfers the same number of bytes, and its bandwidth determines the time. DDP overlaps the
  all-reduce with the backward pass, except for the last bucket of 25 MB. The step takes longer by the part
  of the all-reduce that exceeds the backward pass, and at least by the time of the last bucket. An EMA teacher is
  updated on each GPU and causes no traffic.
- **The loader** prepares a batch for each GPU on the cores of that GPU. Loader, storage and GPU work in parallel, so
  the step takes as long as the slowest of them.
- **Reading**: all GPUs read patches from one storage. Compression halves the 4 bytes per voxel. With the margin for
  rotation, 1.5 times the voxels of the patch are read. After the first epoch, machines that cache the data set in
  memory do not read.
"""

import argparse
from dataclasses import dataclass

from benchmarks.measuring import markdown

_BUCKET = 25e6  # bytes of a DDP bucket
_MARGIN = 1.5  # number of voxels read, relative to the patch
_BYTES = 2  # per voxel, compressed


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the training and the hardware, from which `step` calculates times.

    Attributes:
        parameters: number of trained parameters of all networks.
        gpu_seconds: time of a step on one GPU in seconds.
        backward_share: fraction of that time for the backward pass.
        patches: number of patches per step and GPU, labeled and unlabeled.
        voxels: number of voxels of a patch.
        loader_seconds: time to prepare one patch on one core in seconds.
        gpus_per_machine: number of GPUs per machine, n.
        cores: number of cores per GPU.
        link: bandwidth between the GPUs of a machine in bytes per second.
        network: bandwidth of each machine's network in bytes per second.
        storage: bandwidth of the storage for all machines together in bytes per second.
    """

    parameters: float = 31.2e6
    gpu_seconds: float = 0.35
    backward_share: float = 0.5
    patches: int = 4
    voxels: int = 128**3
    loader_seconds: float = 0.13
    gpus_per_machine: int = 8
    cores: int = 8
    link: float = 100e9
    network: float = 100e9 / 8
    storage: float = 2e9


@dataclass(frozen=True)
class Step:
    """Calculated times of one training step in seconds, and its network traffic in bytes.

    Attributes:
        gpus: number of GPUs, N.
        traffic: bytes that the network of one machine transfers in each direction; 0 if all GPUs are in one machine.
        exchange: time of the all-reduce of gradients.
        waited: the part of `exchange` that does not overlap with the backward pass.
        loader: time to prepare a batch for one GPU.
        reading: time to read the batches for all GPUs from the storage.
        seconds: time of the whole step: the maximum of `loader`, `reading`, and the GPU time. The GPU time is
            `Cluster.gpu_seconds` plus `waited`.
        bottleneck: "loader", "reading" or "GPU", whichever of these times is the maximum; "network" instead of "GPU" if
            `waited` is more than 5 % of the GPU time.
    """

    gpus: int
    traffic: float
    exchange: float
    waited: float
    loader: float
    reading: float
    seconds: float
    bottleneck: str


def step(cluster: Cluster, gpus: int) -> Step:
    """Calculate the times of a training step on a number of GPUs.

    Args:
        cluster: assumptions about the training and the hardware.
        gpus: number of GPUs, N.
    """
    gradients = 4 * cluster.parameters
    traffic = 2 * (gpus - 1) / gpus * gradients
    is_one_machine = gpus <= cluster.gpus_per_machine
    exchange = traffic / (cluster.link if is_one_machine else cluster.network)
    last_bucket = exchange * min(1.0, _BUCKET / gradients)
    waited = max(last_bucket, exchange - cluster.backward_share * cluster.gpu_seconds)
    loader = cluster.patches * cluster.loader_seconds / cluster.cores
    reading = gpus * cluster.patches * cluster.voxels * _MARGIN * _BYTES / cluster.storage
    computing = cluster.gpu_seconds + waited
    seconds, bottleneck = max(
        (computing, "network" if waited > 0.05 * computing else "GPU"), (loader, "loader"), (reading, "reading")
    )
    over_network = 0.0 if is_one_machine else traffic
    return Step(gpus, over_network, exchange, waited, loader, reading, seconds, bottleneck)


def as_markdown(cluster: Cluster, numbers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)) -> str:
    """Return a Markdown table of calculated times of a training step, with a row per number of GPUs.

    Nothing is measured. All times are in ms and calculated by `step`:

    - network MB per machine: bytes that the network of one machine transfers in each direction;
    - all-reduce: all-reduce of the gradients;
    - not overlapped: the part of the all-reduce that does not overlap with the backward pass, added to the step;
    - loader: preparation of a batch for one GPU;
    - reading: reading of the batches for all GPUs;
    - step: the whole step;
    - patches per second: throughput of all GPUs together;
    - scaling efficiency: time of a step on 1 GPU divided by the time on this number of GPUs;
    - bottleneck: the part that determines the time of the step.

    Args:
        cluster: assumptions about the training and the hardware.
        numbers: numbers of GPUs.
    """
    columns = (
        "GPUs", "network MB per machine", "all-reduce ms", "not overlapped ms", "loader ms", "reading ms", "step ms",
        "patches per second", "scaling efficiency", "bottleneck",
    )  # fmt: skip
    one = step(cluster, 1)
    rows = []
    for at in (step(cluster, number) for number in numbers):
        times = (at.exchange, at.waited, at.loader, at.reading, at.seconds)
        throughput = f"{at.gpus * cluster.patches / at.seconds:.0f}", f"{one.seconds / at.seconds:.0%}"
        traffic = f"{at.traffic / 1e6:.0f}"
        rows.append((at.gpus, traffic, *(f"{1e3 * seconds:.0f}" for seconds in times), *throughput, at.bottleneck))
    return markdown(columns, rows)


def main() -> None:
    """Print the table of `as_markdown` for the assumptions given on the command line."""
    default = Cluster()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parameters", type=float, default=default.parameters, help="trained parameters of all networks"
    )
    parser.add_argument("--gpu_seconds", type=float, default=default.gpu_seconds, help="seconds of a step on one GPU")
    parser.add_argument(
        "--loader_seconds", type=float, default=default.loader_seconds, help="seconds for one patch on one core"
    )
    parser.add_argument("--cores", type=int, default=default.cores, help="cores per GPU")
    parser.add_argument("--gpus_per_machine", type=int, default=default.gpus_per_machine)
    parser.add_argument(
        "--network_gbit",
        type=float,
        default=default.network * 8 / 1e9,
        help="network bandwidth of each machine in Gbit/s",
    )
    parser.add_argument(
        "--storage_gb", type=float, default=default.storage / 1e9, help="storage bandwidth for all machines in GB/s"
    )
    given = vars(parser.parse_args())
    network, storage = given.pop("network_gbit") * 1e9 / 8, given.pop("storage_gb") * 1e9
    print(as_markdown(Cluster(network=network, storage=storage, **given)))


if __name__ == "__main__":
    main()
