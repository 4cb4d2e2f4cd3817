"""The benchmark of seeds: its models against loops over rows, its verdicts, and the command at four steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.seeds import __main__ as command
from benchmarks.seeds import page
from benchmarks.seeds.arms import ADVERSARIAL, ARMS, PROBLEMS
from benchmarks.seeds.model import LinearRecall, LocalColouring
from benchmarks.seeds.training import measure, words_of
from titan_attent.tasks.graph_colouring import GraphColouring
from titan_attent.tasks.recall import Recall


def test_a_memory_is_a_sum_over_pairs() -> None:
    task = Recall(pairs=3, keys=5, values=2, seed_bits=2, seeds=2)
    torch.manual_seed(0)
    model, words = LinearRecall(task, width=8, memory=2), words_of(task, "train", 0, 4)
    losses, answers, right = model.rows(words)
    for row, loss, answer, is_right in zip(words.tolist(), losses, answers[:, 0].tolist(), right.tolist(), strict=True):
        bits, pairs, asked, value = row[:2], row[2:-3], row[-2] - 3, row[-1] - 8
        seed = model.seed(torch.tensor([2.0 * bit - 1 for bit in bits]))
        memory = torch.zeros(2, 2)
        for key, of_key in zip(pairs[::2], pairs[1::2], strict=True):
            x = model.key_embedding.weight[key - 3] + model.value_embedding.weight[of_key - 8] + seed
            memory = memory + torch.outer(model.write_key(x), model.write_value(x))
        query = model.key_embedding.weight[asked] + seed
        logits = model.answer(torch.cat((model.read(query) @ memory, query)))
        torch.testing.assert_close(loss, -logits.log_softmax(0)[value], rtol=1e-4, atol=1e-5)
        assert answer == int(logits.argmax()) and is_right == (answer == value)


def test_a_node_sees_its_two_neighbours_and_a_colouring_is_judged_by_the_edges() -> None:
    task = GraphColouring(nodes=5, seeds=2)
    torch.manual_seed(0)
    model, words = LocalColouring(task, width=8), words_of(task, "train", 0, 6)
    losses, colours, right = model.rows(words)
    for row, loss, of_nodes, is_right in zip(words.tolist(), losses, colours.tolist(), right.tolist(), strict=True):
        priorities, ends = [word - 10 for word in row[:5]], [word - 5 for word in row[6:16]]
        edges = list(zip(ends[::2], ends[1::2], strict=True))
        states = [model.node.weight[n] + model.priority.weight[priorities[n]] for n in range(5)]
        (norm,), (layer,) = model.norms, model.layers
        p = []
        for n in range(5):
            one, other = (norm(states[b if a == n else a]) for a, b in edges if n in (a, b))
            x = states[n] + layer(torch.cat((norm(states[n]), one + other, one * other)))
            p.append(model.answer(x).softmax(0))
        expected = -sum(torch.log(1 - p[a] @ p[b]) for a, b in edges) / 5
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert of_nodes == [int(one.argmax()) for one in p]
        assert is_right == all(of_nodes[a] != of_nodes[b] for a, b in edges)


def test_the_metrics_are_those_of_a_loop_over_inputs() -> None:
    task = GraphColouring(nodes=4, seeds=3)
    torch.manual_seed(1)
    model = LocalColouring(task, width=8)
    _, _, right = model.rows(words_of(task, "in_distribution", 0, 60))
    shares = right.view(20, 3).float().mean(dim=1).numpy()
    metrics = measure(model, task, inputs=20)
    assert metrics["right"] == pytest.approx(shares.mean()) and metrics["never_right"] == (shares == 0).mean()
    assert metrics["input_match_p95"] == pytest.approx(np.percentile(shares, 5))


Numbers = tuple[float, float, float, float]


def results(own: list[Numbers], fixed: Numbers, rest: Numbers) -> list[dict[str, Any]]:
    """(never right, vote, worst 5%, right) of the adversarial arm in each repetition, of fixed seeds, of q = 1."""
    keys = ("never_right", "exact_match_vote", "input_match_p95", "right")
    others = dict.fromkeys(set(page.COLUMNS.values()) - set(keys), 0.5)
    found = []
    for number, one in enumerate(own):
        for name, arm in ARMS.items():
            numbers = one if name == ADVERSARIAL else fixed if arm.fixed_seed else rest
            labels = command.labels_of("recall", name, number, steps=9)
            metrics = others | dict(zip(keys, numbers, strict=True))
            found.append(labels | {"seconds": 1.0, "machine": "m", "metrics": metrics})
    return found


GOOD, FIXED, RANDOM = (0.0, 0.9, 0.5, 0.8), (0.2, 0.8, 0.0, 0.8), (0.0, 0.9, 0.4, 0.8)


@pytest.mark.parametrize(
    ("own", "fixed", "rest", "expected", "counts"),
    [
        ([GOOD] * 3, FIXED, RANDOM, "reproduced: every claim", (3, 3, 3, 3)),
        ([GOOD, (0.02, 0.9, 0.5, 0.8)], FIXED, RANDOM, "not reproduced at this size: 3 of 4 claims", (2, 1, 2, 2)),
        ([GOOD] * 3, FIXED, GOOD, "not reproduced at this size: 3 of 4 claims", (3, 3, 0, 3)),
        ([(0.0, 0.8, 0.5, 0.8)] * 3, FIXED, RANDOM, "not reproduced at this size: 3 of 4 claims", (3, 3, 3, 0)),
        ([GOOD] * 3, GOOD, RANDOM, "not reachable at this size", (0, 3, 3, 3)),
    ],
)
def test_a_verdict_counts_repetitions(own: Any, fixed: Any, rest: Any, expected: str, counts: tuple[int, ...]) -> None:
    found = results(own, fixed, rest)
    assert page.verdict(found, "recall").startswith(expected)
    rows = page.claims(found).splitlines()[2:]
    for row, count in zip(rows, counts, strict=True):
        assert row.endswith(f"{'' if count == len(own) else 'not '}reproduced: {count} of {len(own)} |")
    partial = [one for one in found if one["arm"] != ADVERSARIAL]
    assert page.verdict(partial, "recall") == "open: no repetition has all four arms"


def test_the_command_runs_resumes_and_takes_known_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "INPUTS", 4)
    monkeypatch.setattr(command, "VOTES", 2)
    arguments = ["--rehearse", "--repetitions", "0", "--output"]
    published = tmp_path / "seeds"
    assert command.main([*arguments, str(tmp_path / "one"), "--publish", str(published)]) == 0
    known = published.with_suffix(".json")
    assert len(json.loads(known.read_text())["results"]) == len(ARMS) * len(PROBLEMS)
    assert all(arm in published.with_suffix(".md").read_text() for arm in ARMS)
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: pytest.fail("it was measured again"))
    assert command.main([*arguments, str(tmp_path / "two"), "--known", str(known)]) == 0
    assert command.main([*arguments, str(tmp_path / "one")]) == 0
