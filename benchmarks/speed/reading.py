"""Reading examples: positioned reads through few open files against a memory map of every shard, and persistent
reader threads against new torchdata nodes for every pass.

    python -m benchmarks.speed.reading [--output reading.json]

One thread reads batches of random examples, the variants in turn, from 4 and from 1,100 shards. numpy's maps of 1,100
files exceed the usual limit of 1,024 open files, which is therefore raised to 4,096. "ours" keeps a quarter of that
open, "ours, 256" a quarter of the usual limit, so that most of its examples open a file. The token files are random, 64
MB in all, and in the page cache: the latency of a disk or a network would be the same in all variants. "pass" is the
time from the request for the first batch of a pass to its arrival.
"""

import argparse
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchdata.nodes import IterableWrapper, ParallelMapper, Prefetcher

from benchmarks.common import measure
from titan_attent.data.io.reader import Reader
from titan_attent.data.text.format import ShardWriter, write_index
from titan_attent.data.text.shards import TokenDataset

TOKENS = 32_000_000
DTYPE = np.dtype("<u2")


def make_data(folder: Path, *, num_shards: int) -> Path:
    """A data set of ``TOKENS`` random tokens."""
    folder.mkdir()
    generator, entries = np.random.default_rng(0), []
    for number in range(num_shards):
        with ShardWriter(folder / f"shard-{number:05d}.bin", dtype=DTYPE) as shard:
            shard.append(generator.integers(0, 50_000, TOKENS // num_shards, dtype=DTYPE))
            entries.append(shard.finish())
    info = {"name": "none", "vocab_size": 50_000, "eos_id": 49_999}
    write_index(folder, dtype=DTYPE, shards=entries, num_documents=1, max_token_id=49_999, tokenizer=info)
    return folder


class Mapped:
    """The alternative: every shard is mapped at its first use and stays mapped."""

    def __init__(self, dataset: TokenDataset):
        self.dataset, self.maps = dataset, dict[str, np.ndarray]()

    def batch(self, ids: Tensor) -> Tensor:
        shards, seq_len = self.dataset.shards, self.dataset.seq_len
        windows = np.empty((len(ids), seq_len + 1), dtype=np.int64)
        for window, i in zip(windows, ids.tolist(), strict=True):
            start, filled = i * seq_len, 0
            while filled < len(window):
                name, offset = shards.locate(start + filled)
                if name not in self.maps:
                    self.maps[name] = np.memmap(shards.path / name, dtype=DTYPE, mode="r")
                span = self.maps[name][offset : offset + len(window) - filled]
                window[filled : filled + len(span)] = span
                filled += len(span)
        return torch.from_numpy(windows)


def read(folder: Path, *, seq_len: int, rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per batch, for all variants."""
    dataset = TokenDataset(folder, seq_len=seq_len)
    mapped, generator = Mapped(dataset), torch.Generator().manual_seed(0)
    limited = TokenDataset(folder, seq_len=seq_len)
    limited.shards._files.limit = 256
    ids = torch.zeros(rows, dtype=torch.int64)

    def draw() -> None:
        ids.copy_(torch.randint(len(dataset), (rows,), generator=generator))

    draw()
    inputs, labels = dataset.batch(ids)
    assert torch.equal(mapped.batch(ids), torch.cat((inputs, labels[:, -1:]), dim=1))

    def ours() -> None:
        dataset.batch(ids)

    def theirs() -> None:
        windows = mapped.batch(ids)
        windows[:, :-1].clone(), windows[:, 1:].clone()

    # Every variant reads its own batches: those of another would be in the processor's cache.
    ways: dict[str, Callable[[], Any]] = {"memmap": theirs, "ours": ours, "ours, 256": lambda: limited.batch(ids)}
    return measure.interleave(ways, rounds=rounds, device="cpu", before=draw, warmup=200)


def start_passes(folder: Path, *, rounds: int) -> dict[str, list[float]]:
    """Seconds until the first batch of a pass of 50 batches arrives."""
    dataset = TokenDataset(folder, seq_len=128)
    reader = Reader(2)

    def batch(number: int) -> Any:
        inputs, labels = dataset.batch(torch.arange(number * 16, number * 16 + 16))
        return {"input": inputs}, labels

    def nodes() -> Iterator[Any]:
        node = Prefetcher(
            ParallelMapper(IterableWrapper(range(50)), map_fn=batch, num_workers=2, in_order=True, method="thread"),
            prefetch_factor=2,
        )
        node.reset()
        return iter(node)

    left: list[Iterator[Any]] = []

    def first_of(passes: Callable[[], Iterator[Any]]) -> Callable[[], None]:
        def take() -> None:
            left.append(passes())
            next(left[-1])

        return take

    def finish() -> None:
        for batches in left:
            for _ in batches:
                pass
        left.clear()

    ways = {
        "torchdata nodes": first_of(nodes),
        "ours": first_of(lambda: reader.read(batch, range(50))),
    }
    times = measure.interleave(ways, rounds=rounds, device="cpu", before=finish)
    reader.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Positioned reads and persistent threads against memory maps and nodes."
    )
    parser.add_argument("--rounds", type=int, default=201, help="batches per variant; a tenth of it for passes")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))

    header, rows = measure.header(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        for num_shards in (4, 1100):
            folder = make_data(Path(temporary) / str(num_shards), num_shards=num_shards)
            for seq_len in (128, 2048):
                for batch in (16, 64):
                    times = read(folder, seq_len=seq_len, rows=batch, rounds=args.rounds)
                    what = f"{batch} x {seq_len} tokens of {num_shards:,} shards"
                    rows += [{"what": what, "way": way, **measure.summary(times[way])} for way in times]
        times = start_passes(Path(temporary) / "4", rounds=max(5, args.rounds // 10))
        rows += [{"what": "pass", "way": way, **measure.summary(times[way])} for way in times]
    rivals = {row["what"]: row["seconds"] for row in rows if not row["way"].startswith("ours")}
    shown = [
        {
            "what": row["what"],
            "way": row["way"],
            "ms": 1e3 * row["seconds"],
            "spread": f"{row['spread']:.0%}",
            "time": row["seconds"] / rivals[row["what"]],
        }
        for row in rows
    ]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    measure.publish(args.output, header | {"settings": settings, "rows": rows}, shown)


if __name__ == "__main__":
    main()
