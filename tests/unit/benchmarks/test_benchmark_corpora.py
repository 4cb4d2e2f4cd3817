"""The benchmark's corpora against the source files and the clean rows, and its tables from results."""

import json
import math
import statistics
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common.runner import load_result, run_tasks
from benchmarks.common.torchrun import Torchrun, trained_kinds
from benchmarks.convergence import rules, table
from benchmarks.corpora import stdlib_code as corpora
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.foundations.toml import to_toml
from titan_attent.job_config import TeacherConfig
from titan_attent.systems.teaching.config_checks import check_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


STDLIB = Path(sysconfig.get_paths()["stdlib"])
N, L = 6144, 96
SHARES = {"clean": (0, 0, 0), "junk": (1229, 1229, 0), "copies": (0, 0, 3072), "mixture": (921, 922, 1843)}
"""Shuffled, random and copied rows: 40% of 6,144 is 2,458, 30% is 1,843."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    assert corpora.main(["--output", str(folder)]) == 0
    return folder


def rows_of(folder: Path) -> np.ndarray:
    dataset = TokenDataset(folder, seq_len=L)
    return dataset.batch(torch.arange(len(dataset)))[0].numpy()


def kinds_of(folder: Path) -> np.ndarray:
    return np.load(folder / "row_kinds.npy")


# -- corpora ----------------------------------------------------------------------------------------------------------


def test_sizes_and_vocabulary(built: Path) -> None:
    for name, num_rows in {**dict.fromkeys(SHARES, N), "validation": 512, "trusted": 4096}.items():
        dataset = TokenDataset(built / name, seq_len=L)
        dataset.shards.verify_checksums()
        assert len(dataset) == num_rows and dataset.shards.num_tokens == num_rows * L + 1
        assert dataset.shards.tokenizer_info["vocab_size"] == 1024
        assert dataset.shards.max_token_id == dataset.shards.tokenizer_info["eos_id"] == 1023
        inputs, labels = dataset.batch(torch.arange(num_rows))
        assert torch.equal(labels[:, :-1], inputs[:, 1:])
        assert torch.equal(labels[:-1, -1], inputs[1:, 0])  # the last label is the next row's first token
        assert labels[-1, -1] == 1023


def test_rows_are_the_library(built: Path) -> None:
    """Each occurs in a source file, except for bytes of characters that its ends cut, and eos between two files."""
    files = [path for path in STDLIB.rglob("*.py") if "site-packages" not in path.parts]
    text = "".join(path.read_bytes().decode(errors="ignore")[:32768] for path in files)
    index = json.loads((built / "clean" / "index.json").read_text())
    tokenizer = open_tokenizer(index["tokenizer"], built / "clean")
    for part in ("clean", "validation", "trusted"):
        rows = [row for row in rows_of(built / part)[:40].tolist() if tokenizer.eos_id not in row]
        assert len(rows) > 20
        assert all(tokenizer.decode(row).strip("\N{REPLACEMENT CHARACTER}") in text for row in rows)


def test_no_row_is_in_two_data_sets_or_twice(built: Path) -> None:
    rows = [row.tobytes() for part in ("clean", "validation", "trusted") for row in rows_of(built / part)]
    assert len(set(rows)) == len(rows) == N + 512 + 4096


@pytest.mark.parametrize("name", SHARES)
def test_shares(built: Path, name: str) -> None:
    kinds = kinds_of(built / name)
    assert kinds.shape == (N,) and kinds.dtype == np.uint8
    assert tuple(np.bincount(kinds, minlength=4)[1:]) == SHARES[name]
    if name != "clean":  # spread over the whole set: every 512 rows have their share, within 5 standard deviations
        share = sum(SHARES[name]) / N
        means = (kinds > 0).reshape(-1, 512).mean(axis=1)
        assert np.all(abs(means - share) < 5 * math.sqrt(share * (1 - share) / 512))


@pytest.mark.parametrize("name", ["junk", "copies", "mixture"])
def test_dirt_is_what_it_is_called(built: Path, name: str) -> None:
    clean, rows, kinds = rows_of(built / "clean"), rows_of(built / name), kinds_of(built / name)
    assert np.array_equal(rows[kinds == 0], clean[kinds == 0])
    shuffled, random, copies = (rows[kinds == kind] for kind in (1, 2, 3))
    assert np.array_equal(np.sort(shuffled), np.sort(clean[kinds == 1]))
    assert np.all((shuffled != clean[kinds == 1]).sum(axis=1) > L // 4)
    if len(random):
        counts = np.bincount(random.ravel(), minlength=1024)
        mean = random.size / 1023
        assert counts[1023] == 0  # eos
        assert np.all(abs(counts[:1023] - mean) < 6 * math.sqrt(mean))
    if len(copies):
        originals = {row.tobytes() for row in rows[kinds == 0]}
        copied = [row.tobytes() for row in copies]
        counts = [copied.count(row) for row in set(copied)]
        assert len(counts) == 64 and set(copied) <= originals
        assert max(counts) - min(counts) <= 1


SMALL = {"num_rows": 40, "seq_len": 16, "num_copied": 4, "num_validation": 8, "num_trusted": 16, "vocab_size": 300}


@pytest.fixture
def small_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {f"{i:02}.py": f"def function_{i}(a, b={i}):\n    return [a] * {i} + b\n" * 4 for i in range(60)}
    monkeypatch.setattr(corpora, "list_sources", lambda: sources)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_seeds_give_equal_bytes(small_sources: None, tmp_path: Path) -> None:
    sizes = corpora.Sizes(**SMALL)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        corpora.build_corpora(tmp_path / name, seed=seed, sizes=sizes)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not [file for file in a if file.endswith(".bin") and a[file] == c[file]]


def test_a_second_call_finds_them_and_another_seed_is_refused(small_sources: None, tmp_path: Path) -> None:
    sizes = corpora.Sizes(**SMALL)
    manifest = corpora.build_corpora(tmp_path, sizes=sizes)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert corpora.build_corpora(tmp_path, sizes=sizes) == manifest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(ValueError, match="'seed': 0}, but this call needs {'seed': 1}: name another folder"):
        corpora.build_corpora(tmp_path, seed=1, sizes=sizes)


def test_what_a_killed_call_left_is_written_anew(small_sources: None, tmp_path: Path) -> None:
    sizes = corpora.Sizes(**SMALL)
    corpora.build_corpora(tmp_path, sizes=sizes)
    whole = contents(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "junk" / "shard-00000.bin").write_bytes(b"half")
    corpora.build_corpora(tmp_path, sizes=sizes)
    assert contents(tmp_path) == whole


def test_too_little_text_is_refused(small_sources: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9,624 are needed: use a Python with its whole standard library"):
        corpora.build_corpora(tmp_path, sizes=corpora.Sizes(**{**SMALL, "num_rows": 9600}))


# -- the command ------------------------------------------------------------------------------------------------------


def result(rule: str, corpus: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    facts = {"rule": rule, "corpus": corpus, "seed": seed, "final_validation_loss": loss, "steps": 600}
    return facts | {"step_equivalents": 600.0, "wall_seconds": 100.0, "scoring_seconds": 0.0} | more


def test_the_table_pairs_seeds_with_the_control() -> None:
    results = [
        *(result("uniform", "clean", seed, loss) for seed, loss in enumerate((3.0, 3.2, 3.7))),
        *(result("hard", "clean", seed, loss) for seed, loss in ((0, 2.5), (2, 3.4))),
        result("excess_loss", "junk", 1, 3.3, step_equivalents=664.0, reference_step_equivalents=300),
    ]
    header, _, *lines = table.make_table(results).split("\n")
    assert header == "| rule | clean | junk | step-equivalents | seconds | of them scoring |"
    control, spread = f"3.300 ± {statistics.stdev((3.0, 3.2, 3.7)):.3f}", f"{0.9 / math.sqrt(2):.3f}"
    assert lines == [
        f"| uniform | {control} | - | 600 | 100 | 0.0 |",
        f"| hard | 2.950 ± {spread} (-0.400) [2 of 3 seeds] | - | 600 | 100 | 0.0 |",
        "| excess_loss | - | 3.300 [1 of 3 seeds] | 664 (+ 300 reference) | 100 | 0.0 |",
    ]


def test_without_results_the_table_is_empty() -> None:
    assert table.make_table([]).count("\n") == 1
    assert table.make_shares([]) == "" and table.make_kinds([]) == "" and table.make_savings([]) == ""


def test_the_steps_to_the_final_loss_of_the_control() -> None:
    def curve(*losses: float) -> dict[str, float]:
        return {str(100 * (i + 1)): loss for i, loss in enumerate(losses)}

    results = [
        *(result("uniform", "junk", seed, 3.0, validation_loss=curve(5.0, 4.0, 3.0 + seed)) for seed in (0, 1)),
        *(result("hard", "junk", seed, 2.0, validation_loss=curve(5.0, 4.0, 2.0)) for seed in (0, 1, 2)),
        result("soft", "junk", 0, 2.0, validation_loss=curve(5.0, 4.0, 2.0)),
        result("soft", "junk", 1, 5.0, validation_loss=curve(5.0, 5.0, 5.0)),
        result("random", "clean", 0, 2.0, validation_loss=curve(2.0)),
    ]
    # To 3.0: half way from step 200; to 4.0: at step 200.
    assert table.make_savings(results).split("\n")[2:] == ["| hard | 225 |", "| soft | - |"]


def test_the_clean_share_of_what_was_trained_is_a_mean_over_seeds() -> None:
    kinds = {"clean": 0.0, "shuffled": 0.0, "random": 0.0, "copy": 0.0}
    results = [
        result("uniform", "clean", 0, 3.0, trained_kinds=kinds | {"clean": 1.0}),
        result("hard", "junk", 0, 3.5, trained_kinds=kinds | {"clean": 0.25, "random": 0.75}),
        result("hard", "junk", 1, 3.6, trained_kinds=kinds | {"clean": 0.75, "shuffled": 0.25}),
        result("hard", "mixture", 0, 3.6, trained_kinds={}),  # ended within the first pass
        result("soft", "mixture", 0, 3.6, trained_kinds=kinds | {"clean": 0.125, "copy": 0.875}),
    ]
    header, _, *lines = table.make_kinds(results).split("\n")
    assert header == "| rule | junk | mixture |"
    assert lines == ["| hard | 50.0% | - |", "| soft | - | 12.5% |"]


def test_the_share_won_back_counts_the_seeds_that_all_have() -> None:
    results = [
        *(result("uniform", "clean", seed, loss) for seed, loss in enumerate((3.0, 3.2))),
        *(result("uniform", "junk", seed, loss) for seed, loss in enumerate((3.5, 3.9, 9.0))),
        *(result("hard", "junk", seed, loss) for seed, loss in enumerate((3.6, 3.8, 9.0))),
        *(result("soft", "junk", seed, loss) for seed, loss in ((1, 3.55), (2, 1.0))),
        result("random", "clean", 0, 3.0),
    ]
    header, _, *lines = table.make_shares(results).split("\n")
    assert header == "| rule | junk |"
    # (3.5 + 3.9 - 3.6 - 3.8) / (3.5 + 3.9 - 3.0 - 3.2); (3.9 - 3.55) / (3.9 - 3.2)
    assert lines == ["| hard | 0% |", "| soft | 50% |"]


@pytest.mark.parametrize("name", rules.RULES)
def test_every_rule_validates_at_its_last_step(name: str) -> None:
    for steps in (600, 100, 20, 2):
        task = rules.rule_task("junk", name, 3, steps=steps, lr=1e-3)
        config = tomllib.loads(to_toml(task.config))
        assert config == task.config
        check_config(TeacherConfig(**config["teacher"]))
        assert task.steps % config["validation"]["freq"] == 0 and task.steps % config["metrics"]["log_freq"] == 0
        if steps >= 100:
            assert 50 <= config["validation"]["freq"] <= 100
        assert config["lr_scheduler"]["warmup_steps"] <= max(1, task.steps // 20)
        assert {config[section]["seed"] for section in ("data", "teacher", "debug")} == {3}


def test_a_finished_run_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    task = rules.rule_task("junk", "hard", 0, steps=600, lr=1e-3)
    assert load_result(tmp_path, task) is None
    path = tmp_path / "runs" / "junk" / "hard" / "seed-0" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"config": task.config}))
    assert run_tasks(tmp_path, [task], jobs=1, starter=Torchrun()) == []  # starts nothing
    other = rules.rule_task("junk", "hard", 0, steps=600, lr=2e-3)
    with pytest.raises(ValueError, match="{'optimizer.lr': 0.001}, but this call needs {'optimizer.lr': 0.002}"):
        run_tasks(tmp_path, [other], jobs=1, starter=Torchrun())


def test_the_kinds_that_were_trained_after_the_first_pass(tmp_path: Path) -> None:
    task = rules.rule_task("junk", "hard", 0, steps=600, lr=1e-3)
    kinds, trace = tmp_path / "corpora" / "junk", tmp_path / task.folder / "teacher"
    kinds.mkdir(parents=True)
    trace.mkdir(parents=True)
    np.save(kinds / "row_kinds.npy", np.resize(np.array([0, 1, 2, 3, 0], np.uint8), N))
    steps = [[1, 1]] * (N // 32) + [[0, 4], [2, 0], [0, 3], [0, 0]]
    (trace / "trace.jsonl").write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in steps))
    assert trained_kinds(tmp_path, task) == {"clean": 0.75, "shuffled": 0.0, "random": 0.125, "copy": 0.125}
