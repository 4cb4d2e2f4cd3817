"""Documents as the unit of a run: the real command, on any number of ranks, killed and resumed, taught by documents."""

import json
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from launch import forked_stages, launch, read_checkpoint, read_scalars, read_trace, run, run_until_killed, write_config
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from titan_attent.data.plan.packed import Packer
from titan_attent.data.text.document_examples import DocumentDataset, WholeDocuments
from titan_attent.data.text.writer import write_dataset
from titan_attent.scores.stored import StoredScores

LOSS = "loss_metrics/global_avg_loss"
SEQ_LEN, BATCH, NUM_DOCUMENTS = 128, 6, 400
STEPS = 12


@pytest.fixture(scope="module")
def data(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """400 documents of 0 to 200 letters, every third of them random letters."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    words = Path(json.decoder.__file__).read_text().split()
    with open(folder / "text.jsonl", "w") as file:
        for number in range(NUM_DOCUMENTS):
            size = int(rng.integers(0, 200))
            first = int(rng.integers(0, len(words) - 40))
            text = "".join(rng.choice(list("qxzjkv "), size)) if number % 3 == 0 else " ".join(words[first:])[:size]
            file.write(json.dumps({"text": text}) + "\n")
    tokenizer = str(token_data["train"] / "tokenizer.tiktoken")
    write_dataset([folder / "text.jsonl"], output=folder / "data", tokenizer=tokenizer, shard_tokens=9000)
    return {"train": folder / "data", "validation": folder / "data"}


@pytest.fixture(scope="module")
def config(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("config")
    path = write_config(folder, data=data, dump=folder / "unused")
    return [
        *("--job.config_file", str(path), "--data.unit", "document", "--training.seq_len", str(SEQ_LEN)),
        *("--training.global_batch_size", str(BATCH), "--training.steps", str(STEPS), "--validation.seq_len", "64"),
    ]


def train(config: list[str], dump: Path, *more: str, num_processes: int = 1) -> list[dict[str, Any]]:
    place = ("--job.dump_folder", str(dump), "--training.local_batch_size", str(BATCH // num_processes))
    run(*config, *place, *more, num_processes=num_processes)
    return read_trace(dump)


UNIFORM = ("--teacher.strategy", "uniform")
HARD = (
    *("--teacher.strategy", "hard", "--teacher.ratio_schedule", "constant", "--teacher.initial_ratio", "0.5"),
    *("--teacher.warmup_passes", "1", "--teacher.full_data_tail", "0", "--teacher.interval_schedule", "fixed"),
)
RULES = {"uniform": UNIFORM, "hard": HARD, "soft": ("--teacher.full_data_tail", "0", "--teacher.warmup_passes", "0")}


@pytest.mark.parametrize(
    "rule", ["soft", *(pytest.param(rule, marks=pytest.mark.exhaustive) for rule in ("uniform", "hard"))]
)
def test_any_number_of_ranks_trains_the_same_windows(config: list[str], tmp_path: Path, rule: str) -> None:
    steps = ("--training.steps", "36") if rule == "hard" else ()
    traces = {n: train(config, tmp_path / str(n), *RULES[rule], *steps, num_processes=n) for n in (1, 2, 3)}
    losses = {n: read_scalars(tmp_path / str(n), LOSS) for n in traces}
    assert {line["strategy"] for line in traces[1]} >= {rule}
    for num_processes in (2, 3):
        assert traces[num_processes] == traces[1]
        assert losses[num_processes] == pytest.approx(losses[1], rel=1e-3)


def test_a_full_pass_trains_each_document_once(config: list[str], data: dict[str, Path], tmp_path: Path) -> None:
    dataset = DocumentDataset(data["train"], seq_len=SEQ_LEN)
    one = Packer(dataset, batch_size=BATCH).full_pass((0, 0, 0))
    trace = train(config, tmp_path, *UNIFORM, "--training.steps", str(one.num_batches))
    for step, line in enumerate(trace):
        ids = one.ids(step, step + 1)
        assert line["ids"] == ids[ids < len(dataset)].tolist()
    trained = sorted(sum((line["ids"] for line in trace), []))
    assert len(set(trained)) == len(trained) > 0.9 * len(dataset)


def test_hard_selection_trains_the_documents_of_largest_loss(
    config: list[str], data: dict[str, Path], tmp_path: Path
) -> None:
    dataset = DocumentDataset(data["train"], seq_len=SEQ_LEN)
    warmup = Packer(dataset, batch_size=BATCH).full_pass((0, 0, 0)).num_batches
    saved = ("--checkpoint.enable", "--checkpoint.interval", str(warmup), "--checkpoint.keep_latest_k", "0")
    trace = train(config, tmp_path, *HARD, *saved, "--training.steps", "40")
    selected = {i for line in trace if line["strategy"] == "hard" and line["round"] == 1 for i in line["ids"]}
    buffer = read_checkpoint(tmp_path, step=warmup)["teacher"]["buffer"]
    losses, seen = buffer["loss"].numpy(), buffer["step"].numpy() >= 0
    scores = np.where(seen, losses, np.inf)
    decision = json.loads((tmp_path / "teacher" / "rounds.jsonl").read_text().splitlines()[1])
    order = np.argsort(-scores, kind="stable")
    top = set(order[: int(decision["teacher/selected"])].tolist())
    # The ratio of 0.5 is a share of the tokens, down to a multiple of a batch.
    lengths = dataset.lengths(np.arange(len(dataset)))
    share = decision["teacher/ratio"]
    assert 0.5 - BATCH * SEQ_LEN / dataset.num_pairs <= share < 0.5 + SEQ_LEN / dataset.num_pairs
    assert share == pytest.approx(lengths[list(top)].sum() / dataset.num_pairs, abs=2 * SEQ_LEN / dataset.num_pairs)
    assert len(selected) > 50 and len(selected - top) <= 2, "ties apart"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), pytest.param(2, 2, marks=pytest.mark.exhaustive)])
def test_killed_and_resumed_equals_uninterrupted(config: list[str], tmp_path: Path, before: int, after: int) -> None:
    """On as many ranks, fewer or more: selection, packing, weights and position come from the checkpoint."""
    rule = (*RULES["soft"], "--checkpoint.enable", "--checkpoint.interval", "4")
    expected = train(config, tmp_path / "straight", *rule, num_processes=before)
    killed = tmp_path / "killed"
    place = ("--job.dump_folder", str(killed), "--training.local_batch_size", str(BATCH // before))
    trace = killed / "teacher" / "trace.jsonl"
    run_until_killed(*config, *place, *rule, trace=trace, step=7, num_processes=before)
    assert train(config, killed, *rule, num_processes=after) == expected
    one, other = (read_scalars(tmp_path / name, LOSS) for name in ("straight", "killed"))
    assert one == (other if after == before else pytest.approx(other, rel=1e-3))


def test_concatenated_documents_are_the_same_on_other_ranks_and_after_a_kill(config: list[str], tmp_path: Path) -> None:
    rule = (*UNIFORM, "--data.packing", "concatenate", "--checkpoint.enable", "--checkpoint.interval", "4")
    expected = train(config, tmp_path / "straight", *rule, num_processes=1)
    assert sum(set(a["ids"]) & set(b["ids"]) != set() for a, b in zip(expected, expected[1:], strict=False)) > 5
    killed = tmp_path / "killed"
    place = ("--job.dump_folder", str(killed), "--training.local_batch_size", str(BATCH // 2))
    run_until_killed(*config, *place, *rule, trace=killed / "teacher" / "trace.jsonl", step=7)
    assert train(config, killed, *rule, num_processes=3) == expected
    one, other = (read_scalars(tmp_path / name, LOSS) for name in ("straight", "killed"))
    assert one == pytest.approx(other, rel=1e-3)


def test_the_buffer_gets_the_mean_of_each_document(config: list[str], data: dict[str, Path], tmp_path: Path) -> None:
    """Against torchtitan's bare model on the same windows, token by token; the learning rate is 0."""
    saved = ("--checkpoint.enable", "--checkpoint.interval", str(STEPS), "--optimizer.lr", "0")
    train(config, tmp_path, *HARD, *saved)
    state = read_checkpoint(tmp_path, step=STEPS)
    args = TransformerModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=512, multiple_of=32, rope_theta=10000)
    weights = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    args.vocab_size = len(weights["tok_embeddings.weight"])
    args.max_seq_len = SEQ_LEN
    model = Transformer(args).eval()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    dataset = DocumentDataset(data["train"], seq_len=SEQ_LEN)
    one = Packer(dataset, batch_size=BATCH).full_pass((0, 0, 0))
    buffer, checked = state["teacher"]["buffer"], 0
    with torch.no_grad():
        for step in range(min(STEPS, one.num_batches)):
            ids = one.ids(step, step + 1)
            batch, labels = dataset.read(ids)
            log_p = model(batch["input"]).double().log_softmax(dim=-1)
            for row in range(BATCH):
                for slot, i in enumerate(ids[row].tolist()):
                    if i == len(dataset):
                        continue
                    places = (batch["example_index"][row] == slot) & (labels[row] >= 0)
                    expected = -log_p[row, places].gather(1, labels[row, places][:, None]).mean()
                    assert float(buffer["first_loss"][i]) == pytest.approx(float(expected), rel=1e-5)
                    assert int(buffer["visits"][i]) == 1 and int(buffer["first_step"][i]) == step + 1
                    checked += 1
    assert checked > 100 and int(buffer["visits"].sum()) == checked


