"""Adopting token files and reading them: against sha256sum, our own shards, and mosaicml-streaming.

    python -m benchmarks.speed.adopting --parts adopt read [--output docs/results/cpu/adopting.json]
    python -m benchmarks.speed.adopting --parts streaming --streaming-python PYTHON [--output ...]

Part "adopt": files of random ids in documents of mean length 1,000, adopted by one thread, the index and the files of
documents written, too. In turn with ``sha256sum`` of the same files and with hashlib (OpenSSL) on blocks of 8 MiB.
Times are seconds of CPU, since the machine may have other work; the rate is bytes of files per second.

Part "read": random windows, and documents in random order, of the same documents in our own shards and in each format.
One thread reads batches, the formats in turn.

Part "streaming": a pass over documents in random order on one core, by StreamingDataset of mosaicml-streaming and by
the loader of a run (documents.py) on the same MDS files, adopted, and on our own shards.
"""

import argparse
import hashlib
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import torch

from benchmarks.common import measure
from benchmarks.speed.documents import compare, write_documents
from titan_attent.data.adopt.adopt import adopt
from titan_attent.data.adopt.options import Options
from titan_attent.data.text.bpe import format_ranks
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenDataset, TokenShards

NUM_RANKS = 50_256
"""The eos is the next id."""
MEAN_LENGTH = 1000
PARTS = ("adopt", "read", "streaming")


def write_ranks(path: Path) -> Path:
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes(divmod(number, 256)): 256 + number for number in range(NUM_RANKS - 256)}
    path.write_bytes(format_ranks(ranks))
    return path


