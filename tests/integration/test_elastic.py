"""Resume on another number of data-parallel ranks: the same examples, and the same losses but for the order of sums."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import kill_when, read_scalars, read_trace, run, start

LOSS = "loss_metrics/global_avg_loss"
BATCH = 12
"""The global batch: whole on 1, 2 and 3 ranks."""
STEPS, SAVED = 18, 9
TOLERANCE = 2e-6
"""Of fp32 losses whose sums run in another order: sixteen units in the last place; two are seen. A lost optimizer state
or another example in a batch shows in the third digit."""
SETTINGS = {
    # 5 steps of warm-up, rounds of two passes of 2 and more steps, drawn anew for each pass, 2 steps of anneal tail.
    "soft": ("--teacher.strategy", "soft", "--teacher.initial_interval", "2", "--teacher.temperature", "0.3"),
    "hard": (
        *("--teacher.strategy", "hard", "--teacher.importance", "learnability", "--teacher.scoring", "forward_once"),
        *("--teacher.ratio_schedule", "adaptive", "--teacher.final_ratio", "0.9"),
    ),
}
Runner = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Arguments of a run, whose weights start from those of one file: torchtitan's draw depends on the ranks."""
    seed = tmp_path_factory.mktemp("seed")
    flags = ("--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--checkpoint.last_save_model_only")
    run(*small_run, *flags, "--job.dump_folder", str(seed), num_processes=1)

    def of(dump: Path, *, strategy: str, ranks: int) -> list[str]:
        return [
            *(*small_run, *SETTINGS[strategy], "--job.dump_folder", str(dump)),
            *("--training.steps", str(STEPS), "--training.global_batch_size", str(BATCH)),
            *("--training.local_batch_size", str(BATCH // ranks)),
            *("--checkpoint.enable", "--checkpoint.interval", str(SAVED)),
            *("--checkpoint.initial_load_path", str(seed / "checkpoint" / "step-0")),
        ]

    return of


@pytest.fixture(scope="module")
def straight(arguments: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The uninterrupted runs on 2 ranks; they leave the checkpoint in their middle, too."""
    dumps = {strategy: tmp_path_factory.mktemp(f"straight_{strategy}") for strategy in SETTINGS}
    for strategy, dump in dumps.items():
        run(*arguments(dump, strategy=strategy, ranks=2))
    return dumps


@pytest.mark.parametrize(
    ("strategy", "written_by", "resumed_by"),
    [
        *(("soft", 2, 1), ("soft", 1, 3)),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("soft", 3, 2), ("hard", 2, 3))),
    ],
)
def test_resumed_on_other_ranks_equals_uninterrupted(
    strategy: str, written_by: int, resumed_by: int, arguments: Runner, straight: dict[str, Path], tmp_path: Path
) -> None:
    dump, reference = tmp_path / "run", straight[strategy]
    if written_by == 2:
        shutil.copytree(reference, dump)
        shutil.rmtree(dump / "checkpoint" / f"step-{STEPS}")
    else:
        metadata = dump / "checkpoint" / f"step-{SAVED}" / ".metadata"
        writer = arguments(dump, strategy=strategy, ranks=written_by)
        kill_when(metadata.exists, start(*writer, num_processes=written_by))
    output = run(*arguments(dump, strategy=strategy, ranks=resumed_by), num_processes=resumed_by)
    assert f"Training starts at step {SAVED + 1}" in output

    trace = read_trace(reference)
    assert read_trace(dump) == trace
    assert [line["step"] for line in trace] == list(range(1, STEPS + 1))
    # The checkpoint lies inside a pass over a selection: its ids are rebuilt from the teacher's state.
    before, after = trace[SAVED - 1], trace[SAVED]
    assert before["strategy"] == after["strategy"] == strategy and before["round"] == after["round"]
    assert not set(before["ids"]) & set(after["ids"]), "the two steps must be of one pass"
    if strategy == "soft":
        assert read_scalars(reference, "teacher/max_weight")[SAVED + 1] > 1.1

    expected, losses = read_scalars(reference, LOSS), read_scalars(dump, LOSS)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses == {step: pytest.approx(loss, rel=TOLERANCE) for step, loss in expected.items()}
