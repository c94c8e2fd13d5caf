"""Filling of a network with the weights of a checkpoint that may have other channels, classes or stages.

Tensors are matched by name and shape. A tensor that a network registers under several names, such as the encoder in
the decoder of nnU-Net's networks, is filled once. Without a counterpart, a tensor keeps its initial values. So do:

- the segmentation layers (names with ".seg_layers."), as in nnU-Net's own -pretrained_weights;
- the decoder, if the checkpoint is one of nnssl, whose decoder reconstructs images (nnU-Net's documentation of nnssl
  checkpoints does the same), or if its network has another number of stages, since the decoder's stages are counted
  from the lowest resolution.

The first layers, which see the image, are adapted to the number of channels: each channel gets the sum of the weights
over the checkpoint's channels, divided by the number of the network's channels. For one channel in the checkpoint,
these are the repeated weights divided by the number of channels, as in nnU-Net. The output for an image whose channels
are all equal does not change.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnunet_dycon.errors import UserError
from nnunet_dycon.inference.tables import aligned
from nnunet_dycon.pretraining.sources import Source, Weights

HEADS = ".seg_layers."  # nnU-Net's load_pretrained_weights leaves out these names
PARTS = ("stem", "encoder", "decoder", "heads")
REQUIRED = 0.5  # share of the parameters of stem and encoder
TAKEN, ADAPTED, LEFT = "taken", "adapted", "left"
_STAGE = re.compile(r"encoder\.stages\.(\d+)\.")


@dataclass(frozen=True)
class Slot:
    """A tensor of the network, with all its names.

    Attributes:
        names: its names in the state dict.
        tensor: the tensor, which shares its memory with the network.
        part: one of `PARTS`; the stem consists of the first layers, which see the image.
        sees_image: whether its second axis is that of the image's channels.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    part: str
    sees_image: bool


class Report:
    """Numbers of parameters that were taken, adapted or left, by part of the network."""

    def __init__(self) -> None:
        self._numbers: Counter[tuple[str, str]] = Counter()

    def add(self, slot: Slot, fate: str) -> None:
        """Count the parameters of a tensor; `fate` is "taken", "adapted" or "left"."""
        self._numbers[slot.part, fate] += slot.tensor.numel()

    def share(self, *parts: str) -> float:
        """Return the fraction of the parameters of the given parts that were taken or adapted."""
        filled, total = (
            sum(self._numbers[part, fate] for part in parts for fate in fates)
            for fates in ((TAKEN, ADAPTED), (TAKEN, ADAPTED, LEFT))
        )
        return filled / total if total else 0.0

    def as_table(self) -> str:
        """Return a text table: a line per part with its number of parameters and the share of each fate."""
        lines: list[tuple[str, ...]] = [("part", "parameters", "taken", "adapted", "left initialized")]
        for part in PARTS:
            total = sum(self._numbers[part, fate] for fate in (TAKEN, ADAPTED, LEFT))
            if total:
                shares = (f"{100 * self._numbers[part, fate] / total:.0f} %" for fate in (TAKEN, ADAPTED, LEFT))
                lines.append((part, f"{total:,}", *shares))
        return "\n".join(aligned(lines, left=(0,)))


def fill(network: nn.Module, sees_image: set[str], source: Source) -> Report:
    """Copy the weights of a checkpoint to a network, in place, as far as they fit.

    Args:
        network: the network to fill, with initialized weights.
        sees_image: names of the tensors whose second axis is that of the image's channels, see `image_layers`.
        source: the checkpoint.

    Raises:
        UserError: less than half of the parameters of stem and encoder fit; with the reason.
    """
    slots = list(_slots(network, sees_image))
    weights = _renamed(network, source)
    if source.nnssl_plan or _depth(weights) != _depth(network.state_dict()):
        kept = {name for slot in slots if slot.part != "decoder" for name in slot.names}
        weights = {name: tensor for name, tensor in weights.items() if name in kept}
    report, unfit, is_known = Report(), [], False
    for slot in slots:
        found = next((weights[name] for name in slot.names if name in weights), None)
        values = None if found is None or slot.part == "heads" else _fitted(found, slot)
        if values is not None:
            with torch.no_grad():
                slot.tensor.copy_(values)
        if slot.part in ("stem", "encoder"):
            is_known |= found is not None
            if values is None:
                unfit.append((slot, found))
        report.add(slot, LEFT if values is None else TAKEN if values is found else ADAPTED)
    share = report.share("stem", "encoder")
    if share < REQUIRED:
        raise UserError(
            f"{source.file} fits {share:.0%} of the encoder's parameters, and at least {REQUIRED:.0%} are required: "
            f"{_reason(unfit, network, is_known)}; make plans with its architecture (--plans_like), or use another "
            "checkpoint"
        )
    return report


