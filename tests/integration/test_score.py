"""Scoring: the losses of a plain model on the same windows, on any number of ranks, and after a kill.

As a module, ``torchrun -m test_score``, this is the real command with a stretch of one batch: the test data would all
be one stretch.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from launch import kill_when, launch, read_weights, run, start, write_config
from torchtitan.config import ConfigManager
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from titan_attent.data.text.shards import TokenDataset
from titan_attent.scores.stored import StoredScores
from titan_attent.titan.scoring import checkpoint, command, write_losses
from titan_attent.titan.train_spec import attent_spec

BATCH = ("--validation.local_batch_size", "4")
SEQ_LEN = 256


def plain_model(**other: int) -> Transformer:
    args = {"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 512, "multiple_of": 64, "rope_theta": 10000} | other
    return Transformer(TransformerModelArgs(**args, max_seq_len=SEQ_LEN)).eval()


@pytest.fixture(scope="module")
def folder(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with a full checkpoint of step 3 and a model-only one of step 6, its latest."""
    folder = tmp_path_factory.mktemp("score")
    config = write_config(folder, data=token_data, dump=folder / "run", flavor="scorer_s")
    checkpoint = ("--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.last_save_model_only")
    run("--job.config_file", str(config), "--training.steps", "6", *checkpoint)
    return folder


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """The scores of step 3, written on two ranks, with the run's settings in the TOML."""
    before = files_of(folder / "run")
    output = run(
        *arguments(folder, "straight"),
        *("--checkpoint.enable", "--validation.enable", "--teacher.importance", "excess_loss"),
        module="titan_attent.score",
    )
    assert re.search(r"78/78 .* examples/s", output)
    assert files_of(folder / "run") == before, "scoring wrote into the run's folder"
    return folder / "straight"


def arguments(folder: Path, reference: str, *, step: int = 3) -> list[str]:
    return [
        *("checkpoint", "--output", str(folder / reference)),
        *("--job.config_file", str(folder / "config.toml"), *BATCH),
        *("--checkpoint.initial_load_path", str(folder / "run" / "checkpoint" / f"step-{step}")),
    ]


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def losses_in(reference: Path) -> torch.Tensor:
    losses = StoredScores(reference)
    losses.verify_checksum()
    return losses.read(0, losses.num_examples)


@torch.no_grad()
def plain_losses(folder: Path, data: Path, *, step: int) -> torch.Tensor:
    """Mean nats per token of every window, float64: one process, torchtitan's bare model, windows cut with numpy."""
    model = plain_model()
    weights = read_weights(folder / "run", step=step)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    tokens = np.concatenate([np.fromfile(shard, dtype="<u2") for shard in sorted(data.glob("shard-*.bin"))])
    losses = []
    for first in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
        window = torch.from_numpy(tokens[first : first + SEQ_LEN + 1].astype(np.int64))
        log_p = model(window[None, :-1])[0].double().log_softmax(dim=-1)
        losses.append(-log_p[torch.arange(SEQ_LEN), window[1:]].mean())
    return torch.stack(losses)


def test_losses_are_those_of_the_plain_model(folder: Path, straight: Path, token_data: dict[str, Path]) -> None:
    losses, expected = losses_in(straight), plain_losses(folder, token_data["train"], step=3)
    assert expected.std() > 0.05, "the windows must differ for their order to show"
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    dataset = TokenDataset(token_data["train"], seq_len=SEQ_LEN)
    reference = StoredScores(straight)
    reference.check(dataset.scored)
    assert reference.scoring.model == "llama3_attent scorer_s"
    assert reference.scoring.checkpoint == str(folder / "run" / "checkpoint" / "step-3")


def test_a_model_only_checkpoint_scores(folder: Path, token_data: dict[str, Path]) -> None:
    run(*arguments(folder, "model_only", step=6), num_processes=1, module="test_score")
    expected = plain_losses(folder, token_data["train"], step=6)
    torch.testing.assert_close(losses_in(folder / "model_only").double(), expected, rtol=1e-5, atol=0)


def test_one_rank_finds_the_same_losses(folder: Path, straight: Path) -> None:
    batch = ("--validation.local_batch_size", "3")
    run(*arguments(folder, "one_rank"), *batch, num_processes=1, module="titan_attent.score")
    torch.testing.assert_close(losses_in(folder / "one_rank"), losses_in(straight), rtol=1e-5, atol=0)


def num_scored(reference: Path) -> int:
    progress = reference / "scoring.json"
    return json.loads(progress.read_text())["num_scored"] if progress.exists() else 0


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """A scoring on two ranks that SIGKILL ended halfway; "killed" is its folder."""
    workers = start(*arguments(folder, "killed"), module="test_score")
    kill_when(lambda: num_scored(folder / "killed") >= 24, workers)
    assert 24 <= num_scored(folder / "killed") < 78
    return folder / "killed"


