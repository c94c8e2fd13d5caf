"""Augmenters of batchgenerators that raise UserError (an error that the user can fix) for unreadable cases.

An augmenter is an iterator that draws batches from a data loader, in this process or in worker processes.
"""

from collections.abc import Callable
from time import sleep
from typing import Any

import numpy as np
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_dycon.data.loader import FAULT, LabeledLoader, TwoStreamLoader
from nnunet_dycon.errors import UserError

_SIGNAL_DELAY = 2.0  # seconds within which a scheduler signals all processes of a training


class InProcess(SingleThreadedAugmenter):
    """Augmenter that draws batches from a data loader in this process.

    It raises UserError (an error that the user can fix) if a case cannot be read. The arguments are those of
    SingleThreadedAugmenter: the data loader, and a transform of the batches or None.
    """

    def __next__(self) -> dict:
        return _batch(super().__next__())


class Workers(NonDetMultiThreadedAugmenter):
    """Augmenter that draws batches from a data loader in worker processes.

    It raises UserError (an error that the user can fix) if a case cannot be read or if a worker was killed.

    No error is raised if a job scheduler stops the training by sending SIGTERM to all of its processes. The workers
    then end at once, but the main process still finishes its training step, so that all ranks stop after the same step.
    If no batch is left for this step, the augmenter returns the previous batch again.

    Args:
        arguments, options: positional and keyword arguments of NonDetMultiThreadedAugmenter.
        is_ending: function without arguments that returns whether this process has received SIGTERM.
    """

    def __init__(self, *arguments, is_ending: Callable[[], bool] = lambda: False, **options) -> None:
        super().__init__(*arguments, **options)
        self._is_ending = is_ending
        self._latest: dict | None = None

    def __next__(self) -> dict:
        processes = list(self._processes)
        try:
            self._latest = _batch(super().__next__())
        except RuntimeError:  # a worker has ended, so nnU-Net has ended the others
            if not any(process.exitcode not in (None, 0) for process in processes):
                raise  # it ended with an exception, which has been printed
            self._wait_for_request()
            if not self._is_ending() or self._latest is None:
                raise UserError(
                    "a process that prepares batches was killed, probably for lack of memory (see the lines above); "
                    "set the environment variable nnUNet_n_proc_DA to a smaller number, and resume with --c"
                ) from None
        return self._latest

    def _wait_for_request(self) -> None:
        for _ in range(20):
            if self._is_ending():
                return
            sleep(_SIGNAL_DELAY / 20)


def _batch(item: dict) -> dict:
    if FAULT in item:
        raise UserError(item[FAULT])
    return item


def augmenter(
    loader: nnUNetDataLoader,
    processes: int,
    cached: int,
    pin_memory: bool,
    is_ending: Callable[[], bool] = lambda: False,
) -> InProcess | Workers:
    """Return an augmenter that draws batches from a data loader, in this process or in worker processes.

    Args:
        loader: the data loader, which is copied to each worker process.
        processes: number of worker processes; with 0, batches are drawn in this process.
        cached: number of batches that the workers prepare in advance.
        pin_memory: whether the batches of workers are copied to pinned memory.
        is_ending: function without arguments that returns whether this process has received SIGTERM.
    """
    if processes == 0:
        return InProcess(loader, None)
    # Without seeds, all forked workers would draw the same random numbers: they inherit the state of torch's generator.
    seeds = [int(seed) for seed in np.random.default_rng().integers(2**31, size=processes)]
    return Workers(
        loader,
        None,
        processes,
        num_cached=cached,
        seeds=seeds,
        pin_memory=pin_memory,
        wait_time=0.002,
        is_ending=is_ending,
    )


def start(
    training: TwoStreamLoader, validation: LabeledLoader, pin_memory: bool, is_ending: Callable[[], bool]
) -> tuple[InProcess | Workers, InProcess | Workers]:
    """Return the augmenters of the training and the validation loader, after each has drawn a first batch.

    The numbers of workers and cached batches are those of nnU-Net.

    Args:
        training: loader of labeled and unlabeled patches.
        validation: loader of validation patches.
        pin_memory: whether the batches of workers are copied to pinned memory.
        is_ending: function without arguments that returns whether this process has received SIGTERM.
    """
    processes = get_allowed_n_proc_DA()
    for_validation = min(processes, max(1, processes // 2))
    augmenters = (
        augmenter(training, processes, max(6, processes // 2), pin_memory, is_ending),
        augmenter(validation, for_validation, max(3, processes // 4), pin_memory, is_ending),
    )
    for started in augmenters:
        next(started)
    return augmenters


def shut_down(*augmenters: Any) -> None:
    """End the worker processes of augmenters; augmenters without workers are ignored."""
    for started in augmenters:
        if isinstance(started, Workers):
            started._finish()
