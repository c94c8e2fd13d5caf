"""Helpers of the time benchmarks: description of the machine, quartiles of times, result files and tables."""

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.trainers.nnunet_dycon_benchmark_trainers import commit
from nnunet_dycon.system.files import replacing


def machine(device: str) -> dict[str, str | int]:
    """Return a description of the machine and the software.

    Args:
        device: "cpu" or "cuda".

    Returns:
        "device" (name of the GPU, or number and name of the processors), "threads" (number of PyTorch's threads, only
        for "cpu"), and the versions "torch" and "python".
    """
    named = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), **named}
    return {"device": _processor(), "threads": torch.get_num_threads(), **named}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


def write(file: Path, results: dict, **about: object) -> None:
    """Write a JSON file with the results of a benchmark.

    Args:
        file: the file to write.
        results: value of the key "results".
        about: further keys and values, such as machine=machine("cpu"). The key "commit", the commit of this
            repository, is added.
    """
    content = {"commit": commit(), **about, "results": results}
    with replacing(file) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def summary(seconds: Sequence[float]) -> dict:
    """Summarize measured times in seconds.

    Returns:
        "seconds" (median), "quartiles" (list of the first and the third quartile), and "repeats" (number of times).
    """
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * [seconds[0]]
    return {"seconds": median, "quartiles": [low, high], "repeats": len(seconds)}


def with_quartiles(result: dict) -> str:
    """Return median and quartiles in seconds as text, such as "2.000 [1.932, 2.021]", from a result of `summary`."""
    low, high = result["quartiles"]
    return f"{result['seconds']:.3f} [{low:.3f}, {high:.3f}]"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table with a header of column names."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
