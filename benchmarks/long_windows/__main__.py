"""What is selected, windows or documents, where windows hold several documents; and foreign trusted text.

    python -m benchmarks.long_windows --output outputs/long_windows --seeds 0 1 2 [--publish docs/results/long_windows]

A case is a corpus (corpora.py) in windows of 1,024 or 2,048 tokens. Every run is the product's own command with one
process on the CPU. All rules take equal steps of equal tokens, 0.8 M in all, decayed to zero, with no key set by hand:

    uniform             everything, in windows
    windows             strategy = "difference" on windows
    spans               the same scores with level = "span": every window, but bad documents in it have no loss
    documents           strategy = "difference" with data.unit = "document": documents are selected, and packed
    oracle              uniform on the wanted documents alone, packed: what a perfect selection could reach
    uniform_documents   everything, in packed documents: what packing alone changes
    uniform_rows        everything, in rows of 96 tokens, validated on such rows
    rows                strategy = "difference" on such rows, compared with uniform_rows
    unmasked            everything, in packed documents, validated on documents alone
    masked              the same with document_mask, compared with unmasked

All others are validated on windows of the same text. The scorers' seconds are printed beside those of a run.
Cost: 3 minutes of a core per run, 87 runs of three seeds, and 80 MB of downloads. The same command resumes, also from
published results (--known).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import interval
from benchmarks.long_windows.corpora import ROOT, corpus

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m"]
CONFIG = ["--job.config_file", "train_configs/quickstart.toml", "--training.mixed_precision_param", "float32"]


@dataclass(frozen=True, kw_only=True)
class Case:
    corpus: str
    seq_len: int
    rules: tuple[str, ...]
    """What runs; a rule is behind the one whose scores it reads."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    data: str = "train"
    unit: str = "window"
    scores: str = ""
    """Name of the scorers' folder; "": uniform."""
    level: str = "example"
    compared_with: str = "uniform"
    seq_len: int = 0
    """Not 0: in rows of so many tokens, not in the case's windows."""
    validation_unit: str = "window"
    mask: bool = False
    """Packed documents do not see each other."""


STEPS, TOKENS = 400, 2048
"""Steps of a run, and tokens of each."""
SHORT = 96
MAIN = ("uniform", "windows", "spans", "documents", "oracle")
RULES = {
    "uniform": Rule(),
    "windows": Rule(scores="windows"),
    "spans": Rule(scores="windows", level="span"),
    "documents": Rule(unit="document", scores="documents"),
    "oracle": Rule(data="clean", unit="document"),
    "uniform_documents": Rule(unit="document"),
    "uniform_rows": Rule(seq_len=SHORT, compared_with="uniform_rows"),
    "rows": Rule(seq_len=SHORT, scores="rows", compared_with="uniform_rows"),
    "unmasked": Rule(unit="document", validation_unit="document", compared_with="unmasked"),
    "masked": Rule(unit="document", validation_unit="document", mask=True, compared_with="unmasked"),
}
CASES = {
    f"{name} {seq_len:,}": Case(corpus=name, seq_len=seq_len, rules=rules)
    for name, seq_len, rules in (
        ("stdlib", 1024, tuple(RULES)),
        ("manual", 1024, (*MAIN, "unmasked", "masked")),
        ("stdlib", 2048, MAIN),
        ("manual", 2048, MAIN),
        ("junk", 1024, MAIN),
        ("other_kind", 128, ("uniform", "windows")),
    )
}

SAID = (
    r"(The scores ask for .*?, the best first|The run (?:selects|masks) nothing and trains [^.]*"
    r"|Trained uniformly: [^.]*)"
)
"""The warnings of a run that the page lists."""


