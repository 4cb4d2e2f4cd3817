"""A planted corpus: half its rows are copies of 32 rows. A teacher that sees losses leaves most copies out."""

import sysconfig
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from paper import paper_config
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from titan_attent import LossBuffer, Teacher, TeachingSampler, per_example_cross_entropy

NUM_ROWS, NUM_ORIGINALS, SEQ_LEN, BATCH = 1024, 32, 32, 32
STEPS = 120
WARMUP_PASSES = 2


@pytest.fixture(scope="module")
def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """(rows int64 [NUM_ROWS, 33] of source text, bytes as tokens; is_copy bool [NUM_ROWS]), in random places."""
    text = np.frombuffer((Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes(), dtype=np.uint8)
    needed = NUM_ROWS // 2 + NUM_ORIGINALS
    windows = torch.from_numpy(text[: needed * (SEQ_LEN + 1)].astype(np.int64)).view(needed, SEQ_LEN + 1)
    copies = windows[-NUM_ORIGINALS:].repeat(NUM_ROWS // 2 // NUM_ORIGINALS, 1)
    rows = torch.cat((windows[: NUM_ROWS // 2], copies))
    is_copy = torch.arange(NUM_ROWS) >= NUM_ROWS // 2
    places = torch.from_numpy(np.random.default_rng(0).permutation(NUM_ROWS))
    return rows[places], is_copy[places]


def copies_selected(strategy: str, corpus: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
    """Train a llama by the plain loop: the copies and the examples trained in selected passes."""
    rows, is_copy = corpus
    torch.manual_seed(0)
    model = Transformer(TransformerModelArgs(dim=64, n_layers=1, n_heads=2, vocab_size=256, max_seq_len=SEQ_LEN))
    with torch.no_grad():
        model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    buffer = LossBuffer(NUM_ROWS)
    config = paper_config(strategy=strategy, warmup_passes=WARMUP_PASSES, initial_ratio=0.4, full_data_tail=0.0)
    teacher = Teacher(buffer, config, batch_size=BATCH, total_steps=STEPS)
    num_copies = num_selected = 0
    for step, (ids, weights) in zip(range(1, STEPS + 1), TeachingSampler(teacher), strict=False):
        if teacher.rounds.selecting:
            num_copies, num_selected = num_copies + int(is_copy[ids].sum()), num_selected + len(ids)
        sums, counts = per_example_cross_entropy(model(rows[ids, :-1]), rows[ids, 1:])
        (weights @ sums / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        buffer.record(ids, sums / counts, step=step)
        teacher.step_done()
    return num_copies, num_selected


@pytest.mark.parametrize("strategy", ["hard", "soft"])
def test_copies_are_chosen_less_than_their_share(strategy: str, corpus: tuple[torch.Tensor, torch.Tensor]) -> None:
    num_copies, num_selected = copies_selected(strategy, corpus)
    # Four standard deviations of a draw that knows nothing; without replacement it would be narrower still.
    assert num_copies < num_selected / 2 - 4 * (num_selected / 4) ** 0.5


def test_random_selection_keeps_their_share(corpus: tuple[torch.Tensor, torch.Tensor]) -> None:
    num_copies, num_selected = copies_selected("random", corpus)
    assert abs(num_copies - num_selected / 2) < 4 * (num_selected / 4) ** 0.5
