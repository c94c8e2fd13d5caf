"""Tests of the calculated scaling against manual calculations."""

from dataclasses import replace

import pytest

from benchmarks.scaling import Cluster, step

# 100 MB of gradients in buckets of 25 MB; steps of 1 s, of which 0.5 s backward pass; 2 patches of 1 million voxels.
CLUSTER = Cluster(
    parameters=25e6,
    gpu_seconds=1.0,
    backward_share=0.5,
    patches=2,
    voxels=1_000_000,
    loader_seconds=0.4,
    gpus_per_machine=2,
    cores=4,
    link=1e12,
    network=1e9,
    storage=1e9,
)


def test_times_of_four_gpus():
    """2 · 3/4 · 100 MB at 1 GB/s take 150 ms, less than the backward pass, so only the last bucket adds to the step."""
    at = step(CLUSTER, 4)
    assert at.traffic == pytest.approx(150e6)
    assert at.exchange == pytest.approx(0.15)
    assert at.waited == pytest.approx(0.15 / 4)
    assert at.loader == pytest.approx(2 * 0.4 / 4)
    assert at.reading == pytest.approx(4 * 2 * 1e6 * 1.5 * 2 / 1e9)
    assert at.seconds == pytest.approx(1.0375)
    assert at.bottleneck == "GPU"


def test_one_machine_has_no_network_traffic():
    assert step(CLUSTER, 2).traffic == 0
    assert step(CLUSTER, 1).seconds == 1


@pytest.mark.parametrize(
    ("change", "bottleneck", "seconds"),
    [
        ({"network": 1e8}, "network", 1 + 1.5 - 0.5),
        ({"loader_seconds": 4.0}, "loader", 2.0),
        ({"storage": 1e7}, "reading", 2.4),
    ],
)
def test_slowest_part_determines_the_time_of_a_step(change, bottleneck, seconds):
    at = step(replace(CLUSTER, **change), 4)
    assert at.bottleneck == bottleneck
    assert at.seconds == pytest.approx(seconds)
