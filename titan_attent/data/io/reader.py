"""Reads batches ahead of the step, on threads that live as long as the run.

A pass, a scoring pool and a validation each read their own batches in order, on the same threads. Tokens are read with
system calls (files.py), which release the interpreter lock while they wait. So no worker processes are needed, and no
worker can hold a stale teacher. Nodes of torchdata would start new threads for every pass, at 0.1 s per pass: their
source is fixed when they start. Hence the executor of the standard library.

Cost: ``num_workers`` threads, started with the first batch; memory for ``num_workers`` + 2 batches.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

ReadBatch = tuple[dict[str, Tensor], Tensor]
"""A batch as a data set reads it: ({"input": [B, L], ...}, labels [B, L])."""
Request = TypeVar("Request")


def batches_ahead(num_workers: int) -> int:
    """The batches in memory that a :class:`Reader` has read ahead of the step."""
    return num_workers + 2 if num_workers else 0


class Reader:
    """Reader threads.

    Args:
        num_workers: threads; 0 reads in the consumer's thread, on demand.
    """

    def __init__(self, num_workers: int):
        self.num_workers = num_workers
        self._threads: ThreadPoolExecutor | None = None

    def read(
        self, fn: Callable[[Request], ReadBatch], requests: Iterable[Request], *, pin_memory: bool = False
    ) -> Iterator[ReadBatch]:
        """Yield ``fn`` of every request, in order. An exception in ``fn`` is raised here, at its position in the order.

        Requests are taken in the consumer's thread, ``num_workers`` + 2 ahead, so slow work belongs into ``fn``. If the
        iterator is dropped half-way, only the calls in progress continue.

        Args:
            fn: called in the reader threads.
            requests: the arguments of ``fn``.
            pin_memory: copy batches to page-locked memory, for asynchronous transfer to an accelerator.
        """
        if self.num_workers == 0:
            yield from map(fn, requests)
            return
        call = (lambda request: _pinned(fn(request))) if pin_memory else fn
        pending: deque[Future[ReadBatch]] = deque()
        try:
            for request in requests:
                pending.append(self._executor().submit(call, request))
                if len(pending) > batches_ahead(self.num_workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the threads after their calls in progress; does not wait for them."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _executor(self) -> ThreadPoolExecutor:
        if self._threads is None:
            device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
            self._threads = ThreadPoolExecutor(
                self.num_workers, thread_name_prefix="titan_attent-reader", initializer=_use_device, initargs=(device,)
            )
        return self._threads


def _use_device(device: int | None) -> None:
    # A new thread uses the first device by default: pinning memory would create a context on it for every rank.
    if device is not None:
        torch.accelerator.set_device_index(device)


def _pinned(batch: ReadBatch) -> ReadBatch:
    inputs, labels = batch
    return {name: tensor.pin_memory() for name, tensor in inputs.items()}, labels.pin_memory()
