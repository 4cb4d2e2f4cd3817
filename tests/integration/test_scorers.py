"""Making scorers by the real command: killed and resumed on another number of ranks, and runs that read them.

Scorers are made for dirty data, of which random tokens are a half, with clean text as the trusted one; and for clean
data with itself.
"""

import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from launch import TIMEOUT, forked_stages, kill_when, launch, read_trace, run, start, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchtitan.components.checkpoint import CheckpointManager

from titan_attent.data.text.holdout import write_tokens
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.scores.stored import StoredScores
from titan_attent.scores.writer import ScoresWriter
from titan_attent.titan.scoring import subcommands as stages
from titan_attent.titan.scoring import write_losses
from titan_attent.titan.scoring.pair_bigram import BATCH_SIZE

SEQ_LEN = 64
LENGTHS = ("--training.seq_len", str(SEQ_LEN), "--validation.seq_len", str(SEQ_LEN))
MODULE = "titan_attent.score"
MODELS = ("amateur", "expert")
PARTS = tuple(f"{name}{part}" for name in MODELS for part in ("/trusted", ""))
"""Folders of losses, in the order in which they are written."""
GLOBAL_BATCH = 16
STEPS, KILLED_AT = 4, 2
"""Steps of a trained scorer."""
RUN_STAGE = stages._run


