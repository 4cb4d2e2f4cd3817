"""The tables of the vision experiment: one row per rule, a verdict per goal, the classes of a long tail."""

import math
import statistics
from collections.abc import Sequence

from benchmarks.common.tables import markdown
from benchmarks.vision.numbers import Interval, Result, Runs, rare_accuracy, verdicts
from benchmarks.vision.rules import CONDITIONS, RULES, SETS

TABLE = (
    "rule",
    "steps",
    "compute",
    "accuracy",
    "to uniform",
    "to uniform at its compute",
    "there after",
    "dirt trained",
)
ABOUT = """\
"Compute" is a share of uniform's; scoring (a third of a step) and scorers are included. Accuracies are of the clean
test images, in per cent: mean over the seeds and its 95% interval (Student). Differences are paired, seed by seed, in
points. "There after": where a run's own curve first reached uniform's final accuracy of its seed, median over the
seeds, in steps, in thousands of images and in seconds, scoring and scorers charged; "-": never. The learning rate has
not yet decayed there: shorter runs, decayed at their own end, are better evidence of a saving. "Dirt": the share of
wrong labels or copies, after the first pass."""


def report(results: Sequence[Result], *, command: str) -> str:
    """Markdown: all finished runs."""
    lines = ["# Vision evidence", "", f"`{command}`", ""]
    if not results:
        return "\n".join([*lines, "Nothing has finished.", ""])
    for key, name in (("machine", "Machine"), ("versions", "Versions")):
        values = sorted({str(result[key]) for result in results})
        lines += [f"{name}: {'; '.join(values)}.", ""]
    seconds = sum(result["process_seconds"] for result in results)
    lines += [f"{len(results)} runs, {seconds / 3600:.1f} core-hours.", "", ABOUT, ""]
    for name in SETS:
        own = [result for result in results if result["set"] == name]
        if own:
            lines += [f"## {name}", "", f"![accuracy against compute](accuracy-{name}.png)", "", *of_set(own, name)]
    return "\n".join(lines)


def of_set(results: Sequence[Result], name: str) -> list[str]:
    lines: list[str] = []
    for condition in CONDITIONS:
        runs = Runs(results, name, condition)
        if not runs.rules:
            continue
        counts = {len(of_rule) for of_rule in runs.of.values()}
        lines += [f"### {name}, {condition}", "", make_table(runs), ""]
        if len(counts) > 1:
            lines += [f"Seeds per rule: {min(counts)} to {max(counts)}; [n] where fewer than {max(counts)}.", ""]
        if condition == "long_tail":
            lines += [make_rare(runs), "", *make_classes(runs)]
    if goals := make_goals(results, name):
        lines += [f"### {name}, goals", "", goals, ""]
    return lines


def make_table(runs: Runs) -> str:
    """Markdown: one row per rule."""
    max_seeds = max(len(of_rule) for of_rule in runs.of.values())
    lines = [list(TABLE), ["---"] * len(TABLE)]
    for rule in runs.rules:
        own = list(runs.of[rule].values())
        control = runs.control(rule)
        num_seeds = f" [{len(own)}]" if len(own) < max_seeds else ""
        dirt = [result["dirt_trained"] for result in own if result["dirt_trained"] is not None]
        lines.append(
            [
                rule + num_seeds,
                steps_text([result["steps"] for result in own]),
                f"{runs.compute(rule):.3f}",
                text(runs.values(rule), sign=False),
                text(runs.difference(rule, "uniform")),
                text(runs.difference(rule, control)) if control != "uniform" else "",
                time_text(runs.time_to_uniform(rule)),
                f"{statistics.fmean(dirt):.1%}" if dirt else "",
            ]
        )
    return markdown(lines)


def text(found: Interval | None, *, sign: bool = True) -> str:
    return "" if found is None else found.points(sign=sign)


def steps_text(steps: Sequence[int]) -> str:
    return str(steps[0]) if len(set(steps)) == 1 else f"{min(steps)}-{max(steps)}"


def time_text(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return ""
    step, images, seconds = found
    return "-" if math.isinf(step) else f"{step:.0f} ({images / 1000:.1f} k, {seconds:.1f} s)"


def make_rare(runs: Runs) -> str:
    """Markdown: the accuracy of the rarer half of the classes; empty without results."""
    lines = [["rule", "rarer classes", "to uniform", "to uniform at its compute"], ["---"] * 4]
    for rule in runs.rules:
        control = runs.control(rule)
        equal = runs.difference(rule, control, rare_accuracy) if control != "uniform" else None
        full = runs.difference(rule, "uniform", rare_accuracy)
        lines.append([rule, text(runs.values(rule, rare_accuracy), sign=False), text(full), text(equal)])
    return markdown(lines)


def make_classes(runs: Runs) -> list[str]:
    """Markdown: the best rule by the accuracy of the rarer classes, rank by rank, the most frequent class first.

    The classes are in another order under each seed, so a row is a rank, not a class.
    """
    rivals = [rule for rule in runs.rules if RULES[rule].teacher["strategy"] != "uniform"]
    rivals = [rule for rule in rivals if runs.difference(rule, "uniform", rare_accuracy) is not None]
    if not rivals:
        return []
    best = max(rivals, key=lambda rule: statistics.fmean(map(rare_accuracy, runs.of[rule].values())))
    num_classes = len(next(iter(runs.of[best].values()))["class_counts"])
    lines = [["class by frequency", "images", "uniform", best, "difference"], ["---"] * 5]
    for rank in range(num_classes):

        def at_rank(result: Result, key: str = "class_accuracy", rank: int = rank) -> float:
            counts = result["class_counts"]
            order = sorted(range(len(counts)), key=lambda number: (-counts[number], -number))
            return result[key][order[rank]]

        images = statistics.fmean(at_rank(result, "class_counts") for result in runs.of[best].values())
        values = [text(runs.values(rule, at_rank), sign=False) for rule in ("uniform", best)]
        lines.append([str(rank + 1), f"{images:.0f}", *values, text(runs.difference(best, "uniform", at_rank))])
    return [f"The best rule for them, {best}, class by class:", "", markdown(lines), ""]


def make_goals(results: Sequence[Result], name: str) -> str:
    """Markdown: a verdict per rule and goal; empty without one."""
    judged = verdicts(results, name)
    lines = [["goal", "by", "compute", "to uniform", "to uniform at its compute", "verdict"], ["---"] * 6]
    for one in judged:
        lines.append([one.goal, one.rule, f"{one.compute:.3f}", text(one.to_full), text(one.to_equal), one.verdict])
    if not judged:
        return ""
    best = {
        one.goal: max((o for o in judged if o.goal == one.goal), key=lambda o: (o.verdict == "met", o.to_full.mean))
        for one in judged
    }
    summary = "\n".join(f"- {goal}: {one.verdict} by the best, {one.rule}" for goal, one in best.items())
    caution = "The best rule was selected by this same number, which is therefore too favorable."
    return f"{markdown(lines)}\n\n{summary}\n\n{caution}"
