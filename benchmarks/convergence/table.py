"""The tables of the convergence benchmark: all finished runs, rules by corpora."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.first_passage import first_passage
from benchmarks.common.runner import load_result
from benchmarks.common.tables import by_cell, by_rule, markdown, mean, write_report
from benchmarks.common.tasks import BATCH_SIZE, FORWARD_COST
from benchmarks.convergence.rules import RULES, reference_task, rule_task, score_task
from benchmarks.corpora.stdlib_code import CORPORA, Sizes

RIVALS = [rule for rule in RULES if rule != "uniform"]


def gather(output: Path, *, steps: int, lr: float) -> list[dict[str, Any]]:
    """All results below ``output``, in the order of the table; for ``excess_loss`` with the cost of its reference."""
    results = []
    for name, rule in RULES.items():
        for corpus in CORPORA:
            folders = (output / "runs" / corpus / name).glob("seed-*")
            for seed in sorted(int(folder.name.removeprefix("seed-")) for folder in folders):
                result = load_result(output, rule_task(corpus, name, seed, steps=steps, lr=lr))
                if result is None:
                    continue
                if rule.scorers:
                    scores = load_result(output, score_task(corpus, seed, steps=steps, lr=lr))
                    model = load_result(output, reference_task(seed, steps=steps, lr=lr))
                    if scores is None or model is None:
                        continue  # removed since
                    result["examples_scored"] += Sizes().num_rows
                    for key in ("scoring_seconds", "wall_seconds"):
                        result[key] += scores["process_seconds"]
                    result["step_equivalents"] += FORWARD_COST * Sizes().num_rows / BATCH_SIZE
                    result["reference_step_equivalents"] = model["steps"]
                    result["reference_seconds"] = model["wall_seconds"]
                results.append(result)
    return results


def make_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: rules by corpora, mean ± standard deviation over the seeds and the difference to uniform.

    The difference is the mean over the seeds that both have. A cell with fewer seeds than the maximum shows their
    number.
    """
    losses = by_cell(results)
    corpora = [corpus for corpus in CORPORA if any(corpus == key[1] for key in losses)]
    max_seeds = max(map(len, losses.values()), default=0)
    header = ["rule", *corpora, "step-equivalents", "seconds", "of them scoring"]
    lines = [header, ["---"] * len(header)]
    for rule in RULES:
        own = [result for result in results if result["rule"] == rule]
        if not own:
            continue
        controls = {corpus: losses.get(("uniform", corpus), {}) if rule != "uniform" else {} for corpus in corpora}
        cells = [cell(losses.get((rule, corpus), {}), controls[corpus], max_seeds=max_seeds) for corpus in corpora]
        reference = mean(result.get("reference_step_equivalents", 0) for result in own)
        compute = f"{mean(result['step_equivalents'] for result in own):.0f}"
        cells += [
            compute + (f" (+ {reference:.0f} reference)" if reference else ""),
            f"{mean(result['wall_seconds'] for result in own):.0f}",
            f"{mean(result['scoring_seconds'] for result in own):.1f}",
        ]
        lines.append([rule, *cells])
    return markdown(lines)


def make_shares(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the share of uniform's loss from dirt that a rule recovers; empty without dirty corpora.

    (uniform - rule) / (uniform - uniform on clean text), of means over the seeds that all three have. Differences in
    nats depend on how well the control is trained; this share less so.
    """
    losses = by_cell(results)
    clean = losses.get(("uniform", "clean"), {})

    def won_back(rule: str, corpus: str) -> str:
        control, own = losses["uniform", corpus], losses.get((rule, corpus), {})
        seeds = control.keys() & own.keys() & clean.keys()
        won, cost = (sum(control[seed] - other[seed] for seed in seeds) for other in (own, clean))
        return f"{won / cost:.0%}" if seeds else ""

    dirty = [corpus for corpus in CORPORA if corpus != "clean" and ("uniform", corpus) in losses]
    return by_rule(RIVALS, dirty, won_back)


def make_savings(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the steps after which uniform's final loss was first reached; empty without it.

    The mean over the seeds that both have; "-" where one of them never reached it.
    """

    def curve(result: dict[str, Any]) -> dict[int, float]:
        return {int(step): loss for step, loss in result["validation_loss"].items()}

    curves = by_cell(results, curve)

    def steps(rule: str, corpus: str) -> str:
        control, own = curves["uniform", corpus], curves.get((rule, corpus), {})
        both = sorted(own.keys() & control.keys())
        reached = [first_passage(own[seed], next(reversed(control[seed].values()), math.nan)) for seed in both]
        needed = [step for step in reached if math.isfinite(step)]
        if not reached:
            return ""
        return f"{mean(needed):.0f}" if len(needed) == len(reached) else "-"

    return by_rule(RIVALS, [corpus for corpus in CORPORA if ("uniform", corpus) in curves], steps)


def make_kinds(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the share of clean rows, neither junk nor copies, among those trained after the first full pass.

    The mean over a rule's seeds; empty without dirty corpora.
    """
    shares = by_cell([r for r in results if r["trained_kinds"]], lambda result: result["trained_kinds"]["clean"])

    def share(rule: str, corpus: str) -> str:
        seeds = shares.get((rule, corpus), {})
        return f"{mean(seeds.values()):.1%}" if seeds else ""

    dirty = [corpus for corpus in CORPORA if corpus != "clean" and any(corpus == key[1] for key in shares)]
    return by_rule(RULES, dirty, share)


def cell(own: dict[int, float], control: dict[int, float], *, max_seeds: int) -> str:
    if not own:
        return "-"
    text = f"{mean(own.values()):.3f}"
    if len(own) > 1:
        text += f" ± {statistics.stdev(own.values()):.3f}"
    if both := own.keys() & control.keys():
        text += f" ({mean(own[seed] - control[seed] for seed in both):+.3f})"
    return text + (f" [{len(own)} of {max_seeds} seeds]" if len(own) < max_seeds else "")


def report(output: Path, results: Sequence[dict[str, Any]], *, command: str) -> str:
    """Write results.json and table.md; returns the text of the latter."""
    seeds = sorted({result["seed"] for result in results})
    tables = {
        "Share recovered of the loss that dirt costs uniform (against its loss on clean text):": make_shares(results),
        "Steps to uniform's final loss, while the learning rate still falls:": make_savings(results),
        "Share of clean rows, neither junk nor copies, among those trained after the first full pass:": make_kinds(
            results
        ),
    }
    lines = [
        make_table(results),
        "",
        "Final validation loss on clean held-out text, nats per token: mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}, and the difference to uniform over the same seeds. Seconds are those of a run "
        "with its validations, while others run in parallel.",
        "",
        *(line for title, table in tables.items() if table for line in (title, "", table, "")),
        *(f"- {rule}: {RULES[rule].about}" for rule in RULES if any(rule == result["rule"] for result in results)),
        "",
        f"- {len(results)} runs; command: `{command}`",
    ]
    return write_report(output, lines, results, command=command)
