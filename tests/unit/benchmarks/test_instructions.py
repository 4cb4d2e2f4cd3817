"""The instruction experiment: its pairs, the exchange of completions, its rules, and its page on synthetic results."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.instructions import __main__ as instructions
from benchmarks.instructions import data, pairs, rules, table
from benchmarks.instructions.pairs import Pair
from titan_attent.data.text.tiktoken_tokenizer import train_tokenizer
from titan_attent.foundations.toml import to_toml
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.config_checks import check_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# -- pairs ------------------------------------------------------------------------------------------------------------


def compiled(messages: dict[str, str]) -> bytes:
    """A .mo file, by its specification: the tables of originals and translations, then the strings."""
    entries = [(key.encode() + b"\0", text.encode() + b"\0") for key, text in sorted(messages.items())]
    size, start = len(entries), 28 + 16 * len(entries)
    tables: list[list[int]] = [[], []]
    body = b""
    for column in (0, 1):
        for entry in entries:
            tables[column] += [len(entry[column]) - 1, start + len(body)]
            body += entry[column]
    header = struct.pack("<7I", 0x950412DE, 0, size, 28, 28 + 8 * size, 0, start)
    return header + struct.pack(f"<{4 * size}I", *tables[0], *tables[1]) + body


def test_a_catalogue_gives_its_translated_lines() -> None:
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n",
        "no such file": "Datei nicht gefunden: ü",
        "OK": "OK",  # not translated
        "two\nlines": "zwei\nZeilen",
        "menu\x04open": "öffnen",  # with a context
        "%d file\0%d files": "%d Datei\0%d Dateien",  # a plural
    }
    assert list(pairs.catalogue(compiled(messages))) == [Pair("no such file\nde: ", "Datei nicht gefunden: ü")]


def test_functions_give_the_first_line_of_their_docstring() -> None:
    source = '''
class C:
    def method(self, a: int = 1, *, b):
        """
        What it does.

        More.
        """
async def later(): "Waits."
def without(): pass
def blank(): "  "
'''
    found = set(pairs.functions(source.encode()))
    assert {pair for pair in found if pair.completion} == {
        Pair('def method(self, a: int=1, *, b):\n    """', "What it does."),
        Pair('def later():\n    """', "Waits."),
    }
    assert all(pair in pairs.distinct(found) for pair in found if pair.completion)
    assert list(pairs.functions(b"print 'no Python 3'")) == []


def test_a_dictionary_gives_the_first_sense_without_synonyms_and_examples() -> None:
    text = """00-database-short
     WordNet
aberration
    n 1: a state or condition markedly
         different from the norm [syn: {aberrance},
         {deviance}]
    2: a disorder in one's mental state
abhor
    v 1: find repugnant; "I loathe that man"; "She abhors cats"
         [syn: {abhor}, {loathe}]
abfarad
    n 1: a capacitance unit equal to one billion farads
abeyant
    adj 1: inactive but capable of becoming active
    n 1: not the first
"""
    assert list(pairs.definitions(text)) == [
        Pair("aberration (n): ", "a state or condition markedly different from the norm"),
        Pair("abhor (v): ", "find repugnant"),
        Pair("abfarad (n): ", "a capacitance unit equal to one billion farads"),
        Pair("abeyant (adj): ", "inactive but capable of becoming active"),
    ]


def test_no_prompt_or_completion_occurs_twice_and_none_is_too_long_or_short() -> None:
    kept = [Pair("prompt one", "first"), Pair("prompt two", "second")]
    others = [
        Pair("prompt one ", "third"),
        Pair("prompt three", "first"),
        Pair("abc", "too short a prompt"),
        Pair("no completion", " "),
        Pair("a" * (pairs.LONGEST + 1), "too long a prompt"),
    ]
    assert pairs.distinct([kept[0], *others, kept[1]]) == kept


@pytest.mark.parametrize("number, share, chosen", [(2, 1.0, 2), (5, 0.6, 3), (40, 0.2, 8)])
def test_shuffling_gives_every_chosen_prompt_the_completion_of_another(number: int, share: float, chosen: int) -> None:
    before = [Pair(f"prompt {i}", f"completion {i}") for i in range(number)]
    after, wrong = pairs.shuffled(before, share, seed=3)
    assert [pair.prompt for pair in after] == [pair.prompt for pair in before]
    assert sorted(pair.completion for pair in after) == sorted(pair.completion for pair in before)
    assert [i for i in range(number) if after[i] != before[i]] == wrong
    assert len(wrong) == chosen
    assert pairs.shuffled(before, share, seed=3) == (after, wrong)


def test_another_seed_shuffles_other_pairs() -> None:
    before = [Pair(f"prompt {i}", f"completion {i}") for i in range(40)]
    assert pairs.shuffled(before, 0.2, seed=3) != pairs.shuffled(before, 0.2, seed=4)


def test_parts_are_disjoint_and_fit_a_row_of_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SIZES", {"train": 3, "trusted": 2, "validation": 1})
    tokenizer = train_tokenizer(["words and other words"], vocab_size=260)
    long = Pair("x" * 80, "y" * 80)
    found = [long, *(Pair(f"prompt {i}", f"completion {i}") for i in range(6))]
    parts = data.divided(found, tokenizer)
    assert [pair for part in parts.values() for pair in part] == found[1:]
    with pytest.raises(ValueError, match="5 pairs of 6 fit into 64 tokens: too few"):
        data.divided(found[:6], tokenizer)


# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rules.RULES)
def test_a_rule_is_valid_in_its_share_of_the_steps(name: str) -> None:
    rule = rules.RULES[name]
    for condition in filter(rule.is_for, rules.CONDITIONS):
        task = rules.rule_task("messages", condition, name, 3)
        assert tomllib.loads(to_toml(task.config)) == task.config
        check_config(TeacherConfig(**task.config["teacher"]))
        assert task.steps == rule.share * rules.STEPS
        assert task.steps % task.config["validation"]["freq"] == 0 == task.steps % task.config["metrics"]["log_freq"]


def test_a_seed_has_every_task_that_its_runs_need_before_them() -> None:
    tasks = instructions.tasks_of(instructions.parse_args(["--output", "DIR"]), 2, ())
    before: set[str] = set()
    for task in tasks:
        assert before >= set(task.needs)
        before.add(task.folder)
    # Full uniform and seven teachers for each kind and condition, and the oracle where completions are wrong.
    assert sum(task.folder.startswith("runs/") for task in tasks) == 3 * (8 + 9)
    oracle = next(task for task in tasks if "/shuffled/oracle_75/" in task.folder)
    assert oracle.config["data"]["path"].endswith("/right") and oracle.config["teacher"]["strategy"] == "uniform"


def test_published_runs_are_kept_and_not_repeated(tmp_path: Path) -> None:
    published = [result(rule, 2, 3.0) for rule in ("uniform", "hard_87")]
    (tmp_path / "known.json").write_text(json.dumps({"command": "a command", "results": published}))
    known = instructions.load_known(tmp_path / "known.json")
    args = instructions.parse_args(["--output", "DIR", "--kinds", "messages", "--rules", "uniform", "hard_87"])
    needed = [[task.folder for task in instructions.tasks_of(args, seed, known)] for seed in (1, 2)]
    assert [folder for folder in needed[0] if "/clean/" in folder] == [
        "runs/messages/clean/uniform/seed-1",
        "runs/messages/clean/hard_87/seed-1",
    ]
    assert [folder for folder in needed[1] if folder.startswith("runs/")] == ["runs/messages/shuffled/uniform/seed-2"]
    assert instructions.gather(tmp_path, known) == sorted(published, key=lambda made: made["rule"])
    (tmp_path / "known.json").write_text("[]")
    with pytest.raises(ValueError, match=r"--known .*known\.json: not a \.json that --publish wrote"):
        instructions.load_known(tmp_path / "known.json")


# -- the page ---------------------------------------------------------------------------------------------------------


def result(rule: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    task = rules.rule_task("messages", more.pop("condition", "clean"), rule, seed)
    made = {
        **task.labels,
        **{"steps": task.steps, "final_validation_loss": loss, "token_accuracy": loss / 10, "train_seconds": 10.0},
        **{"validation_loss": {"1": 4.0, str(task.steps): loss}, "step_equivalents": float(task.steps)},
        **{"shuffled_trained": None, "machine": "a machine", "versions": {"commit": "abc"}, "scorer_steps": 0.0},
        **{"last": {"teacher/ratio": 0.7}},
    }
    return made | more


def test_a_goal_is_met_only_where_the_interval_is_below_zero() -> None:
    uniform = [result("uniform", seed, 3.0) for seed in range(3)]
    met = [result("hard_87", seed, 2.9 + 0.001 * seed) for seed in range(3)]
    likely = [result("soft_87", seed, loss) for seed, loss in enumerate((2.5, 3.1, 3.0))]
    missed = [result("random_87", seed, 3.1) for seed in range(3)]
    verdicts = {
        row.split(" | ")[1]: row.split(" | ")[-1].strip(" |")
        for row in table.make_goals([*uniform, *met, *likely, *missed], planned=5).splitlines()[2:]
    }
    assert verdicts == {"hard_87": "met", "soft_87": "likely", "random_87": "missed"}
    assert table.verdict([-0.1]) == "likely"  # one seed shows nothing


def test_scorers_are_charged_the_larger_of_operations_and_seconds() -> None:
    runs = [result("scorers_87", 0, 3.0), result("hard_87", 0, 3.0)]
    made = {("messages, clean", 0): {"scorer_share": 0.01, "scorer_seconds": 2.0}}
    by_seconds, free = table.charge(runs, made)
    assert by_seconds["scorer_steps"] == pytest.approx(2.0 / (10.0 / 87)) and free["scorer_steps"] == 0.0
    assert table.compute(by_seconds) == pytest.approx(0.87 + 0.174)
    made["messages, clean", 0]["scorer_share"] = 0.5
    assert table.charge(runs, made)[0]["scorer_steps"] == 50.0


def test_the_page_says_how_much_has_finished() -> None:
    results = [result(rule, seed, 3.0 + seed) for rule in ("uniform", "uniform_87", "hard_87") for seed in (0, 1)]
    shuffled = {"uniform": 3.2, "uniform_75": 3.3, "hard_75": 3.1, "oracle_75": 3.25}
    results += [result(rule, 0, loss, condition="shuffled") for rule, loss in shuffled.items()]
    text = table.page(results, command="a command", planned=5)
    assert "Finished runs: messages, clean: 6 of 40; messages, shuffled: 4 of 45; docstrings, clean: 0 of 40;" in text
    assert "| messages, clean | hard_87 | 0.87 | 0.870 | +0.000 ± 0.000 | 2 of 5 | met |" in text
    assert "| hard | +0.000 ± 0.000 [2 of 5 seeds] | -0.200 [1 of 5 seeds] |" in text
    assert "| hard | 70%, 70% | 70% |" in text
    assert "- messages, clean, 0.87 of the steps: hard met; uniform itself +0.000 ± 0.000.\n" in text
    assert "- messages, shuffled, 0.75 of the steps: hard likely; uniform itself +0.100.\n" in text
    assert "- messages: wrong completions cost full uniform +0.200 nats. Training on the right ones alone" in text
    assert "at equal steps by -0.050; below 0" in text
