"""Helpers of the time benchmarks: description of the machine, quartiles of times, result files and tables."""

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.trainers.nnunet_dycon_benchmark_trainers import commit


def machine(device: str) -> dict[str, str | int]:
    """Return a description of the device and the versions of torch and Python."""
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
    """Write results as JSON, together with the commit and further information such as the machine."""
    content = {"commit": commit(), **about, "results": results}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def summary(seconds: Sequence[float]) -> dict:
    """Return median and quartiles of times in seconds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * [seconds[0]]
    return {"seconds": median, "quartiles": [low, high], "repeats": len(seconds)}


def with_quartiles(result: dict) -> str:
    """Return the median as text, with the quartiles in brackets."""
    low, high = result["quartiles"]
    return f"{result['seconds']:.3f} [{low:.3f}, {high:.3f}]"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
