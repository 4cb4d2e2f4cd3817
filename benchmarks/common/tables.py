"""Tables of results, rules by corpora, as Markdown, and the files with all finished results."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from titan_attent.data.io.atomic import write_atomically


def by_rule(rules: Iterable[str], corpora: Sequence[str], cell: Callable[[str, str], str]) -> str:
    """Markdown: rules by corpora. A cell is "" where nothing was run; a rule with only such cells is left out."""
    rows = [[rule, *(cell(rule, corpus) for corpus in corpora)] for rule in rules]
    lines = [[text or "-" for text in row] for row in rows if any(row[1:])]
    return markdown([["rule", *corpora], ["---"] * (1 + len(corpora)), *lines]) if lines else ""


def by_cell(
    results: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], Any] = lambda result: result["final_validation_loss"],
) -> dict[tuple[str, str], dict[int, Any]]:
    """(rule, corpus) -> seed -> ``value`` of the result, by default its final validation loss."""
    cells: dict[tuple[str, str], dict[int, Any]] = {}
    for result in results:
        cells.setdefault((result["rule"], result["corpus"]), {})[result["seed"]] = value(result)
    return cells


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def write_page(
    output: Path, text: str, results: Sequence[dict[str, Any]], *, command: str, publish: Path | None = None
) -> None:
    """Write table.md, which is ``text``, and results.json; also to ``publish`` with .md and .json."""
    content = json.dumps({"command": command, "results": list(results)}, indent=1) + "\n"
    files = {output / "table.md": text, output / "results.json": content}
    if publish is not None:
        files |= {publish.with_suffix(".md"): text, publish.with_suffix(".json"): content}
    for file, written in files.items():
        write_atomically(file, written.encode())


def write_report(output: Path, lines: Sequence[str], results: Sequence[dict[str, Any]], *, command: str) -> str:
    """Write results.json, and table.md: ``lines``, then the machines and versions of the results. Returns that text."""
    machines = sorted({result["machine"] for result in results})
    code = {json.dumps(result["versions"], sort_keys=True): result["versions"] for result in results}
    versions = ["- " + ", ".join(f"{name} {version}" for name, version in entry.items()) for entry in code.values()]
    text = "\n".join([*lines, *(f"- machine: {name}" for name in machines), *versions]) + "\n"
    document = {"command": command, "machines": machines, "versions": list(code.values()), "results": list(results)}
    write_atomically(output / "results.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(output / "table.md", text.encode())
    return text
