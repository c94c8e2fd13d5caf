"""Guarded training step: as in nnU-Net, but the weights are updated only if loss and gradient norm are finite.

A step without an update is either skipped or lost, on all ranks alike:

- Skipped: gradients overflow in half precision, and the GradScaler lowers its scale, as in nnU-Net.
- Lost: the loss is not finite on at least one rank.
- Lost: gradients are not finite, and there is no GradScaler or its scale is already 1 or less.
- Lost: all gradients are finite, but their norm overflows.

Neither kind of step changes the weights or the state of the optimizer. `GuardedStep.update` then returns False, and the
caller must not update an EMA teacher. Ten lost steps in a row raise UserError, which ends the training.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_dycon.errors import UserError
from nnunet_dycon.system.distributed import all_reduce_max, ids_for_ddp, rank

MAX_GRADIENT_NORM = 12  # nnU-Net's
MAX_LOST_STEPS = 10  # in a row

Terms = dict[str, Any]  # tensors or numbers by name; "loss" is the one to minimize


class Cause(Enum):
    """Cause of a lost step, which updates no weights; see the docstring of the module."""

    LOSS = "the loss was not finite"
    OVERFLOW = "gradients overflowed in half precision at a loss scale of 1 or less"
    DIVERGENCE = "the loss was finite, but its gradient was not"


@dataclass(frozen=True)
class Gradients:
    """Loss and gradient norm of a backward pass, copied from the GPU to the CPU.

    Attributes:
        values: name of a loss term -> its value on this rank; "loss" is the minimized one.
        norm: norm of all gradients together before clipping, equal on all ranks.
        loss_is_finite: whether the loss is finite on all ranks.
        stop: whether any rank requests the end of the training, because it received SIGTERM.
    """

    values: dict[str, float]
    norm: float
    loss_is_finite: bool
    stop: bool


def autocast(device: torch.device) -> AbstractContextManager:
    """Return nnU-Net's autocast: half precision on CUDA only."""
    return torch.autocast("cuda") if device.type == "cuda" else nullcontext()


def optimize_with_network(
    method: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, is_ddp: bool
) -> None:
    """Add the trainable child modules of a method, such as a second network, to the optimizer.

    In distributed training, they are also wrapped in DistributedDataParallel, as nnU-Net does with the network.

    Args:
        method: semi-supervised method, in which the wrapped child modules replace the original ones.
        optimizer: optimizer of the network.
        device: device of the child modules.
        is_ddp: whether training is distributed.
    """
    for name, child in method.named_children():
        trainable = [parameter for parameter in child.parameters() if parameter.requires_grad]
        if not trainable:
            continue
        optimizer.add_param_group({"params": trainable})
        if is_ddp:
            child = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # as nnU-Net does with the network
            setattr(method, name, DistributedDataParallel(child, device_ids=ids_for_ddp(device)))


