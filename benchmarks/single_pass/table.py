"""The tables of the single-pass experiment: all finished runs, from charged results (numbers.py)."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import interval
from benchmarks.common.tables import by_cell, by_rule, markdown, mean, write_report
from benchmarks.single_pass.corpora import CORPORA, KINDS
from benchmarks.single_pass.goals import make_goals
from benchmarks.single_pass.numbers import (
    Result,
    all_losses,
    columns_of,
    correlation,
    forecasts,
    paired,
    part_of_scorers,
    time_to_uniform,
)
from benchmarks.single_pass.rules import RULES

CHOOSING = ("difference", "attainment", "dedup", "perplexity")
"""The rules that select data and take as many steps as uniform."""


def make_table(results: Sequence[Result]) -> str:
    """Markdown: the final loss of uniform; for other rules the paired difference to it, with its 95% interval."""
    losses = all_losses(results)

    def cell(rule: str, column: str) -> str:
        own = losses.get((rule, column), {})
        if rule == "uniform":
            return f"{mean(own.values()):.3f}" if own else ""
        differences = paired(losses, rule, column)
        num_seeds = f" [{len(differences)}]" if len(differences) < 3 else ""
        return interval(differences) + num_seeds if differences else ""

    return by_rule(RULES, columns_of(losses), cell)


def make_times(results: Sequence[Result]) -> str:
    """Markdown: where the rules that select data, and uniform itself, first reached uniform's final loss."""
    controls, cells = by_cell(results), by_cell(results, lambda result: result)

    def cell(rule: str, corpus: str) -> str:
        own = cells.get((rule, corpus), {}).values()
        at = time_to_uniform(own, controls.get(("uniform", corpus), {}))
        if at is None:
            return ""
        step, tokens, seconds = at
        return "-" if math.isinf(step) else f"{step:.0f} ({tokens / 1e6:.2f} M, {seconds:.0f} s)"

    return by_rule(("uniform", *CHOOSING), [c for c in CORPORA if ("uniform", c) in controls], cell)


def make_costs(results: Sequence[Result]) -> str:
    """Markdown: the cost of each rule in steps of the learner, and seconds."""
    lines = [["rule", "steps", "scorers, one run", "scorers, of five", "total, one run", "seconds", "of scorers"]]
    lines.append(["---"] * len(lines[0]))
    for rule in RULES:
        own = [result for result in results if result["rule"] == rule]
        if own:
            steps, scorers = mean(r["steps"] for r in own), mean(r["scorer_steps"] for r in own)
            seconds = statistics.median(part_of_scorers(rule) * r.get("scorer_seconds", 0.0) for r in own)
            costs = [f"{steps:.0f}", f"{scorers:.1f}", f"{scorers / 5:.1f}", f"{steps + scorers:.0f}"]
            lines.append([rule, *costs, f"{statistics.median(r['wall_seconds'] for r in own):.0f}", f"{seconds:.1f}"])
    return markdown(lines)


def make_forecast(results: Sequence[Result]) -> str:
    """Markdown: the share of a corpus that ``difference`` leaves out, known before the run, and its gain."""
    pairs = forecasts(results)
    lines = [["corpus", "left out", "gain on uniform", "seeds"], ["---"] * 4]
    for corpus in CORPORA:
        own = [(left_out, gain) for name, left_out, gain in pairs if name == corpus]
        if own:
            shares, gains = zip(*own, strict=True)
            lines.append([corpus, f"{mean(shares):.1%}", f"{mean(gains):+.3f}", f"{len(own)}"])
    pearson = correlation([(left_out, gain) for _, left_out, gain in pairs])
    text = "too few pairs" if math.isnan(pearson) else f"{pearson:.2f}"
    return f"{markdown(lines)}\n\nPearson's correlation over {len(pairs)} (corpus, seed): {text}."


def make_kept(results: Sequence[Result]) -> str:
    """Markdown: the share of each kind among the trained rows, for uniform and the rules that select data."""
    lines = [["corpus", "kind", "uniform", "difference", "attainment", "perplexity"]]
    lines.append(["---"] * len(lines[0]))
    shares = by_cell(results, lambda result: result["trained_kinds"])
    for corpus in CORPORA:
        kinds = [kind for kind in KINDS if any(s.get(kind) for s in shares.get(("uniform", corpus), {}).values())]
        for kind in kinds:
            cells = [shares.get((rule, corpus), {}).values() for rule in lines[0][2:]]
            lines.append(
                [corpus, kind, *(f"{mean(s.get(kind, 0.0) for s in found):.1%}" if found else "-" for found in cells)]
            )
    return markdown(lines)


def make_duplicates(duplicates: dict[str, dict[str, int]]) -> str:
    """Markdown: rows that deduplication without a model would have removed."""
    lines = [["corpus", "rows", "equal rows", "50 tokens shared", "MinHash above 0.7"], ["---"] * 5]
    lines += [
        [name, f"{n['rows']:,}", *(f"{n[key] / n['rows']:.1%}" for key in ("equal", "window", "minhash"))]
        for name, n in duplicates.items()
    ]
    return markdown(lines)


def report(output: Path, results: Sequence[Result], *, duplicates: dict[str, Any], command: str) -> str:
    """Write results.json and table.md; returns the text of the latter."""
    seeds = sorted({result["seed"] for result in results})
    tables = {
        "Final validation loss of uniform, nats per token, and the paired differences of the other rules to it, with "
        "95% intervals over the seeds ([n]: the number of seeds where fewer than three):": make_table(results),
        "Goals; compute as a share of uniform's, scorers included:": make_goals(results),
        "Time to uniform's final loss: the step (tokens, seconds of training) at which a run's own validation curve "
        "first reaches it, median over the seeds, linear between validations, scorers excluded. The learning rate has "
        'not yet decayed there, which counts against the rule. "-": never.': make_times(results),
        "Cost, in steps of the learner, and seconds on this machine (validation included):": make_costs(results),
        "Forecast: the share that `difference` leaves out in its first decision, known before a run, and its measured "
        "gain in nats per token, means over the seeds:": make_forecast(results),
        "Shares of the kinds among the trained rows:": make_kept(results),
        "Rows that deduplication without a model would have removed:": make_duplicates(duplicates),
    }
    lines = [
        "# A single pass, all costs charged",
        "",
        f"Seeds {', '.join(map(str, seeds)) or 'none'}. Corpora and rules are defined in benchmarks/single_pass/ "
        "(corpora.py, rules.py); benchmarks/README.md says how a run is charged.",
        "",
        "![validation loss against steps](single_pass.png)",
        "",
        "![differences to uniform](differences.png)",
        "",
        *(line for title, table in tables.items() for line in (title, "", table, "")),
        *(f"- {rule}: {RULES[rule].about}" for rule in RULES if any(rule == result["rule"] for result in results)),
        "",
        f"- {len(results)} runs, {sum(r['process_seconds'] for r in results) / 3600:.1f} core-hours; `{command}`",
    ]
    return write_report(output, lines, results, command=command)
