"""[teacher] level = "span" by the real commands: the same labels on any number of ranks and after a kill, and refusals.

The data alternates between documents of clean text and of random tokens; the trusted text is clean.
"""

import json
import shutil
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from launch import launch, read_scalars, read_trace, read_weights, run, run_until_killed, write_config

from titan_attent.data.text.boundaries import add_documents
from titan_attent.data.text.holdout import write_tokens
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.scores.table import StoredTable
from titan_attent.systems.teaching.spans import SpanMasker

LOSS, MASKED = "loss_metrics/global_avg_loss", "teacher/tokens_masked"
SEQ_LEN, BATCH, STEPS, DOCUMENT = 64, 6, 10, 30
SPAN = ("--teacher.strategy", "difference", "--teacher.level", "span")
LENGTHS = ("--training.seq_len", str(SEQ_LEN), "--validation.seq_len", str(SEQ_LEN))
RULE_OF_THE_CONFIG = ("ratio_schedule", "interval_schedule", "final_ratio", "initial_ratio", "importance", "strategy")


@pytest.fixture(scope="module")
def folder(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of runs on two data sets, in ``clean`` and ``dirty``."""
    folder = tmp_path_factory.mktemp("spans")
    shards, rng = TokenShards(token_data["train"]), np.random.default_rng(0)
    tokenizer = open_tokenizer(shards.tokenizer_info, shards.path)
    clean = shards.read(0, shards.num_tokens)
    clean = clean[clean != tokenizer.eos_id]
    blocks = []
    for start in range(0, len(clean) - DOCUMENT, DOCUMENT):
        junk = rng.integers(0, tokenizer.eos_id, DOCUMENT)
        blocks += [clean[start : start + DOCUMENT], [tokenizer.eos_id], junk, [tokenizer.eos_id]]
    write_tokens(folder / "data", [np.concatenate(blocks)], tokenizer=tokenizer)
    add_documents(folder / "data")
    for name, data in (("clean", token_data["train"]), ("dirty", folder / "data")):
        path = write_config(folder / name, data=token_data | {"train": data}, dump=folder / name / "run")
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line.partition(" ")[0] not in RULE_OF_THE_CONFIG))
    return folder


def config(folder: Path, data: str = "dirty") -> list[str]:
    return ["--job.config_file", str(folder / data / "config.toml"), *LENGTHS]


@pytest.fixture(scope="module")
def pairs(folder: Path, token_data: dict[str, Path]) -> dict[str, Path]:
    for name in ("clean", "dirty"):
        make_pair(folder, token_data, name)
    return {name: folder / f"{name}_pair" for name in ("clean", "dirty")}


def make_pair(folder: Path, token_data: dict[str, Path], name: str, *more: str) -> str:
    output = ("--trusted", str(token_data["train"]), "--output", str(folder / f"{name}_pair"))
    return run("pair", *output, *config(folder, name), *more, num_processes=1, module="titan_attent.score")


def train(
    folder: Path, dump: Path, *more: str, data: str = "dirty", num_processes: int = 1, dp: int | None = None
) -> tuple[dict[int, float], dict[int, float], str]:
    """(losses, shares of masked labels, output) of a run."""
    size = (
        "--training.global_batch_size",
        str(BATCH),
        "--training.local_batch_size",
        str(BATCH // (dp or num_processes)),
    )
    arguments = (*config(folder, data), *size, "--training.steps", str(STEPS), "--job.dump_folder", str(dump))
    output = run(*arguments, *more, num_processes=num_processes)
    return read_scalars(dump, LOSS), read_scalars(dump, MASKED), output


@pytest.fixture(scope="module")
def straight(folder: Path, pairs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    dump = tmp_path_factory.mktemp("straight")
    _, _, output = train(folder, dump, *SPAN, "--teacher.scores", str(pairs["dirty"]))
    assert "spans whose difference is below" in output and "Masked share by source: " in output
    return dump


def test_masked_are_the_labels_of_spans_below_the_cut(folder: Path, pairs: dict[str, Path], straight: Path) -> None:
    """By the tables on disk and the trace; nearly all of them are in random documents."""
    (line,) = (json.loads(text) for text in (straight / "teacher" / "spans.jsonl").read_text().splitlines())
    dataset = TokenDataset(folder / "data", seq_len=SEQ_LEN)
    amateur, expert = (StoredTable(pairs["dirty"] / role).load() for role in ("amateur", "expert"))
    eos_id = dataset.shards.tokenizer_info["eos_id"]
    masker = SpanMasker(amateur, expert, eos_id=eos_id, cut=line["cut"])
    shares, random, clean = {}, [], []
    for step in read_trace(straight):
        ids = torch.tensor(step["ids"])
        inputs, labels = dataset.batch(ids)
        masked = masker.mark(inputs, labels.clone()) != labels
        shares[step["step"]] = float(masked.double().mean())
        positions = ids[:, None] * SEQ_LEN + torch.arange(1, SEQ_LEN + 1)
        is_random = positions // (DOCUMENT + 1) % 2 == 1
        random.append(masked[is_random])
        clean.append(masked[~is_random])
    assert read_scalars(straight, MASKED) == pytest.approx(shares, abs=1e-6)
    assert torch.cat(random).double().mean() > 0.8 and torch.cat(clean).double().mean() < 0.2
    assert line["step"] == 1 and line[MASKED] == pytest.approx(np.mean([*shares.values()]), abs=0.1)


@pytest.mark.parametrize(("num_processes", "parallelism"), [(2, None), (3, None), (2, "context"), (2, "tensor")])
def test_any_ranks_mask_the_same_labels(
    folder: Path, pairs: dict[str, Path], straight: Path, tmp_path: Path, num_processes: int, parallelism: str | None
) -> None:
    more = () if parallelism is None else (f"--parallelism.{parallelism}_parallel_degree", str(num_processes))
    scores = ("--teacher.scores", str(pairs["dirty"]))
    losses, masked, _ = train(
        folder, tmp_path, *SPAN, *scores, *more, num_processes=num_processes, dp=1 if parallelism else None
    )
    assert masked == read_scalars(straight, MASKED)
    assert losses == pytest.approx(read_scalars(straight, LOSS), rel=1e-3)
    for name in ("trace.jsonl", "spans.jsonl"):
        assert (tmp_path / "teacher" / name).read_text() == (straight / "teacher" / name).read_text()


def test_a_killed_run_resumes_exactly(folder: Path, pairs: dict[str, Path], straight: Path, tmp_path: Path) -> None:
    more = (*SPAN, "--teacher.scores", str(pairs["dirty"]), "--checkpoint.enable", "--checkpoint.interval", "3")
    size = ("--training.global_batch_size", str(BATCH), "--training.local_batch_size", str(BATCH))
    arguments = (*config(folder), *size, "--training.steps", str(STEPS), "--job.dump_folder", str(tmp_path))
    run_until_killed(*arguments, *more, trace=tmp_path / "teacher" / "trace.jsonl", step=5, num_processes=1)
    losses, masked, _ = train(folder, tmp_path, *more)
    assert losses == read_scalars(straight, LOSS) and masked == read_scalars(straight, MASKED)
    assert (tmp_path / "teacher" / "spans.jsonl").read_text() == (straight / "teacher" / "spans.jsonl").read_text()


def test_where_nothing_is_masked_the_run_is_uniform_bit_for_bit(
    folder: Path, pairs: dict[str, Path], tmp_path: Path
) -> None:
    saved, runs = ("--checkpoint.enable", "--checkpoint.interval", str(STEPS)), {}
    for data, name, rule in (
        ("clean", "span", (*SPAN, "--teacher.scores", str(pairs["clean"]))),
        ("clean", "uniform", ("--teacher.strategy", "uniform")),
        ("dirty", "dry", (*SPAN, "--teacher.scores", str(pairs["dirty"]), "--teacher.dry_run")),
        ("dirty", "dirty", ("--teacher.strategy", "uniform")),
    ):
        dump = tmp_path / name
        losses, masked, output = train(folder, dump, *rule, *saved, data=data)
        runs[name] = losses, read_weights(dump, step=STEPS), masked, output
    for ours, control in (("span", "uniform"), ("dry", "dirty")):
        assert runs[ours][0] == runs[control][0] and set(runs[ours][2].values()) == {0.0} and not runs[control][2]
        weights, expected = runs[ours][1], runs[control][1]
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert "no span is masked, and the run is uniform" in runs["span"][3]
    assert "would be masked" in runs["dry"][3]


def test_scores_without_tables_are_refused_and_the_same_command_adds_them(
    folder: Path, pairs: dict[str, Path], token_data: dict[str, Path], tmp_path: Path
) -> None:
    copy, original = folder / "old_pair", pairs["dirty"]
    shutil.copytree(original, copy)
    for role in ("amateur", "expert"):
        for file in ("table.json", "table.bin"):
            (copy / role / file).unlink()
    rule = (*SPAN, "--teacher.scores", str(copy), "--job.dump_folder", str(tmp_path / "dump"))
    result = launch(*config(folder), *rule, num_processes=1)
    assert result.returncode != 0 and "holds losses, but no table of the scorer" in result.stderr
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("losses.bin")}
    command = ("--trusted", str(token_data["train"]), "--output", str(copy))
    run("pair", *command, *config(folder), num_processes=2, module="titan_attent.score")
    for role in ("amateur", "expert"):
        for file in ("table.json", "table.bin", "reference.json"):
            assert (copy / role / file).read_bytes() == (original / role / file).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("losses.bin")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher.strategy", "uniform"], '[teacher] level = "span" with strategy = "uniform"'),
        (["--teacher.strategy", "hard"], '[teacher] level = "span" with strategy = "hard"'),
        (["--teacher.level", "token"], "[teacher] level = 'token' is unknown"),
        (
            ["--teacher.pool_size", "50", "--teacher.loss_chunks", "2"],
            '[teacher] pool_size, loss_chunks with level = "s',
        ),
        (["--data.unit", "document"], '[teacher] level = "span" masks documents inside windows of text'),
        (["--training.seq_len", "32"], "holds the scores of other examples: seq_len is 32"),
        (["--teacher.scores", ""], "needs scores: the folder that torchrun -m titan_attent.score pair writes"),
        (["--teacher.scores", "amateur"], "holds only the losses of the amateur"),
        (["--teacher.scores", "without_text"], "reads the trusted held-out text beside the scores: "),
        (["--teacher.scores", "exchanged"], "files of two pairs were mixed"),
        (["--teacher.scores", "damaged"], "the file is damaged; copy the folder again"),
    ],
)
def test_mistakes_end_in_one_message(
    folder: Path, pairs: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    scores = str(pairs["dirty"])
    if arguments[0] == "--teacher.scores" and arguments[1]:
        scores = str(tmp_path / arguments[1])
        shutil.copytree(pairs["dirty"] / ("amateur" if arguments[1] == "amateur" else ""), scores)
        arguments = ["--teacher.scores", scores]
        if scores.endswith("without_text"):
            shutil.rmtree(Path(scores) / "trusted")
        elif scores.endswith("exchanged"):
            for file in ("table.json", "table.bin"):
                shutil.copy(Path(scores) / "expert" / file, Path(scores) / "amateur" / file)
        elif scores.endswith("damaged"):
            file = Path(scores) / "amateur" / "table.bin"
            file.write_bytes(b"\1" + file.read_bytes()[1:])
    dump = ("--job.dump_folder", str(tmp_path / "dump"))
    result = launch(*config(folder), *SPAN, "--teacher.scores", scores, *dump, *arguments, num_processes=1)
    assert result.returncode != 0 and message in result.stderr, result.stdout + result.stderr
    assert result.stderr.count("titan_attent: error: ") == 1 and "Traceback" not in result.stderr
