"""The table of the cheaper-steps benchmark, and whether each goal was reached. Pure: numbers in, text out."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cheaper_steps.rules import CONTROL, GOALS, RULES, Goal
from benchmarks.common.intervals import half_width, interval

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Rule -> seed -> the numbers of a finished run, from ``cheaper_steps.Benchmark.finished``."""
WHAT = {"of_backward": "the backward's FLOPs", "seconds_a_step": "the seconds of a cut step"}
OF_A_RUN = ("steps", "loss", "of_backward", "of_step", "step", "cut_step", "seconds")


def differences(results: Results, name: str, control: str = CONTROL) -> list[float]:
    """Differences of the final losses, seed by seed, in nats per token."""
    own, other = results.get(name, {}), results.get(control, {})
    return [own[seed]["loss"] - other[seed]["loss"] for seed in sorted(own.keys() & other.keys())]


def rows_of(results: Results) -> dict[str, dict[str, Any]]:
    """Rule -> its row: means and medians over the seeds, shares of the control's; and the numbers of each seed."""
    control, rows = results.get(CONTROL, {}), {}
    for name, own in results.items():
        shared = sorted(own.keys() & control.keys())
        differing, base = differences(results, name), [control[seed]["loss"] for seed in shared]
        row: dict[str, Any] = {
            "about": RULES[name].about,
            "steps": max(run["steps"] for run in own.values()),
            "seeds": {seed: {key: own[seed][key] for key in OF_A_RUN} for seed in own},
            "step": statistics.median(run["step"] for run in own.values()),
            "of_backward": statistics.median(run["of_backward"] for run in own.values()),
            "of_step": statistics.median(run["of_step"] for run in own.values()),
        }
        if shared and name != CONTROL:
            row |= {
                "difference": statistics.mean(differing),
                "half_width": half_width(differing) if len(differing) > 1 else None,
                "share_of_loss": statistics.mean(differing) / statistics.mean(base),
                "seconds_saved": statistics.median(1 - own[s]["seconds"] / control[s]["seconds"] for s in shared),
                "seconds_a_step": statistics.median(1 - own[s]["cut_step"] / control[s]["step"] for s in shared),
            }
        rows[name] = row
    return rows


def verdicts(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Method -> for each rule that may reach its goal: numbers, and ``reached``."""
    rows = rows_of(results)
    return {
        method: [
            _verdict(goal, name, control, rows[name], differences(results, name, control))
            for name, control in goal.rules.items()
            if "difference" in rows.get(name, {})
        ]
        for method, goal in GOALS.items()
    }


def _verdict(
    goal: Goal, name: str, control: str, row: Mapping[str, Any], to_control: Sequence[float]
) -> dict[str, Any]:
    """The verdict on a rule. It beats its control if the interval of the differences, or a single one, is below 0."""
    saved, lost = row[goal.saves], row["share_of_loss"]
    verdict = {"rule": name, "saved": saved, "saves_enough": saved >= goal.min_saved}
    verdict |= {"share_of_loss": lost, "is_near": lost <= goal.loss, "seeds": len(row["seeds"])}
    if control:
        width = half_width(to_control) if len(to_control) > 1 else 0.0
        is_better = statistics.mean(to_control) + width < 0 if to_control else None
        verdict |= {
            "control": control,
            "to_control": interval(to_control) if to_control else "",
            "is_better": is_better,
        }
    verdict["reached"] = bool(verdict["saves_enough"] and verdict["is_near"] and verdict.get("is_better", True))
    return verdict


def _line(goal: Goal, verdict: Mapping[str, Any]) -> str:
    enough = "enough" if verdict["saves_enough"] else f"{goal.min_saved:.0%} were required"
    near = "near enough" if verdict["is_near"] else f"{goal.loss:.1%} were allowed"
    parts = [
        f"saves {verdict['saved']:.1%} of {WHAT[goal.saves]} ({enough})",
        f"ends {verdict['share_of_loss']:+.2%} from `{CONTROL}` ({near})",
    ]
    if "control" in verdict:
        comparison = {True: "better than", False: "not better than", None: "not compared with"}[verdict["is_better"]]
        numbers = f" ({verdict['to_control']} nats)" if verdict["to_control"] else ""
        parts.append(f"{comparison} `{verdict['control']}`{numbers}")
    seeds = "one seed" if verdict["seeds"] == 1 else f"{verdict['seeds']} seeds"
    return (
        f"- `{verdict['rule']}`: **{'reached' if verdict['reached'] else 'not reached'}**; {', '.join(parts)}; {seeds}"
    )


def table(results: Results, *, seeds: Sequence[int], where: str) -> str:
    """Markdown: the table, the descriptions of the rules, the verdicts."""
    header = ["rule", "steps", *(f"seed {seed}" for seed in seeds), "difference", "share of the loss"]
    header += [
        "backward FLOPs saved",
        "step FLOPs saved",
        "seconds per step",
        "seconds per cut step saved",
        "seconds saved",
    ]
    lines = [header, ["---"] * len(header)]
    for name, row in rows_of(results).items():
        compared = "difference" in row
        counted = compared and bool(row["of_step"])
        lines.append(
            [
                name,
                str(row["steps"]),
                *(f"{row['seeds'][seed]['loss']:.4f}" if seed in row["seeds"] else "" for seed in seeds),
                interval(differences(results, name)) if compared else "",
                f"{row['share_of_loss']:+.2%}" if compared else "",
                *(f"{row[key]:.1%}" if counted else "" for key in ("of_backward", "of_step")),
                f"{row['step']:.4f}",
                *(f"{row[key]:.1%}" if compared else "" for key in ("seconds_a_step", "seconds_saved")),
            ]
        )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    about = "\n".join(f"- `{name}`: {RULES[name].about}" for name in results)
    goals = "".join(
        f"The goal of `[{GOALS[method].section}]`: {GOALS[method].about}.\n\n"
        + "".join(_line(GOALS[method], verdict) + "\n" for verdict in candidates)
        + "\n"
        for method, candidates in verdicts(results).items()
        if candidates
    )
    return (
        f"{text}\n\n{about}\n\n{goals}Final validation loss in nats per token. Difference to `{CONTROL}`, seed by "
        "seed, with its 95% interval. FLOPs as the run counts them, probes charged. Seconds per step: median over the "
        "logged spans of steps; per cut step: over those that are not exact; saved: of all steps, without the start. "
        f"{where}.\n"
    )
