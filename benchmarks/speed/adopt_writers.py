"""The process of adopt_real.py that writes and reads with the packages themselves, which are no dependencies.

    PYTHON adopt_writers.py FOLDER

PYTHON is an interpreter with mosaicml-streaming, litdata and datatrove. For each format it writes the same documents with
the package's own writer, reads them with its own reader, and saves what the reader gave, as FOLDER/NAME.npz: all tokens
and the ends of the documents. This file imports nothing of the project.
"""

import argparse
from pathlib import Path

import numpy as np

EOS = 1000
ROW = 64


def make_documents() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 700, 400).tolist()
    return [np.append(generator.integers(0, EOS, length), EOS) for length in lengths]


def save(folder: Path, name: str, documents: list[np.ndarray], **more: np.ndarray) -> None:
    """What the reader of the format gave, document by document."""
    ends = np.cumsum([len(one) for one in documents])
    np.savez(folder / f"{name}.npz", tokens=np.concatenate(documents).astype(np.int64), ends=ends, **more)
    print(name, len(ends), "documents,", int(ends[-1]), "tokens", flush=True)


def mds(folder: Path, documents: list[np.ndarray]) -> None:
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]

    stream = np.concatenate(documents)
    rows = list(stream[: len(stream) // ROW * ROW].reshape(-1, ROW))
    cases = {
        "mds_int32": ("ndarray:int32", documents, None),
        "mds_dynamic": ("ndarray", documents, None),
        "mds_shape": (f"ndarray:uint16:{ROW}", rows, None),
        "mds_bytes": ("bytes", rows, None),
        "mds_zstd": ("ndarray:int32", documents, "zstd:7"),
        "mds_gz": ("ndarray:int32", documents, "gz"),
    }
    for name, (encoding, samples, compression) in cases.items():
        dtype = {"ndarray:int32": np.int32, "bytes": np.int64}.get(encoding, np.uint16)
        columns = {"tokens": encoding, "id": "int", "text": "str"}
        out = folder / name
        with MDSWriter(out=str(out), columns=columns, compression=compression, size_limit=2**16) as writer:
            for number, sample in enumerate(samples):
                tokens = sample.astype(dtype)
                value = tokens.tobytes() if encoding == "bytes" else tokens
                writer.write({"tokens": value, "id": number, "text": "t" * (number % 50)})
        local = folder / f"{name}_local" if compression else out
        remote = {"remote": str(out)} if compression else {}
        dataset = StreamingDataset(local=str(local), shuffle=False, batch_size=1, **remote)
        read = [dataset[i]["tokens"] for i in range(len(dataset))]
        del dataset
        clean_stale_shared_memory()
        save(folder, name, [np.frombuffer(one, dtype) if encoding == "bytes" else one for one in read])
        if compression:
            import shutil

            shutil.rmtree(local)


def litdata(folder: Path, documents: list[np.ndarray]) -> None:
    import torch
    from litdata.streaming import Cache, TokensLoader  # type: ignore[import-not-found]
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    for name, dtype in (
        ("litdata_int32", torch.int32),
        ("litdata_int64", torch.int64),
        ("litdata_uint16", torch.uint16),
    ):
        out = folder / name
        writer = BinaryWriter(str(out), chunk_bytes=2**15, item_loader=TokensLoader(block_size=ROW))
        for number, document in enumerate(documents):
            writer.add_item(number, torch.from_numpy(document).to(dtype))
        writer.done()
        writer.merge(1)
        # Its reader gives blocks of one length from the start of each chunk, and drops the rest.
        cache = Cache(str(out), chunk_bytes=2**15, item_loader=TokensLoader(block_size=ROW))
        blocks = [cache[i].numpy() for i in range(len(cache))]
        save(folder, name, documents, blocks=np.stack(blocks).astype(np.int64))


def datatrove(folder: Path, documents: list[np.ndarray]) -> None:
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile  # type: ignore[import-not-found]
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile  # type: ignore[import-not-found]
    from datatrove.utils.dataset import DatatroveFileDataset  # type: ignore[import-not-found]

    for size in (2, 4):
        out = folder / f"datatrove_{size}"
        file = TokenizedFile(str(out), "00000.ds", save_loss_metadata=True, token_size=size, save_final_metadata=True)
        masks = [np.arange(len(document)) % 3 > 0 for document in documents]
        for document, mask in zip(documents, masks, strict=True):
            file.write(document.tolist(), mask)
        file.close()
        read = DatatroveFileDataset(str(out / "00000.ds"), seq_len=ROW - 1, token_size=size)
        blocks = np.stack([read[i]["input_ids"].numpy() for i in range(len(read))]).astype(np.int64)
        save(folder, f"datatrove_{size}", documents, blocks=blocks, mask=np.concatenate(masks))
    out = folder / "megatron_datatrove"
    file = MegatronTokenizedFile(str(out), "a", token_size=2)
    for document in documents:
        file.write(document.tolist())
    file.close()
    save(folder, "megatron_datatrove", documents)


def main() -> None:
    parser = argparse.ArgumentParser(description="Token files by their own writers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=["mds", "litdata", "datatrove"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    documents = make_documents()
    for name in args.only:
        {"mds": mds, "litdata": litdata, "datatrove": datatrove}[name](args.folder, documents)


if __name__ == "__main__":
    main()
