"""The tables of the evidence: all that has finished, rules by corpora, and the goals with a verdict each."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from convergence_table import by_cell, by_rule, markdown, mean
from corpora import KINDS_FILE
from evidence_corpora import CORPORA
from evidence_corpora import KINDS as KIND_NAMES
from evidence_rules import RULES, STEPS, kinds_task, scores_folder

from titan_attent.data.format import write_atomically

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5% quantiles of Student's t for so many values."""
PART_OF_SCORERS = {"attainment": 0.5, "perplexity": 0.5}
"""Share of both scorers' cost that a rule pays: these two read the amateur alone."""


def gather(output: Path) -> list[dict[str, Any]]:
    """All results below ``output``, with what the scorers cost and the loss of each wanted kind of text."""
    results = []
    for path in sorted((output / "runs").glob("*/*/seed-*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        corpus, name, seed = result["corpus"], result["rule"], result["seed"]
        if name not in RULES or corpus not in CORPORA:
            continue
        share = 0.0
        if RULES[name].reads_scores:
            scorers = json.loads((output / scores_folder(corpus, seed) / "scorers.json").read_text(encoding="utf-8"))
            part = PART_OF_SCORERS.get(name, 1.0)
            share = part * scorers["cost"]["share"]
            result["scorer_seconds"] = part * sum(scorers["seconds"].values())
        result["scorer_steps"] = share * STEPS
        result["kinds"] = losses_by_kind(output, corpus, name, seed)
        results.append(result)
    return results


def losses_by_kind(output: Path, corpus: str, name: str, seed: int) -> dict[str, float]:
    """Mean loss of each kind of validation row; empty where the corpus wants one kind."""
    file = output / kinds_task(corpus, name, seed).folder / "losses" / "losses.bin"
    if not file.is_file():
        return {}
    losses = np.fromfile(file, "<f4")
    kinds = np.load(output / "corpora" / f"validation-{CORPORA[corpus].name}" / KINDS_FILE)
    return {KIND_NAMES[kind]: float(losses[kinds == kind].mean()) for kind in np.unique(kinds)}


def interval(differences: Sequence[float]) -> str:
    """Mean and half the 95% interval of paired differences."""
    text = f"{mean(differences):+.3f}"
    if len(differences) > 1:
        text += f" ± {half_width(differences):.3f}"
    return text


def half_width(differences: Sequence[float]) -> float:
    n = len(differences)
    return STUDENT[n] * statistics.stdev(differences) / n**0.5 if n > 1 else float("nan")


def paired(losses: dict[tuple[str, str], dict[int, float]], rule: str, against: str, corpus: str) -> list[float]:
    own, other = losses.get((rule, corpus), {}), losses.get((against, corpus), {})
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def all_losses(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """(rule, column) -> seed -> final loss; a corpus that wants several kinds has a column of each."""
    losses = by_cell(results)
    for kind in sorted({kind for result in results for kind in result["kinds"]}):
        own = by_cell([r for r in results if kind in r["kinds"]], lambda result, kind=kind: result["kinds"][kind])
        losses |= {(rule, f"{corpus}: {kind}"): values for (rule, corpus), values in own.items()}
    return losses


def make_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: final loss of uniform; of the other rules the paired difference to it, with its 95% interval."""
    losses = all_losses(results)
    columns = sorted({column for _, column in losses}, key=lambda column: list(CORPORA).index(column.split(":")[0]))

    def cell(rule: str, column: str) -> str:
        own = losses.get((rule, column), {})
        if not own:
            return ""
        if rule == "uniform":
            return f"{mean(own.values()):.3f}"
        return interval(paired(losses, rule, "uniform", column)) + (f" [{len(own)}]" if len(own) < 3 else "")

    return by_rule(RULES, columns, cell)


def make_costs(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: what each rule costs in steps of the learner, and seconds."""
    lines = [["rule", "steps", "scorers, one run", "scorers, of five", "total, one run", "seconds", "of scorers"]]
    lines.append(["---"] * len(lines[0]))
    for rule in RULES:
        own = [result for result in results if result["rule"] == rule]
        if own:
            steps, scorers = mean(r["steps"] for r in own), mean(r["scorer_steps"] for r in own)
            lines.append(
                [
                    rule,
                    *(f"{value:.0f}" for value in (steps, scorers, scorers / 5, steps + scorers)),
                    f"{statistics.median(r['wall_seconds'] for r in own):.0f}",
                    f"{statistics.median(r.get('scorer_seconds', 0.0) for r in own):.0f}",
                ]
            )
    return markdown(lines)


def make_kept(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: of what was trained, the shares of each kind of row: uniform's and the rules' that choose."""
    lines = [["corpus", "kind", "uniform", "difference", "attainment", "perplexity"]]
    lines.append(["---"] * len(lines[0]))
    shares = by_cell(results, lambda result: result["trained_kinds"])
    for corpus in CORPORA:
        kinds = [kind for kind in KIND_NAMES if any(s.get(kind) for s in shares.get(("uniform", corpus), {}).values())]
        for kind in kinds:
            cells = [shares.get((rule, corpus), {}).values() for rule in lines[0][2:]]
            lines.append(
                [corpus, kind, *(f"{mean(s.get(kind, 0.0) for s in found):.1%}" if found else "-" for found in cells)]
            )
    return markdown(lines)


GOALS = (
    *((f"30% less compute on {corpus}, one run", corpus, 0.7, 1.0) for corpus in ("junk", "near_duplicates", "target")),
    ("10% less compute on web, one run", "web", 0.9, 1.0),
    *((f"45% less compute on {c}, of five runs", c, 0.55, 0.2) for c in ("junk", "near_duplicates", "target")),
)
"""(what, corpus, share of uniform's compute, share of the scorers charged)."""
HARMLESS = 0.005


def make_goals(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the goals, the measured difference of the rule with the most steps that the compute allows, a verdict.

    A saving is met where the whole 95% interval of the difference to uniform's final loss is at or below 0, "likely"
    where only the mean is.
    """
    losses = all_losses(results)
    lines = [["goal", "by", "compute", "difference to uniform", "verdict"]]
    lines.append(["---"] * len(lines[0]))
    for what, corpus, share, charged in GOALS:
        found = []
        for rule in RULES:
            own = [r for r in results if r["rule"] == rule and r["corpus"] == corpus]
            compute = mean((r["steps"] + charged * r["scorer_steps"]) / STEPS for r in own) if own else 2.0
            if RULES[rule].reads_scores and compute <= share + 0.005 and paired(losses, rule, "uniform", corpus):
                found.append((mean(paired(losses, rule, "uniform", corpus)), rule, compute))
        if found:
            difference, rule, compute = min(found)
            differences = paired(losses, rule, "uniform", corpus)
            certain = difference + half_width(differences) <= 0
            verdict = "met" if certain else "likely" if difference <= 0 else "missed"
            lines.append([what, rule, f"{compute:.2f}", interval(differences), verdict])
    for column in ("clean", *sorted({column for _, column in losses if ": " in column})):
        for rule, against, charged in (
            ("difference", "uniform", "equal steps"),
            ("difference", "uniform_charged", "scorers charged"),
            ("attainment", "uniform", "equal steps"),
            ("defaults", "uniform", "equal steps"),
        ):
            if differences := paired(losses, rule, against, column):
                verdict = "met" if mean(differences) <= HARMLESS else "missed"
                lines.append([f"no harm on {column}", rule, charged, interval(differences), verdict])
    return markdown(lines)


def make_duplicates(duplicates: dict[str, dict[str, int]]) -> str:
    """Markdown: rows that passes without a model would have taken."""
    lines = [["corpus", "rows", "equal rows", "50 tokens shared", "MinHash above 0.7"], ["---"] * 5]
    lines += [
        [name, f"{n['rows']:,}", *(f"{n[key] / n['rows']:.1%}" for key in ("equal", "window", "minhash"))]
        for name, n in duplicates.items()
    ]
    return markdown(lines)


def report(output: Path, results: Sequence[dict[str, Any]], *, duplicates: dict[str, Any], command: str) -> str:
    """Write results.json and table.md; returns the text of the latter."""
    machines = sorted({result["machine"] for result in results})
    code = {json.dumps(result["versions"], sort_keys=True): result["versions"] for result in results}
    tables = {
        "Final validation loss of uniform, nats a token, and the paired differences of the others to it, with 95% "
        "intervals over the seeds ([n]: fewer than three):": make_table(results),
        "Goals:": make_goals(results),
        "Cost, in steps of the learner, and seconds on this machine (validation included):": make_costs(results),
        "Of what was trained:": make_kept(results),
        "What passes without a model would have taken:": make_duplicates(duplicates),
    }
    lines: Iterable[str] = [
        *(line for title, table in tables.items() for line in (title, "", table, "")),
        *(f"- {rule}: {RULES[rule].about}" for rule in RULES if any(rule == result["rule"] for result in results)),
        "",
        f"- {len(results)} runs, {sum(r['process_seconds'] for r in results) / 3600:.1f} core-hours; `{command}`",
        *(f"- machine: {name}" for name in machines),
        *("- " + ", ".join(f"{name} {version}" for name, version in entry.items()) for entry in code.values()),
    ]
    text = "\n".join(lines) + "\n"
    document = {"command": command, "machines": machines, "versions": list(code.values()), "results": list(results)}
    write_atomically(output / "results.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(output / "table.md", text.encode())
    return text