def run(arguments: Sequence[Any], log: Path) -> tuple[str, float]:
    """Run a command in the checkout: its output, also kept in ``log``, and seconds. RuntimeError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    done = subprocess.run(
        [str(word) for word in arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    log.write_text(text, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{log}: {text[-2000:]}")
    return text, time.monotonic() - start


def write_data(folder: Path, name: str, texts: Path, seed: int) -> None:
    """Write the corpus as token shards, with a tokenizer made from its training text; folders that exist stay."""
    parts = ("train", "clean", "trusted", "validation")
    if all((folder / part / "index.json").is_file() for part in parts):
        return
    documents = corpus(name, texts / ("packages" if name in ("manual", "junk") else "stdlib"), seed)
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        source = folder / f"{part}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[part]), encoding="utf-8")
        tokenizer = "train:1024" if part == "train" else folder / "train" / "tokenizer.tiktoken"
        writer = [sys.executable, "-m", "titan_attent.data.text", source, "--output", folder / part]
        run([*writer, "--tokenizer", tokenizer], folder / f"{part}.log")


def train(data: Path, folder: Path, case: Case, rule: Rule, seed: int) -> dict[str, Any]:
    """Run one rule: its final loss, its selection, the seconds of its commands and its warnings."""
    seq_len = rule.seq_len or case.seq_len
    batch = TOKENS // seq_len
    steps = round(STEPS * TOKENS / (seq_len * batch))
    base = [*CONFIG, "--data.path", data / rule.data, "--data.validation_path", data / "validation"]
    base += ["--training.seq_len", seq_len, "--training.local_batch_size", batch]
    base += ["--training.global_batch_size", batch, "--validation.seq_len", seq_len]
    base += ["--validation.local_batch_size", batch, "--data.seed", seed]
    base += ["--data.unit", rule.unit, "--data.validation_unit", rule.validation_unit]
    if rule.mask:
        base += ["--data.document_mask", "--model.flavor", "bench_flex"]
    teacher: list[Any] = ["--teacher.strategy", "uniform"]
    scoring = 0.0
    if rule.scores:
        scorers = folder.parent / f"scorers_{rule.scores}"
        if not (scorers / "scorers.json").is_file():
            command = [*LAUNCH, "titan_attent.score", "pair", "--trusted", data / "trusted", "--output", scorers]
            run([*command, *base], folder.parent / f"scorers_{rule.scores}.log")
        scoring = sum(json.loads((scorers / "scorers.json").read_bytes())["seconds"].values())
        teacher = ["--teacher.scores", scorers, "--teacher.level", rule.level, "--teacher.seed", seed]
    ends = ["--training.steps", steps, "--validation.freq", steps, "--checkpoint.no-enable", "--debug.seed", seed]
    ends += ["--job.dump_folder", folder]
    text, seconds = run([*LAUNCH, "titan_attent.train", *base, *ends, *teacher], folder.with_suffix(".log"))
    losses = dict(re.findall(r"validate step: +(\d+) +loss: +([0-9.]+)", text))
    share, repeats = 1.0, None
    if rule.level == "span":
        decided = json.loads((folder / "teacher" / "spans.jsonl").read_text().splitlines()[0])
        share -= decided["teacher/tokens_masked"]
    elif rule.scores:
        decided = json.loads((folder / "teacher" / "rounds.jsonl").read_text().splitlines()[0])
        share, repeats = decided["teacher/ratio"], decided["teacher/repeats"]
    return {
        "loss": float(losses[str(steps)]),
        "share": share,
        "repeats": repeats,
        "seconds": seconds,
        "scorers_seconds": scoring,
        "said": re.findall(SAID, text),
    }


# -- the page ---------------------------------------------------------------------------------------------------------


def gains(results: dict[str, Any], case: str, rule: str) -> list[float]:
    """By seed: nats that the rule ends below the one it is compared with."""
    other = RULES[rule].compared_with
    found = [result for name, result in sorted(results.items()) if name.rpartition("/")[0] == case]
    return [pair[other]["loss"] - pair[rule]["loss"] for pair in found if rule in pair and other in pair]


def table(results: dict[str, Any], case: str) -> list[str]:
    """Of one case: the differences to uniform by rule and seed, and their means with 95% intervals."""
    lines = ["| rule | kept | repeats | rule - uniform, nats | scorers, seconds |", "|---|---|---|---|---|"]
    found = [result for name, result in sorted(results.items()) if name.rpartition("/")[0] == case]
    for rule in CASES[case].rules:
        runs = [result[rule] for result in found if rule in result]
        if not runs:
            continue
        losses = ", ".join(f"{run['loss']:.3f}" for run in runs)
        differences = [-gain for gain in gains(results, case, rule)]
        each = ", ".join(f"{difference:+.3f}" for difference in differences)
        value = f"loss {losses}" if rule == RULES[rule].compared_with else f"{interval(differences)} ({each})"
        shares = ", ".join(f"{run['share']:.1%}" for run in runs) if RULES[rule].scores else ""
        repeats = ", ".join("" if run["repeats"] is None else f"{run['repeats']:.1f}" for run in runs).strip(", ")
        scoring = statistics.median(run["scorers_seconds"] for run in runs)
        row = (rule, shares, repeats, value, f"{scoring:.1f}" if scoring else "")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def goals(results: dict[str, Any]) -> list[str]:
    """Means over the seeds: the gain of documents as a share of the oracle's and of that of rows of 96 tokens."""
    lines = ["| case | windows of oracle's gain | documents of oracle's gain (90%) | documents of rows' gain (90%) |"]
    lines.append("|---|---|---|---|")
    for case in CASES:
        mean = {rule: statistics.fmean(of) for rule in RULES if (of := gains(results, case, rule))}
        if not {"documents", "windows", "oracle"} <= mean.keys():
            continue
        shares = [mean[rule] / mean["oracle"] for rule in ("windows", "documents")]
        shares += [mean["documents"] / mean["rows"]] if "rows" in mean else []
        lines.append(f"| {' | '.join([case, *(f'{share:.0%}' for share in shares), ''][:4])} |")
    return lines