def write_dirty(clean: TokenDataset, folder: Path) -> None:
    """Half of the rows, at random positions, are random tokens."""
    shards, rng = clean.shards, np.random.default_rng(0)
    tokens = shards.read(0, shards.num_tokens)
    tokenizer = open_tokenizer(shards.tokenizer_info, shards.path)
    for row in rng.permutation(len(clean))[: len(clean) // 2]:
        tokens[row * SEQ_LEN : (row + 1) * SEQ_LEN] = rng.integers(0, tokenizer.vocab_size, SEQ_LEN)
    write_tokens(folder, [tokens], tokenizer=tokenizer)


@pytest.fixture(scope="module")
def folder(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configurations of runs on two data sets, in ``clean`` and ``dirty``."""
    folder = tmp_path_factory.mktemp("scorers")
    write_dirty(TokenDataset(token_data["train"], seq_len=SEQ_LEN), folder / "data")
    for name, data in (("clean", token_data["train"]), ("dirty", folder / "data")):
        write_config(folder / name, data=token_data | {"train": data}, dump=folder / name / "run")
    return folder


def command(folder: Path, trusted: Path, output: str, *more: str, data: str = "dirty") -> list[str]:
    config = ("--job.config_file", str(folder / data / "config.toml"))
    return ["pair", "--trusted", str(trusted), "--output", str(folder / output), *config, *LENGTHS, *more]


@pytest.fixture(scope="module")
def straight(folder: Path, token_data: dict[str, Path]) -> Path:
    """Scorers written on one rank, without interruption."""
    output = run(*command(folder, token_data["train"], "straight"), num_processes=1, module=MODULE)
    assert "% of the run's" in output and output.index("% of the run's") < output.index("count for the amateur")
    assert f'[teacher]\nstrategy = "difference"\nscores = "{folder / "straight"}"' in output
    return folder / "straight"


def losses(folder: Path) -> np.ndarray:
    found = StoredScores(folder)
    found.verify_checksum()
    return found.read(0, found.num_examples).numpy()


def difference(scorers: Path, part: str = "") -> np.ndarray:
    return losses(scorers / "amateur" / part) - losses(scorers / "expert" / part)


def stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# -- writing them ------------------------------------------------------------------------------------------------------


def stand_still_in(folder: Path, *, kept: int) -> None:
    """Prepare a worker: a chunk is one batch, and ``folder`` never counts more than ``kept`` losses as durable."""
    stock, write_losses.CHUNK_BATCHES = ScoresWriter._save_progress, 1

    def save_progress(writer: ScoresWriter) -> None:
        while writer.path == folder and writer._durable > kept:
            time.sleep(1)
        stock(writer)

    ScoresWriter._save_progress = save_progress  # type: ignore[method-assign]


@pytest.mark.parametrize(("before", "after", "part"), [(2, 1, "amateur"), (1, 2, "expert")])
def test_killed_between_two_chunks_and_resumed_on_another_number_of_ranks(
    folder: Path, straight: Path, token_data: dict[str, Path], before: int, after: int, part: str
) -> None:
    output, kept = folder / f"killed-{before}", BATCH_SIZE * before
    argv = command(folder, token_data["train"], output.name)
    # The second chunk is on the disk, too, but does not count yet: it is cut off again.
    prepare, file = partial(stand_still_in, output / part, kept=kept), output / part / "losses.bin"
    workers = start(*argv, num_processes=before, module=MODULE, prepare=prepare)
    kill_when(lambda: file.is_file() and file.stat().st_size > 4 * kept, workers)
    done = PARTS.index(part)
    assert [(output / name / "reference.json").exists() for name in PARTS] == [i < done for i in range(4)]
    assert stored(output / part / "scoring.json")["num_scored"] == kept < len(losses(straight / part))
    clock, newest = stored(output / "scorers.json")["under_way"], file.stat().st_mtime

    text = run(*argv, num_processes=after, module=MODULE)
    assert ("count for the amateur" in text) == (done < 2) and "count for the expert" in text
    for name in PARTS:
        assert np.array_equal(losses(output / name), losses(straight / name))
        ours, theirs = (stored(path / name / "reference.json") for path in (output, straight))
        assert {**ours, "checkpoint": ""} == {**theirs, "checkpoint": ""}
    # The work of both commands is charged, each with its number of ranks.
    report = stored(output / "scorers.json")
    lost, all_seconds = newest - clock["since"], report["seconds"][clock["stage"]]
    expected = lost * before + (all_seconds - lost) * after
    assert 0 < lost < all_seconds and report["device_seconds"][clock["stage"]] == pytest.approx(expected, abs=1e-4)
    for name in MODELS:
        assert StoredScores(output / name).device_seconds > 0
    assert "under_way" not in report


def test_what_the_scorers_cost_is_kept(straight: Path) -> None:
    report = stored(straight / "scorers.json")
    num = [len(losses(straight / part)) for part in ("amateur", "amateur/trusted")]
    assert report["seconds"] == report["device_seconds"] and len(report["seconds"]) == 6
    cost, counted = report["cost"], int(stored(straight / "amateur" / "reference.json")["checkpoint"].split()[2])
    # The announced numbers are computed before the text is split, so they are exact to a span of 16.
    assert abs(cost["scored"] - sum(num)) < 16 and abs(cost["trained"] - counted) < 16
    assert cost["flops"] == pytest.approx(2 * SEQ_LEN * (30 * cost["trained"] + 10 * cost["scored"]))
    assert cost["share"] == cost["flops"] / cost["run_flops"] and 0 < cost["share"] < 0.01
    for name in MODELS:
        durations = [seconds for stage, seconds in report["seconds"].items() if stage.endswith(name)]
        kept = stored(straight / name / "cost.json")
        assert len(durations) == 3 and kept["device_seconds"] == pytest.approx(sum(durations))
        assert kept["flops"] == cost["flops"] / 2


def test_running_again_on_more_ranks_changes_nothing(folder: Path, straight: Path, token_data: dict[str, Path]) -> None:
    files = ("amateur/cost.json", "expert/cost.json", "scorers.json")
    before = [stored(straight / file) for file in files]
    text = run(*command(folder, token_data["train"], "straight"), num_processes=2, module=MODULE)
    assert "count for the" not in text and [stored(straight / file) for file in files] == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--flavor", "scorer_xs"), "holds other scorers: flavor was 'bigram' and is 'scorer_xs'"),
        (("--data.seed", "5"), "holds other scorers: data_seed was 0 and is 5"),
        (("--steps", "3"), "--steps with --flavor bigram, which is not trained: leave it out"),
        (("--model.flavor", "scorer_x"), '[model] flavor = "scorer_x" is unknown to llama3_attent; did you mean'),
    ],
)
def test_other_scorers_are_refused(
    folder: Path, straight: Path, token_data: dict[str, Path], more: tuple[str, ...], message: str
) -> None:
    before = (straight / "scorers.json").read_bytes()
    result = launch(*command(folder, token_data["train"], "straight", *more), num_processes=1, module=MODULE)
    assert result.returncode != 0 and message in result.stderr
    assert (straight / "scorers.json").read_bytes() == before


# -- those that are trained -------------------------------------------------------------------------------------------


def stand_still(module: str, argv: list[str], environment: dict[str, str]) -> None:
    """A stage: as subcommands.py runs it, but the expert's training stops at ``KILLED_AT``."""
    stock = CheckpointManager.save

    def save(manager: CheckpointManager, curr_step: int, last_step: bool = False) -> None:
        stock(manager, curr_step, last_step=last_step)
        if curr_step == KILLED_AT and "expert" in argv[1]:
            time.sleep(TIMEOUT)

    CheckpointManager.save = save  # type: ignore[method-assign]
    RUN_STAGE(module, argv, environment)


def test_a_killed_training_is_resumed(folder: Path, token_data: dict[str, Path]) -> None:
    options = ("--flavor", "scorer_xs", "--steps", str(STEPS), "--batch_size", "4")
    argv, output = command(folder, token_data["train"], "trained", *options), folder / "trained"
    reached = output / "models" / "expert" / "checkpoint" / f"step-{KILLED_AT}" / ".metadata"
    kill_when(reached.is_file, start(*argv, module=MODULE, prepare=forked_stages(stand_still)))
    assert not any((output / part).exists() for part in PARTS)

    text = run(*argv, num_processes=1, module=MODULE, prepare=forked_stages())
    assert "Scorers: train amateur" not in text and "Scorers: train expert" in text
    files = sorted((output / "models" / "expert" / "tb").rglob("events.*"), key=lambda path: path.stat().st_mtime)
    resumed = EventAccumulator(str(files[-1]))
    resumed.Reload()
    steps = [event.step for event in resumed.Scalars("loss_metrics/global_avg_loss")]
    assert steps == list(range(KILLED_AT + 1, STEPS + 1))
    for name in MODELS:
        assert StoredScores(output / name).device_seconds > 0
    assert difference(output).std() > 0.01


# -- runs that read them ----------------------------------------------------------------------------------------------


def paths(scorers: Path) -> list[str]:
    # The TOML of these tests sets other values of the rule's own keys, which would be refused beside it.
    own = {"importance": "cross_entropy_difference", "ratio_schedule": "calibrated", "interval_schedule": "fixed"}
    return keys({"strategy": "difference", "scores": scorers} | own)


def keys(teacher: dict[str, Any]) -> list[str]:
    return [word for key, value in teacher.items() for word in (f"--teacher.{key}", str(value))]


def train(folder: Path, name: str, *more: str, data: str, steps: int, num_processes: int) -> list[dict[str, Any]]:
    """What a run of the smallest flavor did in every step."""
    settings = {
        **{"job.config_file": folder / data / "config.toml", "job.dump_folder": folder / name, "model.flavor": "bench"},
        **{"training.global_batch_size": GLOBAL_BATCH, "training.local_batch_size": GLOBAL_BATCH // num_processes},
        **{
            "training.steps": steps,
        },
    }
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    run(*argv, *LENGTHS, *more, num_processes=num_processes)
    trace = read_trace(folder / name)
    assert [step["step"] for step in trace] == list(range(1, steps + 1))
    return trace


def first_round(dump: Path) -> dict[str, Any]:
    return json.loads((dump / "teacher" / "rounds.jsonl").read_text().splitlines()[0])


def above_the_cut(scorers: Path) -> np.ndarray:
    """The ids to keep, best first: all cuts tried, one by one."""
    data, trusted = difference(scorers), difference(scorers, "trusted")
    gain, cut = max(((data < cut).mean() - 2 * (trusted < cut).mean(), cut) for cut in trusted)
    ids = np.argsort(-data, kind="stable")
    return ids[data[ids] >= cut] if gain >= 0.1 else ids


def test_a_run_selects_from_step_1_on_without_a_forward_pass(folder: Path, straight: Path) -> None:
    kept = above_the_cut(straight)
    assert 100 < len(kept) < 200, "something is left out"
    kept = kept[: len(kept) // GLOBAL_BATCH * GLOBAL_BATCH]
    steps = len(kept) // GLOBAL_BATCH
    ids = []
    for ranks in (1, 2):
        name = f"teacher-{ranks}"
        trace = train(folder, name, *paths(straight), data="dirty", steps=steps, num_processes=ranks)
        assert {(step["round"], step["strategy"]) for step in trace} == {(1, "hard")}
        ids.append([sorted(step["ids"]) for step in trace])
        first = first_round(folder / name)
        assert first["ledger/examples_scored"] == 0 and first["teacher/selected"] == len(kept)
        prepaid = sum(stored(straight / model / "cost.json")["device_seconds"] for model in MODELS)
        assert first["ledger/prepaid_seconds"] == pytest.approx(prepaid / ranks)
    assert ids[0] == ids[1]
    assert sorted(sum(ids[0], [])) == sorted(kept)  # one pass: each of them once, and no others


def test_trusted_text_like_the_data_leaves_nothing_out_and_trains_as_uniform(
    folder: Path, token_data: dict[str, Path]
) -> None:
    argv = command(folder, token_data["train"], "equal", data="clean")
    run(*argv, num_processes=1, module=MODULE)
    num = len(losses(folder / "equal" / "amateur"))
    assert len(above_the_cut(folder / "equal")) == num
    rules = {"kept": paths(folder / "equal"), "uniform": keys({"strategy": "uniform"})}
    steps = num // GLOBAL_BATCH + 2  # into the second pass
    ids = [
        [step["ids"] for step in train(folder, name, *rule, data="clean", steps=steps, num_processes=1)]
        for name, rule in rules.items()
    ]
    assert ids[0] == ids[1] and len({*sum(ids[0][:-2], [])}) == num // GLOBAL_BATCH * GLOBAL_BATCH
    assert first_round(folder / "kept")["teacher/ratio"] == 1.0


# -- scores that are refused ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def too_few(folder: Path, straight: Path) -> Path:
    """The scorers with too few trusted examples."""
    output = folder / "few"
    for name in MODELS:
        part, kept = output / name / "trusted", losses(straight / name / "trusted")[:31]
        shutil.copytree(straight / name, output / name)
        scoring = replace(StoredScores(part).scoring, num_examples=len(kept))
        shutil.rmtree(part)
        with ScoresWriter(part, scoring=scoring) as writer:
            writer.append(torch.from_numpy(kept))
            writer.finish()
    return output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--training.seq_len", "128"), "holds the scores of other examples"),
        (("--teacher.scores", "nowhere"), "nowhere: no such folder; correct the path, or write scores with"),
        ((), "31 trusted held-out examples are too few to calibrate by: score at least 32"),
    ],
)
def test_scores_that_do_not_fit_are_refused(
    folder: Path, straight: Path, too_few: Path, change: tuple[str, ...], message: str
) -> None:
    config = ("--job.config_file", str(folder / "dirty" / "config.toml"))
    dump = folder / "refused"
    argv = [*config, *LENGTHS, *paths(straight if change else too_few), "--job.dump_folder", str(dump), *change]
    result = launch(*argv, num_processes=1)
    assert result.returncode != 0 and message in result.stderr
    assert not dump.exists()
