"""Runs one edit, from checked operands to a verified checkpoint."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from titan_attent.edit.checkpoint import RECORD_FILE, DcpCheckpoint
from titan_attent.edit.combine import Combination
from titan_attent.edit.output import check_output, new_folder
from titan_attent.edit.provenance import record_of
from titan_attent.edit.writer import metadata_of, num_bytes, write_files
from titan_attent.titan.checkpoint_metadata import METADATA_FILE


@dataclass(frozen=True)
class Result:
    """What an edit wrote.

    Attributes:
        num_bytes: of all files.
        seconds: of computing, writing and verifying.
    """

    num_weights: int
    num_bytes: int
    seconds: float


def total_bytes(combination: Combination) -> int:
    """The bytes of the result's weights."""
    return sum(map(num_bytes, combination.weights.values()))


def write(
    combination: Combination,
    output: str,
    *,
    expression: str,
    note: str = "",
    processes: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> Result:
    """Write the result of ``combination`` as the checkpoint ``output``.

    Args:
        expression, note: for the record (provenance.py).
        processes: that compute and write; the result does not depend on it.
        progress: called with the number of bytes of each finished file.

    Raises:
        ValueError: ``output`` exists or has too little room; an operand is damaged; the result is not finite or cannot
            be read back.
    """
    check_output(output, num_bytes=total_bytes(combination))
    start, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # sums of matrices depend on it
    try:
        with new_folder(output) as folder:
            files = write_files(combination, folder, processes=processes, progress=progress)
            metadata = metadata_of(combination.weights, files)
            record = record_of(combination, files, expression=expression, note=note, metadata=metadata)
            folder.write(RECORD_FILE, record)
            folder.write(METADATA_FILE, metadata)
            if dict(DcpCheckpoint(folder.path).weights) != combination.weights:
                raise ValueError(f"{output}: its .metadata is not what was written when it is read back")
    finally:
        torch.set_num_threads(threads)
    return Result(len(combination.weights), sum(file.num_bytes for file in files), time.monotonic() - start)