def image_layers(build: Callable[[int], nn.Module], channels: int) -> set[str]:
    """Return the names of the tensors whose shape depends on the number of the image's channels.

    Args:
        build: builds the network for a number of channels.
        channels: the number of channels.
    """
    with torch.device("meta"):  # without memory for the weights
        ours, others = (build(number).state_dict() for number in (channels, channels + 1))
    return {name for name, tensor in ours.items() if tensor.shape != others[name].shape}


def _slots(network: nn.Module, sees_image: set[str]) -> Iterator[Slot]:
    stems = tuple({f"{name.rsplit('.', 2)[0]}." for name in sees_image})
    names = defaultdict(list)
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            names[id(tensor)].append((name, tensor))
    for its in names.values():
        aliases, tensor = tuple(name for name, _ in its), its[0][1].detach()
        if any(HEADS in name for name in aliases):
            part = "heads"
        elif any(name.startswith(stems) for name in aliases):
            part = "stem"
        else:
            part = "encoder" if any(name.startswith("encoder.") for name in aliases) else "decoder"
        yield Slot(aliases, tensor, part, not sees_image.isdisjoint(aliases))


def _fitted(found: torch.Tensor, slot: Slot) -> torch.Tensor | None:
    """Return the values for a tensor of the network: the found ones, adapted ones, or None if they do not fit."""
    wanted = slot.tensor.shape
    if found.shape == wanted:
        return found
    if not slot.sees_image or found.ndim != len(wanted) or found[:, :1].shape != slot.tensor[:, :1].shape:
        return None
    return (found.sum(1, keepdim=True) / wanted[1]).expand(wanted)


def _renamed(network: nn.Module, source: Source) -> Weights:
    """Return the weights with the names of the network, as far as they correspond to one of its names.

    nnssl's names of encoder and stem are replaced by those of the network. Then the same prefix is removed from all
    names, and "encoder." is added or not, such that most names occur in the network.
    """
    pairs = []
    for key in ("key_to_stem", "key_to_encoder"):
        old, new = source.nnssl_plan.get(key), getattr(network, key, None)
        if isinstance(old, str) and isinstance(new, str):
            pairs.append((old, new))
    pairs.sort(key=lambda pair: -len(pair[0]))  # the stem may be inside of the encoder
    weights = {_replaced(name, pairs): tensor for name, tensor in source.weights.items()}
    known = network.state_dict().keys()
    votes: Counter[tuple[str, str]] = Counter()
    for name in weights:
        pieces = name.split(".")
        for number in range(len(pieces)):
            prefix, ending = (".".join(its) for its in (pieces[:number], pieces[number:]))
            for added in ("", "encoder."):
                votes[f"{prefix}." * bool(prefix), added] += added + ending in known
    removed, added = max(votes, key=lambda pair: (votes[pair], -len(pair[0]), -len(pair[1])))
    return {added + name[len(removed) :]: tensor for name, tensor in weights.items() if name.startswith(removed)}


def _replaced(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Replace the first prefix that the name has; `pairs` contains prefixes without the dot and their replacements."""
    for old, new in pairs:
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def _depth(weights: dict[str, Any]) -> int:
    """Return the number of stages of the encoder, from the names of the weights."""
    return 1 + max((int(found[1]) for name in weights if (found := _STAGE.match(name))), default=-1)


def _reason(unfit: list[tuple[Slot, torch.Tensor | None]], network: nn.Module, is_known: bool) -> str:
    """Return why most parameters of the encoder do not fit.

    Args:
        unfit: the tensors of stem and encoder that were not filled, and the tensors of the same names in the
            checkpoint, if there are any.
        network: the network.
        is_known: whether the name of any tensor of stem or encoder occurs in the checkpoint.
    """
    sizes: Counter[str] = Counter()
    examples: dict[str, tuple[Slot, torch.Tensor | None]] = {}
    for slot, found in unfit:
        wanted = slot.tensor.shape
        if found is None:
            kind = "depth" if is_known else "architecture class"
        elif found.ndim != len(wanted):
            kind = "number of dimensions"
        else:
            kind = "kernel size" if found.shape[2:] != wanted[2:] else "width"
        sizes[kind] += slot.tensor.numel()
        examples.setdefault(kind, (slot, found))
    kind = max(sizes, key=lambda its: sizes[its])
    slot, found = examples[kind]
    if found is None:
        return f"{kind} ({slot.names[0]} of {type(network).__name__} is not in the checkpoint)"
    theirs, ours = (" x ".join(map(str, shape)) for shape in (found.shape, slot.tensor.shape))
    return f"{kind} ({slot.names[0]} is {theirs} in the checkpoint and {ours} in the network)"