def make_documents(num_tokens: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    count = num_tokens // MEAN_LENGTH
    lengths = np.clip(generator.lognormal(np.log(MEAN_LENGTH) - 0.5, 1.0, count), 2, 8192).astype(np.int64)
    documents = [generator.integers(0, NUM_RANKS, length, dtype=np.uint16) for length in lengths.tolist()]
    for document in documents:
        document[-1] = NUM_RANKS
    return documents


def formats(documents: list[np.ndarray]) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Name -> a writer of the files, which returns the options for adopting them."""
    # The tests' writers, from the descriptions of the bytes; adopt_real.py compares them with the real ones.
    sys.path.insert(0, str(measure.ROOT / "tests"))
    import token_files

    quarter = -(-len(documents) // 4)
    parts = [documents[i : i + quarter] for i in range(0, len(documents), quarter)]

    def each(write: Callable[..., None], ending: str, **options: Any) -> Callable[[Path], dict[str, Any]]:
        def write_all(folder: Path) -> dict[str, Any]:
            folder.mkdir()
            for number, part in enumerate(parts):
                write(folder / f"part-{number}{ending}", part, **options)
            return {"dtype": "uint16"} if ending == ".bin" else {}

        return write_all

    def mds(encoding: str) -> Callable[[Path], dict[str, Any]]:
        return lambda folder: token_files.mds(folder, parts, encoding=encoding) or {}

    return {
        "bare uint16": each(token_files.raw, ".bin"),
        "Megatron uint16": each(token_files.megatron, ""),
        "datatrove uint16": each(token_files.datatrove, ".ds"),
        "datatrove uint32": each(token_files.datatrove, ".ds", dtype="<u4"),
        "MDS ndarray:uint16": mds("ndarray:uint16"),
        "MDS ndarray:int32": mds("ndarray:int32"),
        "litdata uint16": lambda folder: (
            token_files.litdata(folder, parts, data_format="no_header_tensor:20", dtype="<u2") or {}
        ),
    }


def cpu_seconds(*, children: bool) -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def hash_all(files: list[Path]) -> None:
    for path in files:
        sha256 = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**23):
                sha256.update(block)


def measure_adopting(folder: Path, tokenizer: Path, options: dict[str, Any], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU of each way, in every round."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    index = folder.parent / f"{folder.name} index"

    def adopt_all() -> None:
        for path in index.iterdir() if index.exists() else []:
            path.unlink()
        settings = Options(num_threads=1, **options)
        adopt([folder], tokenizer=str(tokenizer), options=settings, output=str(index), root=str(folder))

    adopt_all()
    tokenizer_seconds = min(cpu_of(lambda: load(tokenizer)) for _ in range(3))
    times: dict[str, list[float]] = {"adopt": [], "sha256sum": [], "hashlib": []}
    for _ in range(rounds):
        # Less the fixed cost of the tokenizer.
        times["adopt"].append(cpu_of(adopt_all) - tokenizer_seconds)
        times["sha256sum"].append(
            cpu_of(lambda: subprocess.run(["sha256sum", *files], stdout=subprocess.DEVNULL, check=True), children=True)
        )
        times["hashlib"].append(cpu_of(lambda: hash_all(files)))
    return times


def load(tokenizer: Path) -> None:
    from titan_attent.data.text.tokenizer import load_tokenizer

    one = load_tokenizer(str(tokenizer))
    one.info()
    one.save(tokenizer.parent)


def cpu_of(work: Callable[[], Any], *, children: bool = False) -> float:
    start = cpu_seconds(children=children)
    work()
    return cpu_seconds(children=children) - start


def measure_reading(folders: dict[str, Path], *, rounds: int) -> list[dict[str, Any]]:
    rows = []
    opened = {name: TokenShards(folder) for name, folder in folders.items()}
    for what, seq_len, batch in (("windows", 2048, 16), ("windows", 128, 64), ("documents", 8192, 32)):
        kind = TokenDataset if what == "windows" else DocumentDataset
        datasets = {name: kind(shards, seq_len=seq_len) for name, shards in opened.items()}
        generator, num = torch.Generator().manual_seed(0), len(datasets["our own shards"])
        ids = torch.zeros(batch, dtype=torch.int64)

        def draw(ids: torch.Tensor = ids, num: int = num, generator: torch.Generator = generator) -> None:
            ids.copy_(torch.randint(num, ids.shape, generator=generator))

        ways: dict[str, Callable[[], Any]] = {
            name: lambda dataset=dataset, ids=ids: dataset.read(ids) for name, dataset in datasets.items()
        }
        times = measure.interleave(ways, rounds=rounds, device="cpu", before=draw, warmup=50)
        own = statistics.median(times["our own shards"])
        for name, seconds in times.items():
            summary = measure.summary(seconds)
            rows.append(
                {"what": f"{batch} {what} of {seq_len}", "files": name, **summary, "ratio": summary["seconds"] / own}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Adopting token files, and reading them.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["adopt", "read"])
    parser.add_argument("--million-tokens", type=int, default=64, help="tokens of each format")
    parser.add_argument("--rounds", type=int, default=5, help="of adopting, and processes per variant of streaming")
    parser.add_argument("--batches", type=int, default=301, help="batches per format")
    parser.add_argument("--core", type=int, default=0, help="the core of the processes of streaming")
    parser.add_argument("--streaming-python", help="an interpreter with mosaicml-streaming, for part streaming")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header = measure.header()
    adopting, streaming = list[dict[str, Any]](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = write_ranks(folder / "ranks")
        documents = make_documents(args.million_tokens * 10**6)
        folders = {"our own shards": folder / "own" / "tokens"}
        write_documents(folders["our own shards"], iter(documents), vocab_size=NUM_RANKS + 1, eos_id=NUM_RANKS)
        for name, write in formats(documents).items() if args.parts != ["streaming"] else ():
            options = write(folder / name)
            num_bytes = sum(path.stat().st_size for path in (folder / name).iterdir() if path.is_file())
            times = measure_adopting(folder / name, tokenizer, options, rounds=args.rounds)
            medians = {way: statistics.median(seconds) for way, seconds in times.items()}
            adopting.append(
                {
                    "files": name,
                    "MB per CPU second": num_bytes / medians["adopt"] / 1e6,
                    "of sha256sum": medians["sha256sum"] / medians["adopt"],
                    "of hashlib": medians["hashlib"] / medians["adopt"],
                    "seconds": times,
                }
            )
            folders[name] = folder / f"{name} index"
            print(name, medians, file=sys.stderr, flush=True)
        reading = measure_reading(folders, rounds=args.batches) if "read" in args.parts else []
        if "streaming" in args.parts:
            streaming = measure_streaming(folder, tokenizer, args)
    shown = [{key: value for key, value in row.items() if key != "seconds"} for row in adopting]
    shown_reading = [
        {"what": row["what"], "files": row["files"], "ms": 1e3 * row["seconds"], "ratio": row["ratio"]}
        for row in reading
    ]
    shown_streaming = [
        {
            "way": row["way"],
            "million tokens per CPU second": row["tokens_per_cpu_second"] / 1e6,
            "ours, CPU": row["ours_to_tokens_per_cpu_second"],
            "ours": row["ours_to_tokens_per_second"],
        }
        for row in streaming
    ]
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "streaming_python")}
    result = header | {"settings": settings, "adopt": adopting, "read": reading, "streaming": streaming}
    measure.publish(args.output, result, *(rows for rows in (shown, shown_reading, shown_streaming) if rows))


def measure_streaming(folder: Path, tokenizer: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of documents.compare; "ours" are the MDS files that streaming wrote, adopted."""
    script = [args.streaming_python, "benchmarks/speed/documents_streaming.py"]
    mds, core = folder / "streaming", ["--core", str(args.core)]
    subprocess.run([*script, "write", folder / "own" / "tokens", mds], cwd=measure.ROOT, check=True)
    places = {"output": str(folder / "adopted" / "tokens"), "root": str(mds)}
    adopt([mds], tokenizer=str(tokenizer), **places)

    def worker(name: str) -> list[str]:
        module = ["-m", "benchmarks.speed.documents", "--worker", "ours"]
        return [sys.executable, *module, "--folder", str(folder / name), *core]

    commands = {
        "ours": worker("adopted"),
        "our own shards": worker("own"),
        "streaming": [*script, "read", str(mds), *core],
    }
    return compare(folder, commands, rounds=args.rounds, part="streaming")


if __name__ == "__main__":
    main()
