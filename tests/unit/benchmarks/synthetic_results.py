"""Synthetic results of runs of the single-pass experiment."""

from typing import Any

from benchmarks.single_pass import rules


def result(rule: str, corpus: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    """A run with one step per second. Its loss is 7 at step 1 and 1 above its last halfway; scorers are free."""
    steps = more.get("steps", rules.rule_task(corpus, rule, seed).steps)
    made = {
        **{"rule": rule, "corpus": corpus, "seed": seed, "steps": steps, "tokens": steps * 3072},
        **{"final_validation_loss": loss, "wall_seconds": 1.1 * steps, "process_seconds": 1.2 * steps},
        "validation_loss": {"1": 7.0, str(steps // 2): loss + 1, str(steps): loss},
        "last": {"teacher/ratio": 1.0, "ledger/train_seconds": float(steps)},
        **{"machine": "a machine", "versions": {"titan_attent": "0.1.0", "commit": "abc"}},
        **{
            "trained_kinds": {"code": 1.0},
            "kinds": {},
            "scorer_share": 0.0,
            "scorer_seconds": 0.0,
            "scorer_steps": 0.0,
        },
    }
    return made | more


def rows(markdown: str) -> list[list[str]]:
    """The cells of a table's rows, heading and rule left out."""
    lines = [line for line in markdown.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