def test_scores_of_documents_serve_every_length(config: list[str], data: dict[str, Path], tmp_path: Path) -> None:
    """Made once; the trusted text is like two thirds of the data, and the random letters are left out."""
    scorers = tmp_path / "scorers"
    words = Path(json.decoder.__file__).read_text()
    trusted = tmp_path / "trusted.jsonl"
    trusted.write_text("".join(json.dumps({"text": words[i : i + 100]}) + "\n" for i in range(0, 13_000, 60)))
    tokenizer = str(data["train"] / "tokenizer.tiktoken")
    write_dataset([trusted], output=tmp_path / "trusted", tokenizer=tokenizer)
    run(
        *("pair", "--trusted", str(tmp_path / "trusted"), "--output", str(scorers), *config),
        num_processes=2,
        module="titan_attent.score",
    )
    stored = json.loads((scorers / "amateur" / "reference.json").read_text())
    assert stored["seq_len"] == 0 and stored["num_examples"] == NUM_DOCUMENTS
    difference = np.fromfile(scorers / "amateur" / "losses.bin", "<f4") - np.fromfile(
        scorers / "expert" / "losses.bin", "<f4"
    )
    rule = {
        **{"strategy": "difference", "importance": "cross_entropy_difference", "ratio_schedule": "calibrated"},
        **{"interval_schedule": "fixed", "scores": scorers, "max_repeats": 100},
    }
    teacher = [word for key, value in rule.items() for word in (f"--teacher.{key}", str(value))]
    for seq_len, packing in ((SEQ_LEN, "best_fit"), (32, "best_fit"), (32, "concatenate")):
        dump = tmp_path / f"{seq_len}-{packing}"
        length = ("--training.seq_len", str(seq_len), "--validation.seq_len", "32", "--training.steps", "8")
        trace = train(config, dump, *teacher, *length, "--data.packing", packing)
        dataset = DocumentDataset(data["train"], seq_len=seq_len)
        documents = dataset.documents_of(np.array(sorted({i for line in trace for i in line["ids"]})))
        assert (documents % 3 == 0).mean() < 0.1, "random letters are a third of the data"
        cut = np.sort(difference[np.unique(documents)])[0]
        assert (difference < cut).mean() > 0.2


