"""Forward scoring by the real command: the scores are those of a plain model, on any number of ranks."""

import shutil
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import torch
from launch import launch, read_checkpoint, read_scalars, read_trace, read_weights, run, write_config
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from titan_attent.data.plan.order import Pool
from titan_attent.data.text.shards import TokenShards
from titan_attent.scores.stored import Scoring
from titan_attent.scores.writer import ScoresWriter

SEQ_LEN = 256


def plain_scores(weights: dict[str, torch.Tensor], data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss and functional gradient norm of every window, row by row, in float64 from fp32 logits."""
    args = {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 512, "multiple_of": 32, "rope_theta": 10000}
    model = Transformer(TransformerModelArgs(**args, max_seq_len=SEQ_LEN))
    with torch.no_grad():
        model.init_weights()
    missing, _ = model.load_state_dict({k: v for k, v in weights.items() if k in model.state_dict()}, strict=False)
    assert not missing
    model.eval()
    tokens = np.concatenate([np.fromfile(shard, dtype="<u2") for shard in sorted(data.glob("shard-*.bin"))])
    stream = torch.from_numpy(tokens.astype(np.int64))
    losses, norms = [], []
    for i in range((len(stream) - 1) // SEQ_LEN):
        window = stream[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1]
        with torch.no_grad():
            log_p = model(window[None, :-1])[0].double().log_softmax(dim=-1)
        onehot = torch.nn.functional.one_hot(window[1:], log_p.shape[1])
        losses.append(-(log_p * onehot).sum(dim=1).mean().item())
        norms.append((log_p.exp() - onehot).square().sum(dim=1).mean().sqrt().item())
    return np.array(losses), np.array(norms)


def test_forward_scores_are_those_of_the_plain_model(token_data: dict[str, Path], tmp_path: Path) -> None:
    """The warm-up takes 9 steps; the learner then scores every example, and the hard selection trains the top ones."""
    dump, alone = tmp_path / "run", tmp_path / "alone"
    config = write_config(tmp_path, data=token_data, dump=dump)
    args = [
        *("--job.config_file", str(config), "--training.steps", "12", "--lr_scheduler.total_steps", "12"),
        *("--teacher.strategy", "hard", "--teacher.importance", "functional_gradient"),
        *("--teacher.scoring", "forward_once", "--teacher.full_data_tail", "0", "--teacher.scoring_batch_size", "5"),
        *("--checkpoint.enable", "--checkpoint.interval", "9"),
    ]
    run(*args)
    losses, norms = plain_scores(read_weights(dump, step=9), token_data["train"])
    buffer = read_checkpoint(dump, step=12)["teacher"]["buffer"]
    scored = (buffer["step"] == 9).numpy()
    assert scored.sum() > len(losses) / 2  # the others were trained again after it
    np.testing.assert_allclose(buffer["loss"].numpy()[scored], losses[scored], rtol=1e-4)
    np.testing.assert_allclose(buffer["gradient"].numpy()[scored], norms[scored], rtol=1e-4)
    # round(0.3 x 78) down to batches of 8 is 16: the 16 largest norms, two steps.
    chosen = [i for line in read_trace(dump)[9:11] for i in line["ids"]]
    assert sorted(chosen) == sorted(np.argsort(-norms)[:16].tolist())
    assert read_scalars(dump, "ledger/score_seconds")[12] > 0

    alone.mkdir()
    shutil.copytree(dump / "checkpoint" / "step-9", alone / "checkpoint" / "step-9")
    run(*args, "--job.dump_folder", str(alone), num_processes=1)
    assert read_trace(alone)[:2] == read_trace(dump)[9:11]


def test_excess_loss_teaches_what_lies_above_the_reference(token_data: dict[str, Path], tmp_path: Path) -> None:
    """A synthetic expert decides: without a warm-up, the first selection is the top of first loss - expert's loss."""
    shards = TokenShards(token_data["train"])
    num_examples = (shards.num_tokens - 1) // SEQ_LEN
    reference = np.random.default_rng(0).uniform(0, 5, num_examples).astype(np.float32)
    scoring = Scoring(
        **{"data_fingerprint": shards.fingerprint, "seq_len": SEQ_LEN, "num_examples": num_examples},
        **{"model": "synthetic", "precision": "float32", "checkpoint": "none", "checkpoint_sha256": "none"},
    )
    with ScoresWriter(tmp_path / "reference", scoring=scoring) as writer:
        writer.append(torch.from_numpy(reference))
        writer.finish()
    config = write_config(tmp_path, data=token_data, dump=tmp_path / "run")
    args = [
        *("--job.config_file", str(config), "--training.steps", "2", "--checkpoint.enable"),
        *("--teacher.strategy", "hard", "--teacher.importance", "excess_loss", "--teacher.warmup_passes", "0"),
        *("--teacher.scoring", "forward_once", "--teacher.scores", str(tmp_path / "reference")),
    ]
    run(*args)
    buffer = read_checkpoint(tmp_path / "run", step=2)["teacher"]["buffer"]
    assert (buffer["first_step"] == 0).all()
    excess = buffer["first_loss"].numpy() - reference
    chosen = [i for line in read_trace(tmp_path / "run") for i in line["ids"]]
    assert sorted(chosen) == sorted(np.argsort(-excess)[:16].tolist())

    result = launch(*args, "--training.seq_len", "128", "--job.dump_folder", str(tmp_path / "other"))
    assert result.returncode != 0
    assert "seq_len is 128 in this run and 256 in the folder" in result.stderr and "titan_attent.score" in result.stderr


def test_pools_are_scored_by_forward_passes_and_ranks_read_what_they_were_assigned(
    token_data: dict[str, Path], tmp_path: Path
) -> None:
    """One step per round: of the next 36 examples of the order the learner trains the 12 of largest loss."""
    dump = tmp_path / "run"
    config = write_config(tmp_path, data=token_data, dump=dump)
    args = [
        *("--job.config_file", str(config), "--training.global_batch_size", "12", "--training.local_batch_size", "2"),
        *("--training.steps", "4", "--lr_scheduler.total_steps", "4", "--teacher.pool_size", "36"),
        *("--teacher.strategy", "hard", "--teacher.scoring", "forward", "--teacher.scoring_batch_size", "5"),
        *("--teacher.warmup_passes", "0", "--teacher.full_data_tail", "0", "--teacher.max_interval", "1"),
        *("--teacher.ratio_schedule", "constant", "--teacher.initial_ratio", "0.34"),
        *("--checkpoint.enable", "--checkpoint.interval", "1"),
    ]
    run(*args)
    num_examples = (TokenShards(token_data["train"]).num_tokens - 1) // SEQ_LEN
    num_pools = num_examples // 36
    trace = read_trace(dump)
    for step in range(1, 4):  # round step + 1 selected by the losses of the weights after step
        losses, _ = plain_scores(read_weights(dump, step=step), token_data["train"])
        order = Pool(num_examples, order=(0, 0, step // num_pools), start=36 * (step % num_pools), size=36)
        ids = order.ids(torch.arange(36)).numpy()
        buffer = read_checkpoint(dump, step=step + 1)["teacher"]["buffer"]
        left_out = [i for i in ids.tolist() if i not in trace[step]["ids"]]
        assert (buffer["step"][left_out] == step).all()
        np.testing.assert_allclose(buffer["loss"].numpy()[left_out], losses[left_out], rtol=1e-4)
        assert sorted(trace[step]["ids"]) == sorted(ids[np.argsort(-losses[ids])[:12]].tolist())
    assert read_scalars(dump, "ledger/examples_scored")[4] == 4 * 36
    assert read_scalars(dump, "ledger/examples_skipped")[4] == 4 * 24

    for num_processes in (1, 3):
        other = tmp_path / str(num_processes)  # from the same initial weights, which depend on the number of ranks
        shutil.copytree(dump / "checkpoint" / "step-1", other / "checkpoint" / "step-1")
        run(*args, "--job.dump_folder", str(other), num_processes=num_processes)
        assert read_trace(other) == trace[1:]