def check(folder: Path, *args: str) -> None:
    """The checks of titan_attent.score before it starts; the last of two equal arguments counts."""
    cli = ["--job.custom_config_module", "titan_attent.job_config"]
    options, rest = checkpoint.parse_options([*args[1:], *cli])
    job_config = checkpoint.scoring_config(ConfigManager().parse_args(rest))
    spec = attent_spec(job_config.model.name, data=job_config.data.path)
    checkpoint.check_scoring(job_config, spec, options, world_size=2)


def test_only_the_same_scoring_resumes(folder: Path, killed: Path, token_data: dict[str, Path]) -> None:
    same = arguments(folder, "killed")
    check(folder, *same)
    with pytest.raises(ValueError, match="data_fingerprint was .*; num_examples was 78 and is .* to start again"):
        check(folder, *same, "--data.path", str(token_data["validation"]))
    with pytest.raises(ValueError, match="seq_len was 256 and is 128"):
        check(folder, *same, "--training.seq_len", "128")
    with pytest.raises(ValueError, match="precision was 'float32' and is 'bfloat16'"):
        check(folder, *same, "--training.mixed_precision_param", "bfloat16")
    with pytest.raises(ValueError, match="checkpoint_sha256 was"):
        check(folder, *arguments(folder, "killed", step=6))


def copy_of(killed: Path, name: str, *, change: Callable[[np.ndarray], None]) -> Path:
    """Another folder of the same killed scoring, with ``change`` applied to the durably written losses."""
    copy = shutil.copytree(killed, killed.parent / name)
    losses = np.fromfile(copy / "losses.bin", dtype="<f4", count=num_scored(copy))
    change(losses)
    losses.tofile(copy / "losses.bin")
    return copy


def test_losses_that_are_not_finite_end_every_rank(folder: Path, killed: Path) -> None:
    broken = copy_of(killed, "broken", change=lambda losses: losses.__setitem__(13, np.nan))
    result = launch(*arguments(folder, "broken"), module="test_score")
    assert result.returncode != 0
    (message,) = re.findall("titan_attent: error: (.*)", result.stdout + result.stderr)
    counted = f"broken: 1 of the {num_scored(broken)} losses from example 0 on are not finite"
    assert re.search(counted + ", first those of examples 13: .*Delete", message)
    assert not (broken / "reference.json").exists()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_resumed_equals_uninterrupted(folder: Path, straight: Path, killed: Path, num_processes: int) -> None:
    """On two ranks, those of the killed scoring, bit for bit."""
    name = f"resumed_{num_processes}"
    # A mark that a loss loses if it is scored again.
    resumed = copy_of(killed, name, change=lambda losses: np.negative(losses, out=losses))
    done = num_scored(resumed)
    run(*arguments(folder, name), num_processes=num_processes, module="test_score")
    losses = losses_in(resumed)
    assert losses[:done].max() < 0 < losses[done:].min(), "a stored loss was scored again, or lost"
    torch.testing.assert_close(losses.abs(), losses_in(straight), rtol=0 if num_processes == 2 else 1e-5, atol=0)
    assert sorted(path.name for path in resumed.iterdir()) == ["losses.bin", "reference.json"]


def test_a_finished_reference_is_not_overwritten(folder: Path, straight: Path) -> None:
    with pytest.raises(ValueError, match="straight: holds finished scores; choose another --output"):
        check(folder, *arguments(folder, "straight"))


def test_bad_arguments(folder: Path) -> None:
    good = arguments(folder, "new")
    check(folder, *good)
    assert not (folder / "new").exists(), "a check writes nothing"
    for args, message in (
        (("--output", ""), "--output is missing: name the folder"),
        (("--output", str(folder / "config.toml")), "config.toml: is a file"),
        (("--checkpoint.initial_load_path", ""), r"\[checkpoint\] initial_load_path is empty: give the step folder"),
        (("--checkpoint.initial_load_path", "/nowhere"), "initial_load_path = /nowhere does not exist"),
        (("--checkpoint.initial_load_path", str(folder / "run")), r"give one of them, such as .*/checkpoint/step-6"),
        (
            ("--checkpoint.initial_load_path", str(folder / "run" / "tb")),
            "is not a DCP checkpoint or was never finished",
        ),
        (("--validation.local_batch_size", "0"), "local_batch_size = 0: it must be at least 1"),
        (
            ("--parallelism.tensor_parallel_degree", "2"),
            "supports data parallelism only.* Give --parallelism.tensor_parallel_degree 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check(folder, *good, *args)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n_layers": 3}, r"layers.2.attention.wk.weight is \[64, 64\] here and absent there"),
        ({"n_layers": 1}, r"layers.1.attention.wk.weight is absent here and \[64, 64\] there"),
        ({"vocab_size": 1024}, "is of another vocabulary: it has 512 token ids, and this model has 1,024"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(folder: Path, other: dict[str, int], message: str) -> None:
    for step in (3, 6):
        path = str(folder / "run" / "checkpoint" / f"step-{step}")
        checkpoint.check_weights(plain_model().state_dict(), path)
        with pytest.raises(ValueError, match=message):
            checkpoint.check_weights(plain_model(**other).state_dict(), path)


if __name__ == "__main__":
    write_losses.CHUNK_EXAMPLES = 1
    command.score()
