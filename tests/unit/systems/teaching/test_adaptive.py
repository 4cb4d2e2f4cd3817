"""The adaptive ratio and forward scoring in the teacher, with synthetic losses."""

import pytest
import torch
from paper import paper_config

from titan_attent import LossBuffer, Teacher, TeachingSampler
from titan_attent.data.plan.order import Pool
from titan_attent.systems.teaching.schedule import adaptive_ratio

NUM_EXAMPLES, BATCH = 96, 8


def make_teacher(losses: torch.Tensor, **config: object) -> tuple[Teacher, list[int]]:
    """A teacher whose forward pass reads ``losses``; and the steps at which it scored."""
    buffer = LossBuffer(NUM_EXAMPLES)
    scored: list[int] = []

    def score(step: int, pool: Pool) -> None:
        assert pool == Pool.whole(NUM_EXAMPLES)
        scored.append(step)
        buffer.record(torch.arange(NUM_EXAMPLES), losses, step=step, trained=False)

    settings = {
        "strategy": "hard",
        "interval_schedule": "fixed",
        "full_data_tail": 0.0,
        "max_repeats": 1e6,
        **config,
    }
    teacher = Teacher(buffer, paper_config(**settings), batch_size=BATCH, total_steps=400, score=score)  # type: ignore[arg-type]
    return teacher, scored


def train(teacher: Teacher, losses: torch.Tensor, *, steps: int) -> list[int]:
    sizes = []
    for step, (ids, _) in zip(range(1, steps + 1), TeachingSampler(teacher), strict=False):
        teacher.buffer.record(ids, losses[ids], step=step)
        teacher.step_done()
        sizes.append(len(teacher.current_pass().selected))
    return sizes


@pytest.mark.parametrize("num_important, expected", [(96, 96), (48, 24), (24, 16)])
def test_adaptive_ratio_follows_the_effective_sample_size(num_important: int, expected: int) -> None:
    """m equal scores of N: share m / N, ratio (m / N)^2 within [1/6, 1], down to whole batches."""
    losses = torch.where(torch.arange(NUM_EXAMPLES) < num_important, 2.0, 0.0)
    teacher, _ = make_teacher(losses, ratio_schedule="adaptive", initial_ratio=1 / 6, final_ratio=1.0)
    assert train(teacher, losses, steps=13)[-1] == expected


def test_adaptive_ratio_keeps_its_bounds() -> None:
    assert adaptive_ratio(0.5, lowest=0.1, highest=1.0) == 0.25
    assert adaptive_ratio(0.1, lowest=0.3, highest=0.6) == 0.3
    assert adaptive_ratio(1.0, lowest=0.3, highest=0.6) == 0.6


def test_what_would_leave_out_less_than_three_tenths_leaves_out_nothing() -> None:
    assert adaptive_ratio(0.837, lowest=0.1, highest=1.0) == 1.0  # 0.7006
    assert adaptive_ratio(0.836, lowest=0.1, highest=1.0) == 0.836**2  # 0.6989
    assert adaptive_ratio(0.837, lowest=0.1, highest=0.9) == 0.9


def test_a_twentieth_of_junk_is_seen() -> None:
    """Scores spread as clean text's after a pass, and a twentieth with a score of 0."""
    clean = 1 / (1 + 0.39**2)  # of scores with that coefficient of variation
    assert 0.73 < clean**2 < 0.78 and adaptive_ratio(clean, lowest=0.1, highest=1.0) == 1.0
    assert adaptive_ratio(0.95 * clean, lowest=0.1, highest=1.0) < 0.7


@pytest.mark.parametrize("scoring, expected", [("train", []), ("forward_once", [12]), ("forward", [12, 18, 24])])
def test_when_the_learner_scores(scoring: str, expected: list[int]) -> None:
    losses = torch.rand(NUM_EXAMPLES)
    teacher, scored = make_teacher(losses, scoring=scoring, ratio_schedule="constant", initial_ratio=0.5)
    train(teacher, losses, steps=30)  # warm-up to step 12, then a round every 6 steps
    assert scored == expected


