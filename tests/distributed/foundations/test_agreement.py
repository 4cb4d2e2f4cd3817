"""foundations/agreement.py: after an exchange of losses, ranks that decided differently get an error with the round."""

from types import SimpleNamespace

import pytest
import torch
from distributed.spawn import run_on_ranks
from paper import paper_config

from titan_attent import LossBuffer, Teacher, TeachingSampler
from titan_attent.foundations.agreement import Agreement

NUM_EXAMPLES, BATCH = 40, 4


def error_of(check) -> str:
    try:
        check()
    except RuntimeError as error:
        return str(error)
    return ""


def announced(mesh, *, as_replicas: bool) -> list[str]:
    """The errors of :meth:`check` after each exchange; rank 1 has a different decision from round 3 on."""
    buffer = LossBuffer(9, mesh=None if as_replicas else mesh, replica_sources=[(mesh, 0)] if as_replicas else ())
    errors, rank = [], mesh.get_local_rank()
    for round in (1, 2, 3, 4):
        buffer.agreement.announce(-round if rank == 1 and round >= 3 else round << 60, round=round)
        buffer.record(torch.tensor([rank]), torch.tensor([1.0 + round]), step=round)
        buffer.flush()
        # Announced during the exchange, which is compared with the earlier decision.
        buffer.agreement.announce(99 + rank, round=99)
        buffer.sync()
        errors.append(error_of(buffer.agreement.check))
    assert buffer.loss[0] == 5.0 or buffer.sharding.start > 0  # the column of hashes does not change what is recorded
    return errors


def announced_both(mesh) -> tuple[list[str], list[str]]:
    return announced(mesh, as_replicas=True), announced(mesh, as_replicas=False)


def test_the_first_round_that_differs_is_named():
    ranks = run_on_ranks(announced_both, 2)
    for rank, (as_replicas, in_batch) in enumerate(ranks):
        # Replicas record what the source rank sends: only the rank that differs from the source notices.
        assert [bool(text) for text in as_replicas] == [False, False, rank == 1, rank == 1]
        assert [bool(text) for text in in_batch] == [False, False, True, True]
        for text in filter(None, as_replicas + in_batch):
            assert (
                "decided differently in round 3" in text
                and "Resume from a checkpoint written before that round" in text
            )


def train(mesh) -> tuple[str, list[int]]:
    """A teacher on two tensor parallel peers, of which one has a changed loss before round 2: (error, last step)."""
    buffer = LossBuffer(NUM_EXAMPLES, replica_sources=[(mesh, 0)])
    config = paper_config(strategy="hard", ratio_schedule="constant", max_interval=1, full_data_tail=0.0)
    teacher = Teacher(buffer, config, batch_size=BATCH, total_steps=1000)
    step = 0
    try:
        for step, (ids, _) in zip(range(1, 25), TeachingSampler(teacher), strict=False):
            if teacher.round == 1 and mesh.get_local_rank() == 1:
                buffer.loss[7] += 100.0 * (buffer.loss[7] < 100.0)
            teacher.buffer.record(ids, 1.0 + ids.float() / 50, step=step)
            teacher.step_done()
        return "", [step]
    except RuntimeError as error:
        return str(error), [step]


def test_a_peer_with_other_losses_does_not_continue_silently():
    (first, (first_end,)), (second, (second_end,)) = run_on_ranks(train, 2, timeout=60.0)
    # Warm-up to step 10, rounds of 5 steps; the decision after step 15 is exchanged when round 3 is decided.
    assert (first, first_end) == ("", 24)  # the source rank sees no difference; in a run, the launcher ends it now
    assert "decided differently in round 2" in second and second_end == 20


def test_before_the_first_decision_nothing_is_sent():
    agreement = Agreement(torch.device("cpu"))
    rows = torch.arange(6).view(1, 2, 3)
    assert agreement.columns(2) == [] and agreement.compare(rows, agreement.decision) is rows
    agreement.check()


def test_a_checkpoint_of_ranks_that_differ_is_not_written():
    buffer = LossBuffer(NUM_EXAMPLES)
    teacher = Teacher(buffer, paper_config(), batch_size=BATCH, total_steps=100)
    teacher.next_pass(step=0)
    teacher.state_dict()
    buffer.record(torch.arange(BATCH), torch.ones(BATCH), step=1)
    buffer.flush()
    own = buffer._in_flight[3]
    buffer._in_flight = (*buffer._in_flight[:3], (own[0] + 1, own[1]))
    with pytest.raises(RuntimeError, match="decided differently in round 0"):
        teacher.state_dict()


def test_the_buffer_lives_where_its_mesh_does():
    mesh = SimpleNamespace(ndim=1, get_group=lambda: None, size=lambda: 2, get_local_rank=lambda: 0, device_type="meta")
    buffer = LossBuffer(9, mesh=mesh)
    assert {tensor.device.type for tensor in buffer._state.values()} == {"meta"} == {buffer.device.type}
    assert LossBuffer(9).device.type == "cpu" == LossBuffer(9, mesh=mesh, device="cpu").device.type
