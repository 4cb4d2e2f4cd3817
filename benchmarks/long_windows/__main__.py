"""The recommended rule where it could harm: long windows, and trusted text of another kind.

    python -m benchmarks.long_windows --output outputs/long_windows --seeds 0 1 2 [--publish docs/results/long_windows]

    windows      documents of 200 to 2,000 tokens, of code, of tables and of base64, shuffled, in windows of 1,024
                 tokens; trusted text and validation are code
    other_kind   Python modules, mixed with character tables, in rows of 128 tokens; validation is Python, the trusted
                 text C headers

The text is real: from the running Python's library (scripts/quickstart_data.py) and its C headers. Every run is the
product's own command with one process on the CPU. All rules take equal steps of equal tokens, with no key set by hand:

    uniform             everything, in windows
    recommended         strategy = "difference" on windows
    spans               the same scores with level = "span": every window, but bad documents in it have no loss
    documents           strategy = "difference" with data.unit = "document": documents are selected, and packed
    uniform_documents   everything, in packed documents: what packing alone changes
    oracle              uniform on the code alone, in windows: what a perfect selection of documents could reach
    oracle_documents    the same in packed documents

All are validated on windows of the same text. The results have the scorers' seconds. Cost: 15 minutes of a core per
seed.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import interval

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m"]
CONFIG = ["--job.config_file", "train_configs/quickstart.toml", "--training.mixed_precision_param", "float32"]
RULES = {
    "windows": ("uniform", "recommended", "spans", "documents", "uniform_documents", "oracle", "oracle_documents"),
    "other_kind": ("uniform", "recommended"),
}
"""Case -> its rules; "uniform" first, which the others are compared with."""
CASES: dict[str, dict[str, Any]] = {
    "windows": {"seq_len": 1024, "batch": 2, "steps": 400, "document": (600, 6000)},
    "other_kind": {"seq_len": 128, "batch": 16, "steps": 300, "document": (65_536, 65_536)},
}
"""seq_len: tokens per example; batch: examples per step; document: least and most characters of a document."""

SAID = r"(The scores ask for .*?, the best first|The run (?:selects|masks) nothing and trains [^.]*)"
"""The warnings of a run that the table lists."""


def run(arguments: Sequence[Any], log: Path) -> str:
    """Run a command in the checkout; returns its output, also kept in ``log``. RuntimeError with its end on failure."""
    log.parent.mkdir(parents=True, exist_ok=True)
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
    return text


def documents(texts: Path, case: str, seed: int) -> dict[str, list[str]]:
    """The texts of a case: "train", "trusted" and "validation"."""

    def of(name: str) -> list[str]:
        return [json.loads(line)["text"] for line in open(texts / f"{name}.jsonl", encoding="utf-8")]

    least, most = CASES[case]["document"]
    random_sizes = random.Random(seed)

    def cut(whole: list[str]) -> list[str]:
        """Cut texts at random lengths, whose logarithms are uniform; ends below 200 characters are dropped."""
        parts = []
        for text in whole:
            while len(text) > min(200, most):
                size = round(least * (most / least) ** random_sizes.random())
                parts.append(text[:size])
                text = text[size:]
        return parts

    code = cut(of("code"))
    train = code + cut(of("tables") + of("encoded") if case == "windows" else of("tables"))
    random.Random(seed).shuffle(train)
    if case == "windows":
        kept = set(code)
        clean = [text for text in train if text in kept]
        return {"train": train, "clean": clean, "trusted": cut(of("trusted")), "validation": cut(of("validation"))}
    headers = sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h"))
    trusted = [path.read_text(encoding="utf-8", errors="ignore") for path in headers]
    return {"train": train, "trusted": trusted, "validation": of("trusted") + of("validation")}


def write_data(folder: Path, texts: Path, case: str, seed: int) -> None:
    for name, parts in documents(texts, case, seed).items():
        if (folder / name / "index.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in parts), encoding="utf-8")
        tokenizer = "train:1024" if name == "train" else folder / "train" / "tokenizer.tiktoken"
        writer = [sys.executable, "-m", "titan_attent.data.text", source, "--output", folder / name]
        run([*writer, "--tokenizer", tokenizer], folder / f"{name}.log")


def train(folder: Path, case: str, rule: str, seed: int) -> dict[str, Any]:
    """Run one rule; returns its final loss, its selection and its warnings."""
    shape, steps = CASES[case], CASES[case]["steps"]
    data = folder / ("clean" if rule.startswith("oracle") else "train")
    base = [*CONFIG, "--data.path", data, "--data.validation_path", folder / "validation"]
    base += ["--training.seq_len", shape["seq_len"], "--training.local_batch_size", shape["batch"]]
    base += ["--training.global_batch_size", shape["batch"], "--validation.seq_len", shape["seq_len"]]
    base += ["--validation.local_batch_size", shape["batch"], "--data.seed", seed]
    base += ["--data.unit", "document" if rule.endswith("documents") else "window", "--data.validation_unit", "window"]
    scorers = folder / f"scorers_{'recommended' if rule == 'spans' else rule}"
    seconds = 0.0
    teacher: list[Any] = ["--teacher.strategy", "uniform"]
    selects = rule in ("recommended", "documents")
    if selects:
        command = [*LAUNCH, "titan_attent.score", "pair", "--trusted", folder / "trusted", "--output", scorers, *base]
        run(command, folder / f"scorers_{rule}.log")
        seconds = sum(json.loads((scorers / "scorers.json").read_bytes())["seconds"].values())
        teacher = ["--teacher.scores", scorers]
        teacher += ["--teacher.seed", seed]
    if rule == "spans":  # RULES has it behind the rule whose scores it reads
        seconds = sum(json.loads((scorers / "scorers.json").read_bytes())["seconds"].values())
        teacher = ["--teacher.scores", scorers, "--teacher.level", "span", "--teacher.seed", seed]
    ends = ["--training.steps", steps, "--validation.freq", steps, "--checkpoint.no-enable", "--debug.seed", seed]
    dump = folder / "runs" / rule
    text = run(
        [*LAUNCH, "titan_attent.train", *base, *ends, "--job.dump_folder", dump, *teacher], folder / f"{rule}.log"
    )
    losses = dict(re.findall(r"validate step: +(\d+) +loss: +([0-9.]+)", text))
    decided = {"teacher/ratio": 1.0, "teacher/repeats": None}
    if selects:
        decided = json.loads((dump / "teacher" / "rounds.jsonl").read_text().splitlines()[0])
    if rule == "spans":
        masked = json.loads((dump / "teacher" / "spans.jsonl").read_text().splitlines()[0])["teacher/tokens_masked"]
        decided["teacher/ratio"] = 1.0 - masked
    return {
        "loss": float(losses[str(steps)]),
        "share": decided["teacher/ratio"],
        "repeats": decided["teacher/repeats"],
        "scorers_seconds": seconds,
        "said": re.findall(SAID, text),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Differences to uniform by case, rule and seed, and their means with 95% intervals."""
    lines = ["| case | rule | seeds | selected | repeats | rule - uniform, nats |", "|---|---|---|---|---|---|"]
    for case in CASES:
        found = [result for name, result in sorted(results.items()) if name.startswith(f"{case}/")]
        for rule in RULES[case][1:]:
            pairs = [result for result in found if rule in result]
            if not pairs:
                continue
            runs = [pair[rule] for pair in pairs]
            differences = [pair[rule]["loss"] - pair["uniform"]["loss"] for pair in pairs]
            shares = ", ".join(f"{run['share']:.1%}" for run in runs)
            repeats = ", ".join("" if run["repeats"] is None else f"{run['repeats']:.1f}" for run in runs)
            each = ", ".join(f"{difference:+.3f}" for difference in differences)
            row = (case, rule, str(len(pairs)), shares, repeats, f"{interval(differences)} ({each})")
            lines.append(f"| {' | '.join(row)} |")
    said = {line for result in results.values() for run in result.values() for line in run["said"]}
    return "\n".join([*lines, "", "Warnings of the runs:", "", *(f"- {line}" for line in sorted(said))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_windows", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the data, the runs and results.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--publish", type=Path, help="write the table and the results to this path with .md and .json")
    args = parser.parse_args(argv)
    output: Path = args.output.resolve()
    texts, file = output / "texts", output / "results.json"
    if not (texts / "validation.jsonl").is_file():
        run([sys.executable, "scripts/quickstart_data.py", texts, "--whole"], output / "texts.log")
    results = json.loads(file.read_bytes()) if file.is_file() else {}
    for seed in args.seeds:
        for case in args.cases:
            folder = output / f"{case}_{seed}"
            result = results.setdefault(f"{case}/{seed}", {})
            for rule in RULES[case]:
                if rule not in result:
                    write_data(folder, texts, case, seed)
                    result[rule] = train(folder, case, rule, seed)
                    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = table(results)
    print(text)
    if args.publish:
        seeds = " ".join(map(str, args.seeds))
        command = f"    python -m benchmarks.long_windows --output outputs/long_windows --seeds {seeds}"
        page = f"# Long windows and foreign trusted text\n\n{command}\n\n{text}\n"
        args.publish.with_suffix(".md").write_text(page, encoding="utf-8")
        args.publish.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
