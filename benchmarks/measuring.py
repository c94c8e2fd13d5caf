"""What the benchmarks of time share: the machine, the spread of times, and the file that holds both."""

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.trainers.nnunet_dycon_benchmark_trainers import commit


def machine(device: str) -> dict[str, str | int]:
    """What a figure depends on."""
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
    """Write the results as JSON, with the commit and what else they depend on."""
    content = {"commit": commit(), **about, "results": results}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def summary(seconds: Sequence[float]) -> dict:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * [seconds[0]]
    return {"seconds": median, "quartiles": [low, high], "repeats": len(seconds)}


def with_quartiles(result: dict) -> str:
    """The median, with the quartiles in brackets."""
    low, high = result["quartiles"]
    return f"{result['seconds']:.3f} [{low:.3f}, {high:.3f}]"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