def test_trained_scorers_score_whole_documents(config: list[str], data: dict[str, Path], tmp_path: Path) -> None:
    """Against torchtitan's bare model, span by span: a document longer than a row has the mean of all its tokens."""
    seq_len, scorers = 32, tmp_path / "scorers"
    run(
        *("pair", "--flavor", "scorer_xs", "--steps", "3", "--batch_size", "8", "--trusted", str(data["train"])),
        *("--output", str(scorers), *config, "--training.seq_len", str(seq_len)),
        num_processes=1,
        module="titan_attent.score",
        prepare=forked_stages(),
    )
    dataset = DocumentDataset(data["train"], seq_len=seq_len)
    spans = torch.arange(len(dataset))
    documents = torch.from_numpy(dataset.documents_of(spans.numpy()))
    assert (torch.bincount(documents) > 1).sum() > 100
    batch, labels = dataset.read(spans)
    for name in ("amateur", "expert"):
        weights = read_checkpoint(scorers / "models" / name, step=3)
        args = TransformerModelArgs(
            dim=32, n_layers=1, n_heads=2, vocab_size=len(weights["tok_embeddings.weight"]), multiple_of=32
        )
        args.rope_theta, args.max_seq_len = 10000, seq_len
        model = Transformer(args).eval()
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(batch["input"]).transpose(1, 2), labels, reduction="none", ignore_index=-100
            )
        sums, counts = torch.zeros(2, NUM_DOCUMENTS, dtype=torch.float64)
        sums.index_add_(0, documents, losses.double().sum(dim=1))
        counts.index_add_(0, documents, (labels >= 0).double().sum(dim=1))
        scores = StoredScores(scorers / name)
        scores.check(dataset.scored)
        scores.check(DocumentDataset(data["train"], seq_len=SEQ_LEN).scored)
        expected = sums / counts.clamp(min=1)
        assert scores.read(0, NUM_DOCUMENTS).tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
        assert StoredScores(scorers / name / "trusted").scoring.num_examples > 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.unit", "documents"], '[data] unit = \'documents\' is unknown: use one of "window", "document"'),
        (["--teacher.pool_size", "50"], '[teacher] pool_size = 50 with data.unit = "document"'),
        (
            ["--parallelism.context_parallel_degree", "2", "--parallelism.context_parallel_load_balancer", "ptrr"],
            '[parallelism] context_parallel_load_balancer = "ptrr" with [data] unit = "document"',
        ),
        (["--data.unit", "window", "--data.max_examples_per_window", "4"], "where a window is one example: remove it"),
        (["--training.global_batch_size", "600"], "fewer than one global batch of 600"),
        (["--data.packing", "first_fit"], "[data] packing = 'first_fit' is unknown"),
        (["--data.packing", "concatenate"], "no window has the loss of a document that it cuts"),
        (
            ["--data.packing", "concatenate", "--data.unit", "window"],
            '[data] packing = "concatenate" with unit = "window"',
        ),
    ],
)
def test_mistakes_end_in_one_message(config: list[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    dump = ("--job.dump_folder", str(tmp_path / "dump"), "--training.local_batch_size", "3")
    result = launch(*config, *dump, *arguments, num_processes=2)
    assert result.returncode != 0 and message in result.stderr, result.stderr
    assert result.stderr.count("titan_attent: error: ") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "dump").exists()


def test_a_checkpoint_scores_whole_documents(config: list[str], data: dict[str, Path], tmp_path: Path) -> None:
    """In short rows on two ranks, and packed with a mask on one: the losses of the bare model, span by span."""
    saved = ("--checkpoint.enable", "--model.flavor", "bench", "--training.steps", "1")
    train(config, tmp_path / "run", *UNIFORM, *saved)
    span = 32
    options = [
        *("--training.seq_len", str(span), "--validation.local_batch_size", "4"),
        *("--checkpoint.initial_load_path", str(tmp_path / "run" / "checkpoint" / "step-1")),
    ]
    for name, flavor, num_processes in (("short", "bench", 2), ("packed", "bench_flex", 1)):
        mask = ("--data.document_mask",) if name == "packed" else ()
        run(
            *("checkpoint", "--output", str(tmp_path / name), *config, *options, "--model.flavor", flavor, *mask),
            num_processes=num_processes,
            module="titan_attent.score",
        )
    args = TransformerModelArgs(dim=128, n_layers=3, n_heads=4, vocab_size=1024, multiple_of=64, rope_theta=10000)
    args.max_seq_len = SEQ_LEN
    model = Transformer(args).eval()
    state = read_checkpoint(tmp_path / "run", step=1)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    whole, expected = WholeDocuments(data["train"]), []
    with torch.no_grad():
        for i in range(len(whole)):
            batch, labels = whole.read(torch.tensor([i]))
            nats = []
            for first in range(0, labels.shape[1], span):
                wanted = labels[0, first : first + span]
                log_p = model(batch["input"][:, first : first + span])[0].double().log_softmax(dim=-1)
                nats += [-log_p[place, label].item() for place, label in enumerate(wanted.tolist()) if label >= 0]
            expected.append(np.mean(nats) if nats else 0.0)
    assert max(len(whole.read(torch.tensor([i]))[1][0]) for i in range(9)) > span
    for name in ("short", "packed"):
        stored = StoredScores(tmp_path / name)
        stored.verify_checksum()
        stored.check(DocumentDataset(data["train"], seq_len=SEQ_LEN).scored)
        np.testing.assert_allclose(stored.read(0, NUM_DOCUMENTS).numpy(), expected, rtol=1e-5)
