"""Reads the boxes of a checkpoint before they are asked for, in a thread of its own.

So all operands of an edit are read at the same time, while boxes before are computed and written. What is not announced
is read when it is asked for.

Cost: the boxes that were announced and not yet asked for.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor

from titan_attent.edit.boxes import Box
from titan_attent.edit.checkpoint import Checkpoint


class ReadAhead(Checkpoint):
    """The weights of ``checkpoint``, which from now on only the thread of this object reads."""

    def __init__(self, checkpoint: Checkpoint):
        self.path, self.weights = checkpoint.path, checkpoint.weights
        self.sha256, self.tokenizer = checkpoint.sha256, checkpoint.tokenizer
        self._checkpoint, self._thread = checkpoint, ThreadPoolExecutor(1)
        self._announced: dict[tuple[str, Box], Future[Tensor]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)

    def announce(self, name: str, box: Box) -> None:
        """Read ``box`` after those that were announced before, and keep it for the next :meth:`read` of it."""
        self._announced[name, box] = self._thread.submit(self._checkpoint.read, name, box)

    def read(self, name: str, box: Box) -> Tensor:
        announced = self._announced.pop((name, box), None)
        if announced is None:
            announced = self._thread.submit(self._checkpoint.read, name, box)
        return announced.result()

    def forget(self) -> None:
        self._thread.submit(self._checkpoint.forget)
