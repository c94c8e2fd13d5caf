"""What a step takes on 1 to 64 GPUs, by calculation: nothing here is measured.

    python -m benchmarks.scaling [--gpu_seconds 0.35] [--network_gbit 100] [--cores 8] [--storage_gb 2] ...

Each GPU has its own batch, of the same size however many there are. With N GPUs, n of them on a machine:

- **Computing** takes the same time on all: the step on one GPU.
- **Gradients**: one number of 4 bytes for each parameter that learns, G bytes. A ring all-reduce sends and receives
  2 (N - 1) / N · G bytes on each GPU, and as much over the network of each machine. DDP does it while the backward pass
  computes the rest, except for the last bucket of 25 MB. What does not fit into the backward pass is waited for. A
  teacher is averaged on each GPU by itself, and costs no traffic.
- **The loader** makes a batch for each GPU on that GPU's share of the cores. Loader, storage and GPU work at the same
  time: the step takes as long as the slowest.
- **Reading**: patches as they lie on the disk, compressed to half of their 4 bytes a voxel, with the margin that
  rotation needs, for all GPUs from one storage. After the first epoch machines whose memory holds the data set read
  nothing.
"""

import argparse
from dataclasses import dataclass

from benchmarks.measuring import markdown

_BUCKET = 25e6  # bytes, DDP's
_MARGIN = 1.5  # voxels read against those of a patch
_BYTES = 2  # a voxel, compressed


@dataclass(frozen=True)
class Cluster:
    """What is assumed.

    Attributes:
        parameters: that learn, of all networks together.
        gpu_seconds: of a step on one GPU.
        backward_share: of it, of the backward pass.
        patches: a step and GPU, labeled and unlabeled.
        voxels: of a patch.
        loader_seconds: of one core, for one patch.
        gpus_per_machine: n.
        cores: of each GPU.
        link: bytes a second between the GPUs of a machine.
        network: bytes a second between machines.
        storage: bytes a second, of all machines together.
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
    """One step on a number of GPUs, in seconds, and the bytes that it moves.

    Attributes:
        gpus: their number.
        traffic: bytes over the network of one machine.
        exchange: of gradients.
        waited: of that, what the backward pass does not hide.
        loader: of a batch for one GPU.
        reading: of the batches for all GPUs, from what they share.
        seconds: of the whole step.
        bottleneck: what it would have to be faster for.
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
    """Of so many GPUs."""
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
    """Return a table of steps; times in milliseconds."""
    columns = (
        "GPUs", "MB over a machine's network", "exchange", "of it waited for", "loader", "reading", "step",
        "patches a second", "of N times one GPU", "bottleneck",
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
    """Print the table."""
    default = Cluster()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=default.parameters, help="that learn, all networks")
    parser.add_argument("--gpu_seconds", type=float, default=default.gpu_seconds, help="of a step on one GPU")
    parser.add_argument("--loader_seconds", type=float, default=default.loader_seconds, help="a patch and core")
    parser.add_argument("--cores", type=int, default=default.cores, help="for each GPU")
    parser.add_argument("--gpus_per_machine", type=int, default=default.gpus_per_machine)
    parser.add_argument("--network_gbit", type=float, default=default.network * 8 / 1e9, help="of each machine")
    parser.add_argument("--storage_gb", type=float, default=default.storage / 1e9, help="GB/s, of all machines")
    given = vars(parser.parse_args())
    network, storage = given.pop("network_gbit") * 1e9 / 8, given.pop("storage_gb") * 1e9
    print(as_markdown(Cluster(network=network, storage=storage, **given)))


if __name__ == "__main__":
    main()
