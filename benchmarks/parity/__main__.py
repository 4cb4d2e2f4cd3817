"""The twelve cells of k-parity: four ways of training and three k, by the one-layer model of Kim and Suzuki.

    python -m benchmarks.parity --output outputs/parity [--seeds 0 1 2] [--publish docs/results/parity]

A run is (way, k, rows, seed): it ends once the model answers every test row in two looks, or after 1,000 epochs. Cost:
README.md. The same command resumes, also from published results (--known).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.runner import machine
from benchmarks.parity.model import METHODS, RATES, draw, train
from benchmarks.parity.page import page
from titan_attent.data.io.atomic import write_atomically

BITS, TEST_ROWS = 64, 5000
EPOCHS, EVERY = 1000, 25
"""Of the longest run, and between two looks at its test rows."""


def run(name: str, k: int, rows: int, seed: int) -> dict[str, Any]:
    """One run: its looks, and its seconds."""
    start = time.monotonic()
    tree, drawn = draw(BITS, k, rows + TEST_ROWS, seed)
    bits, test = drawn[:, :rows].contiguous(), drawn[:, rows:].contiguous()
    looks: list[dict[str, float]] = []
    for epoch, loss, accuracy in train(name, tree, bits, test, rate=RATES[k], epochs=EPOCHS, every=EVERY):
        looks.append({"epoch": epoch, "loss": loss, "accuracy": accuracy})
        if len(looks) > 1 and all(look["accuracy"] == 1.0 for look in looks[-2:]):
            break
    return {"method": name, "k": k, "rows": rows, "seed": seed, "looks": looks, "seconds": time.monotonic() - start}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--k", type=int, nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rows", type=int, default=20_000, help="training rows (default 20000; the paper: 100000)")
    parser.add_argument("--known", type=Path, help="published results (.json), which are not measured again")
    parser.add_argument("--publish", type=Path, help="write the page and the results to this path with .md and .json")
    args = parser.parse_args(argv)
    file: Path = args.output / "results.json"
    results: dict[str, Any] = {}
    for known in (args.known, file):
        if known is not None and known.is_file():
            results |= json.loads(known.read_bytes())["results"]
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for k in args.k:
            for name in args.methods:
                key = f"{name}/{k}/{args.rows}/{seed}"
                if key not in results:
                    results[key] = run(name, k, args.rows, seed) | {"machine": machine()}
                    last = results[key]["looks"][-1]
                    print(f"{key}: {last['accuracy']:.3f} at {last['epoch']}", flush=True)
                    write_atomically(file, (json.dumps({"results": results}, indent=1) + "\n").encode())
    text = page(list(results.values()))
    print(text)
    if args.publish:
        args.publish.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        content = json.dumps({"results": dict(sorted(results.items()))}, indent=1) + "\n"
        args.publish.with_suffix(".json").write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
