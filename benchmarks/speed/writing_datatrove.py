"""The process of writing.py that writes with datatrove, which is no dependency of this project.

    PYTHON writing_datatrove.py FOLDER [--workers N] [--cores ...]    prints tokens and seconds

PYTHON is an interpreter with datatrove. FOLDER has jsonl/*.jsonl and tokenizer.json. With one worker the tokenizer has
a thread per core, else each worker has one. This file imports nothing of the project.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Documents by datatrove's DocumentTokenizer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    os.sched_setaffinity(0, args.cores)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if args.workers == 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(len(args.cores) if args.workers == 1 else 1)

    from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        out = Path(temporary) / "out"
        pipeline = [
            JsonlReader(str(args.folder / "jsonl")),
            DocumentTokenizer(
                output_folder=str(out),
                local_working_dir=str(Path(temporary) / "working"),
                tokenizer_name_or_path=str(args.folder / "tokenizer.json"),
                eos_token="<|endoftext|>",
                shuffle_documents=False,
            ),
        ]
        logs = str(Path(temporary) / "logs")
        executor = LocalPipelineExecutor(pipeline, tasks=args.workers, workers=args.workers, logging_dir=logs)
        start = time.perf_counter()
        executor.run()
        seconds = time.perf_counter() - start
        # Ids of two bytes.
        num_tokens = sum(path.stat().st_size for path in out.rglob("*.ds")) // 2
    print(json.dumps({"tokens": num_tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
