"""A run that is resumed with other training.steps follows the plan of its own length, from the next step on."""

import copy
from collections.abc import Iterator

import torch
from paper import paper_config

from titan_attent import LossBuffer, Teacher, TeachingSampler

NUM_EXAMPLES, BATCH = 400, 4  # full passes of 100 steps
RULE = {"strategy": "hard", "ratio_schedule": "constant", "initial_ratio": 0.5, "max_interval": 1}


def build(total_steps: int, **config) -> tuple[Teacher, TeachingSampler]:
    settings = paper_config(**RULE | config)
    teacher = Teacher(LossBuffer(NUM_EXAMPLES), settings, batch_size=BATCH, total_steps=total_steps)
    return teacher, TeachingSampler(teacher)


def train(teacher: Teacher, sampler: TeachingSampler, *, to: int) -> dict[int, str]:
    """step -> what it was trained as: "full" (warm-up), "selected" or "tail"."""
    kinds, batches = {}, iter(sampler)
    while sampler.step < to:
        ids, _ = next(batches)
        step = sampler.step
        kinds[step] = "tail" if teacher.rounds.in_tail else "selected" if teacher.rounds.selecting else "full"
        teacher.buffer.record(ids, 1.0 + (ids * 37 % 11).float(), step=step)
        teacher.step_done()
    return kinds


def resumed(old_steps: int, new_steps: int, *, at: int, **config) -> dict[int, str]:
    """The kinds of all steps of a run planned for ``old_steps`` and resumed after ``at`` with ``new_steps``."""
    old_teacher, old_sampler = build(old_steps, **config)
    kinds = train(old_teacher, old_sampler, to=at)
    teacher, sampler = build(new_steps, **config)
    teacher.load_state_dict(old_teacher.state_dict())
    sampler.load_state_dict(old_sampler.state_dict())
    return kinds | train(teacher, sampler, to=new_steps)


def planned(steps: int, *, kinds: dict[int, str], start: int) -> None:
    """A run of ``steps`` steps selects after the warm-up and ends with an eighth on everything."""
    tail = steps - steps // 8
    for step in range(start + 1, steps + 1):
        expected = "tail" if step > tail else "selected" if step > 100 else "full"
        assert kinds[step] == expected, f"step {step} of {steps}"


def test_a_longer_run_goes_back_to_its_teacher_at_once():
    kinds = resumed(400, 560, at=400)  # in the tail since step 350, whose pass would take until 450
    assert kinds[400] == "tail"
    planned(560, kinds=kinds, start=400)


def test_a_longer_run_has_its_tail_again_at_its_own_end():
    kinds = resumed(200, 300, at=190)
    planned(300, kinds=kinds, start=190)
    assert sum(kind == "tail" for kind in kinds.values()) == 190 - 175 + 37


def test_a_shorter_run_has_its_tail():
    kinds = resumed(4000, 280, at=230, initial_ratio=0.9)  # the selected pass of 90 steps would last until 280
    planned(280, kinds=kinds, start=230)


def test_a_run_that_is_shorter_than_what_it_has_trained_ends_the_pass():
    kinds = resumed(4000, 240, at=230, initial_ratio=0.9)
    planned(240, kinds=kinds, start=230)  # the tail was due after 210


def test_a_pass_that_the_old_plan_cut_is_whole_again():
    kinds = resumed(250, 400, at=215)  # the pass from 200 on was cut at the tail, 219; a whole one ends at 250
    planned(400, kinds=kinds, start=215)
    teacher, sampler = build(250)
    train(teacher, sampler, to=215)
    assert teacher.rounds.num_batches == 19
    longer, follower = build(400)
    longer.load_state_dict(teacher.state_dict())
    follower.load_state_dict(sampler.state_dict())
    train(longer, follower, to=216)
    assert longer.rounds.num_batches == 50 and longer.round == teacher.round


def follow(teacher: Teacher, sampler: TeachingSampler, batches: Iterator, *, to: int) -> list[list[int]]:
    """The ids of the steps until ``to``."""
    found = []
    while sampler.step < to:
        found.append(next(batches)[0].tolist())
        teacher.buffer.record(torch.tensor(found[-1]), 1.0 + torch.tensor(found[-1]) % 11, step=sampler.step)
        teacher.step_done()
    return found


def test_with_equal_steps_nothing_moves():
    whole, sampler = build(300)
    expected = follow(whole, sampler, iter(sampler), to=300)
    first, sampler = build(300)
    batches, before = iter(sampler), []
    for cut in (50, 100, 130, 262, 263, 290):
        before += follow(first, sampler, batches, to=cut)
        second, follower = build(300)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        follower.load_state_dict(sampler.state_dict())
        assert before + follow(second, follower, iter(follower), to=300) == expected, cut


def test_uniform_has_no_plan():
    kinds = resumed(400, 500, at=250, strategy="uniform")
    assert set(kinds.values()) == {"full"}
