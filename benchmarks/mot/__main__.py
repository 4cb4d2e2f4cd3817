"""Mixture of transformers in three stages against end to end and ten controls, on clusters of classes.

    python -m benchmarks.mot --output outputs/mot [--seeds 0 1 2] [--publish docs/results/mot]

A run is (data, arm, seed). The same command resumes, also from published results (--known).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.runner import machine
from benchmarks.mot.arms import ARMS, DATA, cells
from benchmarks.mot.model import train
from benchmarks.mot.page import page
from titan_attent.data.io.atomic import write_atomically

STEPS, RATE = 600, 0.02


def run(data: str, arm: str, seed: int, *, steps: int = STEPS, rate: float = RATE) -> dict[str, Any]:
    """One run: its looks, and its seconds of a core."""
    start = time.process_time()
    looks = [look._asdict() for look in train(ARMS[arm], DATA[data], seed=seed, steps=steps, rate=rate)]
    result = {"data": data, "arm": arm, "seed": seed, "steps": steps, "rate": rate, "looks": looks}
    return result | {"seconds": time.process_time() - start, "machine": machine()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mot", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and the picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of a run (default {STEPS}); a third per stage")
    parser.add_argument("--rate", type=float, default=RATE, help=f"learning rate of all arms (default {RATE})")
    parser.add_argument("--known", type=Path, help="published results (.json), which are not measured again")
    parser.add_argument("--publish", type=Path, help="write page, results and picture to this path, .md, .json, .png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    file: Path = args.output / "results.json"
    results: dict[str, Any] = {}
    for known in (args.known, file):
        if known is not None and known.is_file():
            results |= json.loads(known.read_bytes())["results"]
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for data, arm in cells():
            key = f"{data}/{arm}/{args.steps}/{args.rate}/{seed}"
            if key not in results:
                results[key] = run(data, arm, seed, steps=args.steps, rate=args.rate)
                last = results[key]["looks"][-1]
                print(f"{key}: loss {last['loss']:.4f}, purity {last['purity']:.2f}", flush=True)
                write_atomically(file, (json.dumps({"results": results}, indent=1) + "\n").encode())
    own = [
        one
        for one in results.values()
        if (one["steps"], one["rate"]) == (args.steps, args.rate) and one["seed"] in args.seeds
    ]
    text = page(own)
    print(text)
    from benchmarks.mot.picture import draw  # matplotlib takes seconds to import

    path = args.publish or args.output / "mot"
    draw(own, path.with_suffix(".png"))
    if args.publish:
        args.publish.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        content = json.dumps({"results": dict(sorted(results.items()))}, separators=(",", ":")) + "\n"
        args.publish.with_suffix(".json").write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
