"""The single-pass experiment: what teaching saves when a run sees 40% of the data once, all costs charged.

    python -m benchmarks.single_pass --output outputs/evidence --texts outputs/texts --wiki FILE [--seeds 0 1 2]
        [--rules ...] [--corpora ...] [--known FILE ...] [--jobs 2]

A run is one (corpus, rule, seed): the product's own command on one process, fp32, a three-layer decoder of 0.9 M
parameters, 32 rows of 96 tokens per step, a learning rate that falls linearly to zero at the run's own end. The corpora
are defined in corpora.py, the rules in rules.py.

    DIR/corpora/                       the data sets
    DIR/scorers/CORPUS/seed-N/         an amateur, an expert, their losses: written by titan_attent.score pair
    DIR/runs/CORPUS/RULE/seed-N/       config.toml, log.txt, tb/, teacher/trace.jsonl; result.json once it has finished
    DIR/results.json, DIR/table.md     all results so far
    DIR/single_pass.png, differences.png

A second call resumes: runs with a result.json are kept, interrupted ones start again. ``--known`` names files
results.json of earlier calls or other machines: their runs are not repeated where configuration and data are equal.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.runner import run_tasks
from benchmarks.common.tasks import Task
from benchmarks.common.torchrun import Torchrun
from benchmarks.corpora.stdlib_code import KINDS_FILE, write_rows
from benchmarks.single_pass.corpora import CORPORA, SEQ_LEN, build
from benchmarks.single_pass.numbers import charge
from benchmarks.single_pass.pictures import draw_curves, draw_differences
from benchmarks.single_pass.results import data_fingerprint, gather, read_known
from benchmarks.single_pass.rules import RULES, data_of, kinds_task, rule_task, scored_data, scorers_task, scores_folder
from benchmarks.single_pass.table import report
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.scores.stored import SCORES_FILE


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.single_pass",
        description="What teaching saves in a single pass, all costs charged.",
        epilog="\n".join(f"  {name:18}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for data, runs and tables")
    parser.add_argument(
        "--texts", type=Path, required=True, metavar="DIR", help="folder of the texts; they are downloaded if missing"
    )
    parser.add_argument("--wiki", type=Path, metavar="FILE", help="a file of WikiText-2, for prose")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="see below")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA), metavar="CORPUS")
    parser.add_argument("--known", type=Path, nargs="+", default=[], metavar="FILE", help="results.json of other calls")
    parser.add_argument(
        "--jobs", type=int, default=2, help="parallel runs, one core each; 0 only writes the tables and pictures"
    )
    return parser.parse_args(argv)


def runs(args: argparse.Namespace, seed: int, known: Container[str], fingerprints: dict[str, str]) -> Iterator[Task]:
    """The runs of one seed, without ``known`` ones and corpora that a rule is not for. Their labels name the data."""
    for name in args.rules:
        for corpus in args.corpora:
            task = rule_task(corpus, name, seed)
            if RULES[name].is_for(corpus) and task.folder not in known:
                data = data_fingerprint(fingerprints, corpus, name, seed)
                yield replace(task, labels=task.labels | {"data_fingerprint": data})


def write_middle(output: Path, corpus: str, seed: int) -> None:
    """The rows between the quartiles of the amateur's losses, as a data set (Ankner et al. 2024, their "medium")."""
    source, folder = output / "corpora" / corpus, output / "corpora" / data_of(corpus, RULES["perplexity"], seed)
    if (folder / INDEX_FILE).is_file():
        return
    dataset = TokenDataset(source, seq_len=SEQ_LEN)
    losses = np.fromfile(output / scores_folder(corpus, seed) / "amateur" / "losses.bin", "<f4")
    low, high = np.quantile(losses, [0.25, 0.75])
    keep = (losses >= low) & (losses < high)
    rows = dataset.shards.read(0, len(dataset) * SEQ_LEN).reshape(-1, SEQ_LEN)[keep]
    tokenizer = open_tokenizer(dataset.shards.tokenizer_info, source)
    write_rows(folder, rows, tokenizer=tokenizer)
    np.save(folder / KINDS_FILE, np.load(source / KINDS_FILE)[keep])


def run_all(args: argparse.Namespace, known: Container[str], fingerprints: dict[str, str]) -> list[str]:
    """Scorers, then runs, seed by seed; returns the folders of failed tasks."""
    failed: list[str] = []
    for seed in args.seeds:
        tasks = list(runs(args, seed, known, fingerprints))
        labels = [(task.labels["corpus"], RULES[task.labels["rule"]]) for task in tasks]
        scored = {scored_data(corpus, rule): corpus for corpus, rule in labels if rule.scorers}
        scorers = [scorers_task(corpus, seed, data=data) for data, corpus in scored.items()]
        failed += run_tasks(args.output, scorers, jobs=args.jobs, starter=Torchrun())
        for corpus in (task.labels["corpus"] for task in tasks if RULES[task.labels["rule"]].data == "middle"):
            if (args.output / scores_folder(corpus, seed) / "amateur" / SCORES_FILE).is_file():
                write_middle(args.output, corpus, seed)
        # Runs without data are left out: no rows were duplicates, or the scorers failed.
        tasks = [task for task in tasks if (args.output / task.config["data"]["path"] / INDEX_FILE).is_file()]
        failed += run_tasks(args.output, tasks, jobs=args.jobs, starter=Torchrun())
        several = [task.labels for task in tasks if len(CORPORA[task.labels["corpus"]].target) > 1]
        scoring = [kinds_task(label["corpus"], label["rule"], seed) for label in several]
        scoring = [task for task in scoring if (args.output / task.folder).parent.joinpath("result.json").is_file()]
        failed += run_tasks(args.output, scoring, jobs=args.jobs, starter=Torchrun())
    return failed


def write_all(output: Path, *, manifest: dict[str, Any], known: dict[str, dict[str, Any]], command: str) -> str:
    """Write the tables and pictures of all finished runs; returns the tables."""
    results = charge(gather(output, fingerprints=manifest["fingerprints"], known=known))
    text = report(output, results, duplicates=manifest["duplicates"], command=command)
    if results:
        draw_curves(results, output / "single_pass.png")
        draw_differences(results, output / "differences.png")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended, too
    command = shlex.join(["python", "-m", "benchmarks.single_pass", *(sys.argv[1:] if argv is None else argv)])
    try:
        manifest = build(args.output / "corpora", texts_folder=args.texts, wiki=args.wiki)
        prints = manifest["fingerprints"]
        known = read_known(args.known, output=args.output, fingerprints=prints)
        gather(args.output, fingerprints=prints)  # before the first run: refuses runs with other settings
        try:
            failed = run_all(args, known, prints) if args.jobs > 0 else []
        finally:  # finished runs are in the tables even after an interrupt
            text = write_all(args.output, manifest=manifest, known=known, command=command)
    except (ValueError, RuntimeError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    print(text)
    print(json.dumps({"failed": failed}) if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