def test_forward_scores_decide_the_selection() -> None:
    """Training sees equal losses; the forward pass gives high losses to 48 examples."""
    losses = torch.where(torch.arange(NUM_EXAMPLES) % 2 == 0, 5.0, 1.0)
    teacher, _ = make_teacher(losses, scoring="forward", ratio_schedule="constant", initial_ratio=0.5)
    chosen: list[int] = []
    for step, (ids, _) in zip(range(1, 19), TeachingSampler(teacher), strict=False):
        teacher.buffer.record(ids, torch.ones(BATCH), step=step)
        teacher.step_done()
        chosen += ids.tolist() if teacher.rounds.selecting else []
    assert sorted(chosen) == list(range(0, NUM_EXAMPLES, 2))


def test_threshold_passes_cover_what_was_kept() -> None:
    losses = torch.arange(NUM_EXAMPLES).float()
    teacher, _ = make_teacher(losses, strategy="threshold")
    sizes = train(teacher, losses, steps=40)
    selected = sizes[12:]
    # 48 above the mean, and about half of the others; anew for each pass.
    assert all(48 <= size <= 96 for size in selected) and len(set(selected)) > 1
    assert abs(sum(selected) / len(selected) - 72) < 12


def test_scoring_needs_a_forward_pass_and_excess_loss_a_reference() -> None:
    with pytest.raises(ValueError, match='scoring = "forward" needs a forward pass: give the teacher `score`'):
        Teacher(LossBuffer(9), paper_config(scoring="forward"), batch_size=3, total_steps=9)
    config = paper_config(importance="excess_loss")
    with pytest.raises(ValueError, match="needs an expert's losses: give them as `expert`"):
        Teacher(LossBuffer(9), config, batch_size=3, total_steps=9)


@pytest.mark.parametrize("num_passes, full_from", [(90, 78.75), (300, 262.5)])
def test_anneal_boundary_of_infobatch(num_passes: int, full_from: float) -> None:
    """The last 12.5% of the passes are full: from 78.75 of 90 and 262.5 of 300, to the step."""
    teacher = Teacher(LossBuffer(64), paper_config(strategy="threshold"), batch_size=8, total_steps=num_passes * 8)
    assert teacher.plan.tail_start == full_from * 8


def test_shadow_decides_logs_and_trains_on_everything() -> None:
    """The same batches as uniform, with the decisions that the teacher logs but does not act on."""
    losses = torch.where(torch.arange(NUM_EXAMPLES) < 48, 5.0, 1.0)
    served: dict[str, list[list[int]]] = {}
    decisions: list[dict[str, float]] = []
    for name, config in (("uniform", {"strategy": "uniform"}), ("dry run", {"dry_run": True})):
        teacher, _ = make_teacher(losses, ratio_schedule="constant", initial_ratio=0.5, **config)
        teacher.on_decision = decisions.append if name == "dry run" else None
        served[name] = []
        for step, (ids, weights) in zip(range(1, 37), TeachingSampler(teacher), strict=False):
            teacher.buffer.record(ids, losses[ids], step=step)
            teacher.step_done()
            served[name].append(ids.tolist())
            assert (weights == 1).all()
    assert served["dry run"] == served["uniform"]
    assert [(line["step"], line["num_steps"]) for line in decisions] == [(1, 12), (13, 12), (25, 12)]
    assert "teacher/importance_mean" not in decisions[0] and decisions[0]["teacher/ratio"] == 1.0
    for line in decisions[1:]:
        assert line["teacher/selected"] == 48 and line["teacher/ratio"] == 0.5
        assert line["teacher/importance_mean"] == pytest.approx(3.0, rel=1e-4)
    assert int(teacher.draws.last_draw[:48].min()) == 1 and int(teacher.draws.last_draw[48:].max()) == -1