class GuardedStep:
    """Backward pass and optimizer step that updates the weights only if loss and gradient norm are finite.

    `backward` computes and clips the gradients; `update` runs the optimizer step. The docstring of the module defines
    when a step without an update is "lost".

    Args:
        log: function that logs a line for each lost step. It is called on rank 0; other ranks print the line. If a
            step is lost because of a non-finite loss, only the ranks with such a loss log or print the line.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._lost: list[tuple[Cause, set[str]]] = []  # causes of the lost steps in a row, and their suspicious cases

    def backward(
        self,
        terms: Terms,
        optimizer: torch.optim.Optimizer,
        grad_scaler: torch.amp.GradScaler | None,
        stop: bool = False,
    ) -> Gradients:
        """Compute the gradients of all optimized parameters, clip their common norm, and return loss terms and norm.

        All ranks must call this method. It is the only place in a step where the host waits for the device.

        Args:
            terms: scalar terms by name; "loss" is the one to minimize.
            optimizer: optimizer of the parameters.
            grad_scaler: scaler for half precision; None without half precision.
            stop: whether this rank requests the end of the training, because it received SIGTERM.
        """
        loss = terms["loss"]
        if grad_scaler is None:
            loss.backward()
        else:
            grad_scaler.scale(loss).backward()
            grad_scaler.unscale_(optimizer)
        optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(optimized, MAX_GRADIENT_NORM)
        flags = torch.stack([~torch.isfinite(loss.detach()), torch.full_like(loss.detach(), stop, dtype=torch.bool)])
        tensors = {name: value for name, value in terms.items() if isinstance(value, torch.Tensor)}
        on_device = [norm, *all_reduce_max(flags.float()), *tensors.values()]
        norm, is_lost, stop, *numbers = torch.stack([value.detach().float() for value in on_device]).cpu().numpy()
        return Gradients({**terms, **dict(zip(tensors, numbers))}, float(norm), not is_lost, bool(stop))

    def update(
        self,
        gradients: Gradients,
        optimizer: torch.optim.Optimizer,
        grad_scaler: torch.amp.GradScaler | None,
        cases: Sequence[str],
    ) -> bool:
        """Update the parameters if loss and gradient norm are finite.

        Args:
            gradients: the result of `backward`.
            optimizer: optimizer of the parameters.
            grad_scaler: scaler for half precision; None without half precision.
            cases: identifiers of the cases in the batch, for the log.

        Returns:
            Whether the parameters have been updated. The value is the same on all ranks.

        Raises:
            UserError: ten steps in a row are lost; see the docstring of the module.
        """
        is_finite = gradients.loss_is_finite and bool(np.isfinite(gradients.norm))
        if is_finite:
            _step(optimizer, grad_scaler)
            self._lost = []
        elif (cause := _skip(gradients, grad_scaler)) is not None:
            self._lose(cause, gradients.values["loss"], cases)
        return is_finite

    def _lose(self, cause: Cause, loss: float, cases: Sequence[str]) -> None:
        """Count a lost step (see the docstring of the module) and log its cause, loss and cases.

        If the cause is a non-finite loss, ranks with a finite loss do not log the step.

        Args:
            cause: cause of the lost step, equal on all ranks.
            loss: total loss on this rank.
            cases: identifiers of the cases in this rank's batch.

        Raises:
            UserError: this is the tenth lost step in a row.
        """
        is_suspicious = cause is not Cause.LOSS or not np.isfinite(loss)  # otherwise another rank has the bad loss
        self._lost.append((cause, set(cases) if is_suspicious else set()))
        if is_suspicious:
            names = ", ".join(cases)
            line = f"WARNING: step lost: {cause.value}; loss {loss:.4g}. Nothing was updated. Cases: {names}"
            self._log(line) if rank() == 0 else print(f"rank {rank()}: {line}")
        if len(self._lost) == MAX_LOST_STEPS:
            problem = "steps in a row changed no weights, since loss or gradients were not finite"
            raise UserError(f"{MAX_LOST_STEPS} {problem}. {self._advice()}")

    def _advice(self) -> str:
        causes = {cause for cause, _ in self._lost}
        resume = "resume from the last checkpoint with --c, or start again with a lower learning rate"
        if Cause.LOSS not in causes:
            if Cause.OVERFLOW not in causes:
                return f"The gradients were not finite, so training has diverged: {resume}"
            return (
                "Gradients overflowed in half precision: check the cases in the training log for extreme intensities. "
                f"If there are none, {resume}"
            )
        suspects = [cases for _, cases in self._lost if cases]
        common = sorted(set.intersection(*suspects)) if suspects else []
        if common:
            problem = f"All had {', '.join(common)} in the batch: repair or remove what is damaged and resume with --c"
        else:
            problem = "Their cases are in the training log: repair or remove those that are damaged and resume with --c"
        return f"{problem}. If no case is damaged, training has diverged: {resume}"


def _step(optimizer: torch.optim.Optimizer, grad_scaler: torch.amp.GradScaler | None) -> None:
    if grad_scaler is None:
        optimizer.step()
    else:
        grad_scaler.step(optimizer)
        grad_scaler.update()


def _skip(gradients: Gradients, grad_scaler: torch.amp.GradScaler | None) -> Cause | None:
    """Update the GradScaler after a step without a weight update; return the cause if the step is lost.

    Return None if the step is only skipped. The docstring of the module defines "lost" and "skipped".
    """
    if grad_scaler is None:
        return Cause.DIVERGENCE if gradients.loss_is_finite else Cause.LOSS
    scale = grad_scaler.get_scale()
    if not gradients.loss_is_finite:
        # The scale stays: a damaged case would lower it at each step, until all gradients vanish.
        grad_scaler.update(scale)
        return Cause.LOSS
    # Without `step`, which would skip the optimizer: `unscale_` has recorded the overflow that lowers the scale.
    grad_scaler.update()
    lowered = grad_scaler.get_scale() < scale
    if not lowered:  # of finite gradients, only the norm overflows
        return Cause.DIVERGENCE
    return Cause.OVERFLOW if scale <= 1 else None
