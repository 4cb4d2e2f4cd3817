"""The process of documents.py that reads with mosaicml-streaming, which is no dependency of this project.

    PYTHON documents_streaming.py write TOKENS MDS       writes the documents of a data set as pretokenised samples
    PYTHON documents_streaming.py read MDS [--core N]    one pass in random order; prints tokens and seconds

PYTHON is an interpreter with mosaicml-streaming. This file imports nothing of the project.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np


def write(tokens: Path, folder: Path) -> None:
    from streaming import MDSWriter  # type: ignore[import-not-found]

    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}) as writer:
        for path in sorted(tokens.glob("shard-*.bin")):
            shard = np.fromfile(path, dtype="<u2")
            ends = np.fromfile(path.with_suffix(".documents"), dtype="<u4").astype(np.int64)
            for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
                writer.write({"tokens": shard[start:end]})


def read(folder: Path) -> dict[str, float]:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=32)
    num_tokens, start, cpu_start = 0, time.perf_counter(), time.process_time()
    for sample in dataset:
        num_tokens += len(sample["tokens"])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"tokens": num_tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Documents by mosaicml-streaming.")
    parser.add_argument("action", choices=["write", "read"])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--core", type=int, help="run on this core alone")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    if args.action == "write":
        write(*args.folders)
    else:
        print(json.dumps(read(*args.folders)), flush=True)


if __name__ == "__main__":
    main()
