"""A look at scores keeps what a run with these scores keeps: the same share, of each source, as often.

The run writes some of the rows to TensorBoard.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from launch import read_trace, run, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titan_attent.data.text.writer import write_dataset
from titan_attent.look.decision import RunSize, decide
from titan_attent.look.subject import Subject

SEQ_LEN, BATCH = 64, 4


@pytest.fixture(scope="module")
def mixed(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Code and hexadecimal digits; the code is the trusted text."""
    folder, rng = tmp_path_factory.mktemp("look"), np.random.default_rng(0)
    code = "".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    texts = {
        "code": [code[i : i + 200] for i in range(0, 36_000, 200)],
        "noise": [rng.bytes(60).hex() for _ in range(100)],
    }
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    tokenizer = str(token_data["train"] / "tokenizer.tiktoken")
    inputs = [f"{name}={folder / name}.jsonl" for name in texts]
    write_dataset(inputs, output=folder / "data", tokenizer=tokenizer)
    write_dataset(inputs[:1], output=folder / "trusted", tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize(("unit", "passes"), [("window", 0.8), ("document", 0.03)])
def test_the_cut_is_that_of_a_run(
    mixed: Path, token_data: dict[str, Path], tmp_path: Path, unit: str, passes: float
) -> None:
    """Two processes and, in the first case, so many steps that the bound on repeats decides."""
    subject = Subject(str(mixed / "data"), unit=unit, seq_len=SEQ_LEN)
    steps = int(passes * subject.dataset.num_rows / BATCH)
    data = token_data | {"train": mixed / "data"}
    config = write_config(tmp_path, data=data, dump=tmp_path / "run")
    arguments = [
        *("--job.config_file", str(config), "--training.seq_len", str(SEQ_LEN), "--data.unit", unit),
        *("--training.global_batch_size", str(BATCH), "--training.local_batch_size", str(BATCH // 2)),
    ]
    scorers = tmp_path / "scorers"
    pair = ("pair", "--trusted", str(mixed / "trusted"), "--output", str(scorers))
    run(*pair, *arguments, num_processes=1, module="titan_attent.score")
    # The keys of write_config that the recommended rule sets itself.
    rule = Path(config).read_text().partition("strategy = ")
    rest = rule[2].partition("trace = true")
    config.write_text(f'{rule[0]}strategy = "difference"\nscores = "{scorers}"\ntrace = true{rest[2]}')
    run(*arguments, "--training.steps", str(steps), "--metrics.log_freq", "1")
    decided = json.loads((tmp_path / "run" / "teacher" / "rounds.jsonl").read_text().splitlines()[0])

    decision = decide(subject.dataset, str(scorers), RunSize(batch=BATCH, steps=steps))
    assert decision.kept is not None and 0.05 < decision.kept.mean() < 0.95
    assert decision.kept.sum() == decided["teacher/selected"]
    lengths, kept = subject.lengths, decision.kept

    def share(where: np.ndarray) -> float:
        return lengths[kept & where].sum() / lengths[where].sum()

    assert share(np.ones(len(kept), dtype=bool)) == decided["teacher/ratio"]
    assert decision.visits == decided["teacher/repeats"]
    for number, name in enumerate(subject.source_names):
        assert share(subject.source_of == number) == decided[f"teacher/inclusion/{name}"]
    trained = {i for line in read_trace(tmp_path / "run") for i in line["ids"]}
    assert trained and trained <= set(np.flatnonzero(decision.kept).tolist())
    (events,) = (tmp_path / "run" / "tb").iterdir()
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    (logged,) = accumulator.Tensors("teacher/rows/text_summary")  # once, by the first rank
    text = logged.tensor_proto.string_val[0].decode()
    assert logged.step == 1 and "**kept, highest scores**" in text and "**dropped, lowest scores**" in text
    assert any("max_repeats" in warning for warning in decision.warnings) == (unit == "window")
