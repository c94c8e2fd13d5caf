"""Time and memory of the losses FeCL and UnCL, compared to plain implementations.

    python -m benchmarks.losses [--device cuda] [--json FILE]

- Each entry of `CASES`, a loss with the size of its inputs, is measured in a separate process.
- Time is the time of a forward and backward pass in float32. Times are medians over repeated passes, with the quartiles
  in brackets; the first pass is a warm-up.
- Memory is the peak memory of the passes, without their inputs. On a CPU, it is the resident memory of the process; on
  a GPU, the memory allocated by PyTorch.
- The plain implementations are FeCL with N × N matrices of all pairs of patches (`dense_fecl`), and UnCL as in the
  released code of DyCON (`released_uncl`).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import normalize

from benchmarks.measuring import machine, markdown, summary, with_quartiles, write
from nnunet_dycon.losses import fecl_loss, fecl_released_loss, uncl_loss

TEMPERATURE, GAMMA, TOP_K, BETA = 0.6, 2.0, 5, 2.0


def dense_fecl(embedding, patch_labels, *, teacher_embedding, anchor_entropy, gamma=GAMMA):
    """Return the focal entropy-aware contrastive loss (FeCL), computed with N × N matrices of all pairs of patches.

    `nnunet_dycon.losses.fecl_loss` contains the equation. Here its temperature is `TEMPERATURE` and its ``top_k`` is
    `TOP_K`.

    Args:
        embedding: (B, N, D), the student's embeddings of N patches.
        patch_labels: (B, N), integers, the class of each patch; patches with negative labels are ignored.
        teacher_embedding: (B, N, D), the teacher's embeddings.
        anchor_entropy: (B, N), the entropy of each patch in nats.
        gamma: exponent of the focal weights.
    """
    z, teacher = normalize(embedding, dim=-1), normalize(teacher_embedding, dim=-1)
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    known = patch_labels >= 0
    both = known[:, :, None] & known[:, None, :]
    same = patch_labels[:, :, None] == patch_labels[:, None, :]
    positive, negative = both & same & ~itself, both & ~same
    cosine = z @ z.transpose(1, 2)
    clamped = cosine.clamp(0, 1)
    exponential = torch.exp(cosine / TEMPERATURE)
    weight = (1 - clamped) ** gamma * anchor_entropy.exp()[:, :, None]
    similar = (z @ teacher.transpose(1, 2)).masked_fill(~negative, -torch.inf)
    hardest = similar.topk(TOP_K, -1).values
    hard = torch.exp(hardest / TEMPERATURE).sum(-1, keepdim=True) / hardest.isfinite().sum(-1, keepdim=True).clamp(
        min=1
    )
    denominator = (positive * exponential + negative * clamped**gamma * (exponential + hard)).sum(-1, keepdim=True)
    valid = positive.any(-1) & negative.any(-1)
    denominator = torch.where(valid[..., None], denominator, 1.0)  # a 0 would make its gradient NaN
    per_pair = torch.where(positive & valid[:, :, None], -weight * (exponential / denominator).log(), 0.0)
    per_anchor = per_pair.sum(-1) / positive.sum(-1).clamp(min=1)
    return per_anchor.sum() / valid.sum()


def released_uncl(student_logits, teacher_logits):
    """Return the uncertainty-aware consistency loss (UnCL) as in the released code of DyCON, with β = `BETA`.

    Because of broadcasting, the released code adds the entropies of each image to the squared differences of all images
    in the batch. The mean is the same as if they were added to the squared differences of the same image only.

    Args:
        student_logits: (B, C, *spatial).
        teacher_logits: (B, C, *spatial).
    """
    student, teacher = student_logits.softmax(1), teacher_logits.softmax(1)
    own = -(student * torch.log(student + 1e-6)).sum(1, keepdim=True)
    others = -(teacher * torch.log(teacher + 1e-6)).sum(1, keepdim=True)
    distance = (student - teacher) ** 2 / (torch.exp(BETA * own) + torch.exp(BETA * others))
    return (distance.sum(1) + BETA * (own + others)).mean()  # (B, ...) + (B, 1, ...) is (B, B, ...)


def patches(batch: int, number: int, width: int, device: str) -> dict[str, torch.Tensor]:
    """Return random inputs of `fecl_loss`, with the names of its arguments as keys.

    Args:
        batch: number of images, B.
        number: number of patches per image, N.
        width: dimension of the embeddings, D.
        device: device of the tensors.

    Returns:
        "embedding" (B, N, D), "patch_labels" (B, N) from -1 (ignored) to 2, "teacher_embedding" (B, N, D), which is the
        student's embedding with noise, and "anchor_entropy" (B, N) between 0 and 1.
    """
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(batch, number, width, generator=generator)
    tensors = {
        "embedding": embedding,
        "patch_labels": torch.randint(-1, 3, (batch, number), generator=generator),
        "teacher_embedding": embedding + 0.5 * torch.randn(embedding.shape, generator=generator),
        "anchor_entropy": torch.rand(batch, number, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def logits(batch: int, side: int, device: str) -> dict[str, torch.Tensor]:
    """Return random inputs of `uncl_loss` for two classes, with the names of its arguments as keys.

    Args:
        batch: number of images, B.
        side: number of voxels along each spatial axis, S.
        device: device of the tensors.

    Returns:
        "student_logits" and "teacher_logits", each (B, 2, S, S, S).
    """
    generator = torch.Generator().manual_seed(0)
    names = ("student_logits", "teacher_logits")
    return {name: 2 * torch.randn(batch, 2, side, side, side, generator=generator).to(device) for name in names}


def _ours_uncl(student_logits, teacher_logits):
    return uncl_loss(student_logits, teacher_logits, BETA)


def _ours_fecl(gamma: float) -> Callable:
    return lambda **tensors: fecl_loss(**tensors, temperature=TEMPERATURE, gamma=gamma, top_k=TOP_K)


def _released_fecl(embedding, patch_labels, teacher_embedding, anchor_entropy):
    return fecl_released_loss(embedding, patch_labels, teacher_embedding=teacher_embedding)


# Measured losses by name: the function that makes the inputs, and the loss.
CASES: dict[str, tuple[Callable[[str], dict], Callable]] = {
    "FeCL, B=4, N=4096, D=256: dense": (lambda device: patches(4, 4096, 256, device), dense_fecl),
    "FeCL, B=4, N=4096, D=256: ours": (lambda device: patches(4, 4096, 256, device), _ours_fecl(GAMMA)),
    "FeCL, B=4, N=4096, D=256: ours, gamma=0": (lambda device: patches(4, 4096, 256, device), _ours_fecl(0.0)),
    "FeCL, B=4, N=4096, D=256: released form, ours": (lambda device: patches(4, 4096, 256, device), _released_fecl),
    "FeCL, B=2, N=32768, D=256: ours": (lambda device: patches(2, 32768, 256, device), _ours_fecl(GAMMA)),
    "UnCL, B=4, 2x96x96x96: released": (lambda device: logits(4, 96, device), released_uncl),
    "UnCL, B=4, 2x96x96x96: ours": (lambda device: logits(4, 96, device), _ours_uncl),
}


def measure(name: str, device: str, repeats: int) -> dict:
    """Measure forward and backward passes of one entry of `CASES`.

    Call this function in a new process for each entry, because the peak memory on a CPU is that of the process since
    its start.

    Args:
        name: key of `CASES`.
        device: "cpu" or "cuda".
        repeats: number of passes. The first one is not measured, unless it is the only one.

    Returns:
        The result of `summary` for the time of a forward and backward pass, "bytes" (peak memory in addition to the
        inputs), and "machine" (result of `machine`).
    """
    make, loss = CASES[name]
    tensors = make(device)
    student = next(iter(tensors))
    tensors[student].requires_grad_()
    seconds = []
    before = _memory_now(device)
    for _ in range(repeats):
        tensors[student].grad = None
        _synchronize(device)
        start = time.perf_counter()
        value = loss(**tensors)
        value.backward()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return summary(seconds[1:] or seconds) | {"bytes": _peak(device) - before, "machine": machine(device)}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _memory_now(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each entry of `CASES` in a separate process, and print a Markdown table of times and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--repeats", type=int, default=6, help="number of passes; the first one is a warm-up (default: %(default)s)"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    parser.add_argument("--one", choices=CASES, metavar="CASE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.device, arguments.repeats)))
        return
    results: dict[str, dict] = {}
    for name in arguments.cases:
        command = [sys.executable, "-m", "benchmarks.losses", "--one", name, "--device", arguments.device]
        command += ["--repeats", str(arguments.repeats)]
        done = subprocess.run(command, capture_output=True, text=True)
        results[name] = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-200:] or "killed"}
        print(f"{name}: {results[name]}", file=sys.stderr)
        if arguments.json:
            write(arguments.json, results)
    print(as_markdown(results))


def as_markdown(results: dict[str, dict]) -> str:
    """Return a Markdown table of measured times and memory, with a row per loss.

    - loss: name and size of its inputs, key of `CASES`;
    - seconds: median time of a forward and backward pass, with quartiles; the error if the measurement failed;
    - MB: peak memory in addition to the inputs.

    Args:
        results: key of `CASES` -> result of `measure`, or {"error": text}.
    """
    rows = []
    for name, its in results.items():
        measured = (its["error"], "") if "error" in its else (with_quartiles(its), f"{its['bytes'] / 1e6:.0f}")
        rows.append((name, *measured))
    return markdown(("loss", "seconds", "MB"), rows)


if __name__ == "__main__":
    main()