def page(results: dict[str, Any]) -> str:
    parts = []
    for case in CASES:
        seeds = sum(name.rpartition("/")[0] == case for name in results)
        if seeds:
            parts += [f"## {case} tokens, {seeds} seed{'s'[: seeds > 1]}", "", *table(results, case), ""]
    said = {line for result in results.values() for run in result.values() for line in run["said"]}
    quickest = min(run["seconds"] for result in results.values() for run in result.values())
    scoring = max(run["scorers_seconds"] for result in results.values() for run in result.values())
    parts += [f"The quickest run took {quickest:.0f} s, the slowest scorers {scoring:.1f} s, counting and scoring.", ""]
    return "\n".join(
        [*goals(results), "", *parts, "Warnings of the runs:", "", *(f"- {line}" for line in sorted(said))]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_windows", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the data, the runs and results.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--known", type=Path, help="published results (.json), which are not measured again")
    parser.add_argument("--jobs", type=int, default=1, help="(case, seed) pairs at a time; 0: the page alone")
    parser.add_argument("--publish", type=Path, help="write the table and the results to this path with .md and .json")
    args = parser.parse_args(argv)
    output: Path = args.output.resolve()
    file, lock = output / "results.json", threading.Lock()
    results: dict[str, Any] = {}
    for known in (args.known, file):
        if known is not None and known.is_file():
            for name, measured in json.loads(known.read_bytes()).items():
                results.setdefault(name, {}).update(measured)

    def finish(name: str, seed: int) -> None:
        case, data = CASES[name], output / "data" / f"{CASES[name].corpus}_{seed}"
        with lock:
            result = results.setdefault(f"{name}/{seed}", {})
        for rule in case.rules:
            if rule in result or rule not in args.rules:
                continue
            with lock:
                write_data(data, case.corpus, output / "texts", seed)
            folder = output / "runs" / f"{case.corpus}_{case.seq_len}_{seed}" / rule
            measured = train(data, folder, case, RULES[rule], seed)
            with lock:
                result[rule] = measured
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{name}/{seed} {rule}: {measured['loss']:.4f}", flush=True)

    if args.jobs:
        with ThreadPoolExecutor(args.jobs) as pool:
            for done in [pool.submit(finish, name, seed) for seed in args.seeds for name in args.cases]:
                done.result()
    text = page(results)
    print(text)
    if args.publish:
        seeds = " ".join(map(str, args.seeds))
        command = f"    python -m benchmarks.long_windows --output outputs/long_windows --seeds {seeds}"
        head = f"# Long windows: windows or documents; and foreign trusted text\n\n{command}"
        args.publish.with_suffix(".md").write_text(f"{head}\n\n{text}\n", encoding="utf-8")
        args.publish.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
