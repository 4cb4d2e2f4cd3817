"""The evidence: what teaching saves in a single pass over data of which a run sees 40%, all costs charged.

    python benchmarks/evidence.py --output outputs/evidence --texts outputs/texts --wiki FILE [--seeds 0 1 2]
        [--rules ...] [--corpora ...] [--jobs 2]

A run is one (corpus, rule, seed): the product's own command on one process, fp32, a three-layer decoder of 0.9 M
parameters, 32 rows of 96 tokens a step, a learning rate that falls linearly to zero at the run's own end. The corpora
are those of evidence_corpora.py; all that tells two rules apart stands in evidence_rules.py.

    DIR/corpora/                       the data sets
    DIR/scorers/CORPUS/seed-N/         an amateur, an expert, their losses: made by titan_attent.scorers
    DIR/runs/CORPUS/RULE/seed-N/       config.toml, log.txt, tb/, teacher/trace.jsonl; result.json once it has finished
    DIR/results.json, DIR/table.md     all that has finished so far

Called again, it goes on: what has a result.json is kept, what was interrupted starts again.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from convergence_rules import Task
from convergence_runs import run_tasks
from corpora import KINDS_FILE, write_rows
from evidence_corpora import CORPORA, SEQ_LEN, build
from evidence_rules import RULES, data_of, kinds_task, rule_task, scorers_task, scores_folder
from evidence_table import gather, report

from titan_attent.data.format import INDEX_FILE
from titan_attent.data.shards import TokenDataset
from titan_attent.data.tokenizer import Tokenizer


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What teaching saves in a single pass, all costs charged.",
        epilog="\n".join(f"  {name:18}{rule.about}" for name, rule in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--texts", type=Path, required=True, metavar="DIR", help="where the texts are, or will be")
    parser.add_argument("--wiki", type=Path, metavar="FILE", help="a file of WikiText-2, for prose")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="see below")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA), metavar="CORPUS")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each; 0 only makes the table")
    return parser.parse_args(argv)


def runs(args: argparse.Namespace, seed: int) -> Iterator[Task]:
    """Of one seed; a rule that needs data which a corpus has not (nothing was duplicated) is left out there."""
    for name in args.rules:
        for corpus in args.corpora:
            if (args.output / "corpora" / data_of(corpus, RULES[name], seed) / INDEX_FILE).is_file():
                yield rule_task(corpus, name, seed)


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
    tokenizer = Tokenizer.from_info(dataset.shards.tokenizer_info, source)
    write_rows(folder, rows, tokenizer=tokenizer)
    np.save(folder / KINDS_FILE, np.load(source / KINDS_FILE)[keep])


def run_all(args: argparse.Namespace) -> list[str]:
    """Scorers, then runs, seed by seed; returns the folders of what failed."""
    failed: list[str] = []
    for seed in args.seeds:
        if any(RULES[name].reads_scores for name in args.rules):
            failed += run_tasks(args.output, [scorers_task(corpus, seed) for corpus in args.corpora], jobs=args.jobs)
            for corpus in args.corpora:
                write_middle(args.output, corpus, seed)
        tasks = list(runs(args, seed))
        failed += run_tasks(args.output, tasks, jobs=args.jobs)
        several = [task.labels for task in tasks if len(CORPORA[task.labels["corpus"]].wanted) > 1]
        asked = [kinds_task(label["corpus"], label["rule"], seed) for label in several]
        asked = [task for task in asked if (args.output / task.folder).parent.joinpath("result.json").is_file()]
        failed += run_tasks(args.output, asked, jobs=args.jobs)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end, too
    command = shlex.join(["python", "benchmarks/evidence.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        manifest = build(args.output / "corpora", texts_folder=args.texts, wiki=args.wiki)
        try:
            failed = run_all(args) if args.jobs > 0 else []
        finally:  # what has finished is kept when the rest is interrupted
            text = report(args.output, gather(args.output), duplicates=manifest["duplicates"], command=command)
    except (ValueError, RuntimeError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    print(text)
    print(json.dumps({"failed": failed}) if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
