"""The evidence's command from made-up texts to tables and pictures: scorers, runs and kinds by the real commands."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launch import finish, start

from benchmarks.common import torchrun
from benchmarks.single_pass import __main__ as evidence
from benchmarks.single_pass import corpora, numbers, rules

STEPS = 10
SIZES = {"NUM_ROWS": 416, "NUM_VALIDATION": 64, "NUM_TRUSTED": 480, "NUM_COPIED": 20, "VOCAB_SIZE": 400}
WORDS_PER_DOCUMENT, DOCUMENTS = 1000, 200
CELLS = {("minority", "uniform"), ("minority", "difference")}
"""Of a corpus that wants two kinds, so that its runs are asked about each."""


def made_up_texts(_: Path, kind: str, *, wiki: Path | None) -> list[str]:
    """Documents of words in random order; a kind has 300 of its own, of its own letters. Fewer of kinds that no corpus
    wants: these have neither trusted nor validation rows."""
    rng = np.random.default_rng(corpora.KINDS.index(kind))
    letters = rng.permutation(list("abcdefghijklmnopqrstuvwxyz"))[:8]
    words = ["".join(rng.choice(letters, size=rng.integers(2, 6))) for _ in range(300)]
    is_target = any(kind in corpus.target for corpus in corpora.CORPORA.values())
    number = DOCUMENTS if is_target else DOCUMENTS // 4
    return [" ".join(rng.choice(words, size=WORDS_PER_DOCUMENT)) for _ in range(number)]


class Forked:
    """In place of a ``Popen`` of torchrun: its worker, forked."""

    def __init__(self, command: list[str], *, cwd: Path, **_: Any):
        at = command.index("-m", 2)  # after torchrun's own
        module, args = command[at + 1], command[at + 2 :]
        self.workers = start(*args, num_processes=1, module=module, prepare=partial(os.chdir, cwd))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.workers.poll() is not None:
            result = finish(self.workers)
            assert result.returncode == 0, result.stdout + result.stderr
            self.returncode = result.returncode
        return self.returncode

    def terminate(self) -> None:
        self.workers.kill()

    def wait(self) -> None:
        pass


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, size in SIZES.items():
        monkeypatch.setattr(corpora, name, size)
    for module in (rules, numbers):
        monkeypatch.setattr(module, "STEPS", STEPS)
    popen = SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(torchrun, "subprocess", popen)
    monkeypatch.setattr(corpora.texts, "fetch", lambda folder: None)
    monkeypatch.setattr(corpora.texts, "read", made_up_texts)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def contents(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(corpus, rule) -> result."""
    found = json.loads((folder / "results.json").read_text())["results"]
    assert {result["seed"] for result in found} == {0}
    return {(result["corpus"], result["rule"]): result for result in found}


@pytest.mark.exhaustive
def test_a_small_grid_and_what_a_second_call_leaves_alone(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(folder: str, *more: str) -> list[str]:
        where = ["--output", str(tmp_path / folder), "--texts", str(tmp_path / "texts"), "--seeds", "0", "--jobs", "2"]
        return [*where, "--rules", "uniform", "difference", "--corpora", "minority", *more]

    assert evidence.main(command("grid")) == 0
    grid = tmp_path / "grid"
    results = contents(grid)
    assert results.keys() == CELLS
    for (_, rule), result in results.items():
        assert result["steps"] == STEPS
        assert set(result["kinds"]) == {"code", "russian"}
        assert (result["scorer_steps"] > 0) == (rule == "difference")
        mean = np.mean(list(result["kinds"].values()))  # there are as many rows of each
        assert mean == pytest.approx(result["final_validation_loss"], rel=1e-3)
    uniform = results["minority", "uniform"]
    assert uniform["final_validation_loss"] < uniform["validation_loss"]["1"] - 1
    table = (grid / "table.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in table.split("\n") if line.startswith("| ")}
    assert {"uniform", "difference", "no harm on minority: code", "no harm on minority: russian"} <= lines.keys()
    assert "| rule | minority | minority: code | minority: russian |" in table
    for name in ("single_pass.png", "differences.png"):
        assert (grid / name).read_bytes().startswith(b"\x89PNG")

    def refuse(*_: Any) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr(torchrun.Torchrun, "start", refuse)
    assert evidence.main(command("grid")) == 0
    assert contents(grid) == results
    # On another machine, with equal texts, all of it is known.
    assert evidence.main(command("elsewhere", "--known", str(grid / "results.json"))) == 0
    assert contents(tmp_path / "elsewhere") == results and not (tmp_path / "elsewhere" / "runs").exists()
    assert "left out" not in capsys.readouterr().err
