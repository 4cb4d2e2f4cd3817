"""health.py on a trainer of a few weights in this process: which runs end, and which get a warning."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from torch import nn

from titan_attent.titan import health
from titan_attent.titan.health import PATIENCE, Health, all_finite

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


class Ended(Exception):
    """Raised instead of the end of the process."""


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def end(error: ValueError) -> None:
        raise Ended(str(error))

    monkeypatch.setattr(health, "fail", end)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Checkpoints:
    """The methods of torchtitan's CheckpointManager that health.py calls."""

    enable = True

    def __init__(self) -> None:
        self.saved: list[int] = []

    def _should_save(self, step: int, last_step: bool) -> bool:
        return last_step or step % 2 == 0

    def save(self, step: int, last_step: bool = False) -> None:
        if self._should_save(step, last_step):
            self.saved.append(step)

    def _async_wait(self) -> None:
        raise OSError("the save under way failed")  # must not hide why the run ends

    def _find_load_step(self) -> int:
        return max(self.saved, default=-1)

    def _create_checkpoint_id(self, step: int) -> str:
        return f"out/checkpoint/step-{step}"


class Tiny:
    """A trainer: one linear layer under AdamW, whose gradient a test may set to NaN."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.step, self.closed = CPU, 0, False
        self.num_labels: torch.Tensor | float = 1.0
        self.model_parts = [nn.Linear(3, 2).to(dtype)]
        self.optimizers = [torch.optim.AdamW(self.model_parts[0].parameters(), lr=0.1)]
        self.checkpointer = Checkpoints()
        self.health = Health(self)
        self.save = self.health.guarded(self.checkpointer.save)

    def close(self) -> None:
        self.closed = True

    def train(self, *, loss: float = 1.0, grad: float = 1.0, max_norm: float = INF) -> None:
        self.step += 1
        self.health.saw(torch.tensor([loss]))
        for parameter in self.model_parts[0].parameters():
            parameter.grad = torch.full_like(parameter, grad)
        if max_norm < INF:
            torch.nn.utils.clip_grad_norm_(self.model_parts[0].parameters(), max_norm)
        self.optimizers[0].step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_element_of_any_tensor_is_detected(dtype: torch.dtype, bad: float) -> None:
    huge = torch.finfo(dtype).max  # a sum of squares would overflow
    good = [torch.full((5,), -huge, dtype=dtype), torch.zeros(0), torch.tensor(3), torch.zeros(2, 3, dtype=dtype)]
    if dtype == torch.float64:
        good[0].fill_(1e38)
    assert all_finite(good, device=CPU)
    assert all_finite([], device=CPU)
    for index in range(6):
        wrong = torch.zeros(2, 3, dtype=dtype)
        wrong.view(-1)[index] = bad
        assert not all_finite([*good, wrong], device=CPU)
        assert not all_finite([wrong, *good], device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss, grad", [(NAN, NAN), (INF, INF), (1.0, NAN), (1.0, INF)])
def test_a_poisoned_state_is_not_saved_and_names_the_last_good_one(
    dtype: torch.dtype, loss: float, grad: float
) -> None:
    tiny = Tiny(dtype)
    tiny.health.begin()
    for _ in range(2):
        tiny.train()
        tiny.save(tiny.step)
    tiny.train(loss=loss, grad=grad)
    tiny.save(tiny.step)  # no save is due, so the weights are not checked
    tiny.train(loss=NAN, grad=NAN)
    with pytest.raises(Ended) as caught:
        tiny.save(tiny.step)
    message = str(caught.value)
    assert tiny.checkpointer.saved == [2] and tiny.closed
    assert message.startswith("step 4: the loss is not finite since step ")
    assert f"since step {3 if loss != 1.0 else 4}," in message
    assert "out/checkpoint/step-2" in message and "optimizer.lr" in message


def test_the_weights_are_checked_before_the_last_save() -> None:
    tiny = Tiny()
    tiny.train(grad=NAN)
    with pytest.raises(Ended, match="step 1: a gradient was not finite.*There is no checkpoint to resume from"):
        tiny.save(1, last_step=True)
    assert not tiny.checkpointer.saved


def test_the_last_step_is_checked_even_if_nothing_is_saved_or_logged() -> None:
    tiny: Any = Tiny()
    tiny.checkpointer = SimpleNamespace(enable=False, _should_save=lambda *step: False, save=lambda *step, **how: None)
    tiny.save = tiny.health.guarded(tiny.checkpointer.save)
    tiny.train(loss=NAN, grad=NAN)
    tiny.save(1)
    with pytest.raises(Ended, match="step 2: the loss is not finite since step 1.*no checkpoint"):
        tiny.save(2, last_step=True)


def test_a_logged_step_ends_a_poisoned_run_before_a_save_is_due() -> None:
    tiny = Tiny()
    tiny.train()
    tiny.health.logged(1, 1.0, 1.0)
    tiny.train(loss=NAN, grad=NAN)
    with pytest.raises(Ended, match="step 2: the loss is not finite since step 2.*no checkpoint"):
        tiny.health.logged(2, NAN, NAN)


def test_a_norm_that_overflows_is_clipped_to_zero_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Finite gradients with an infinite norm are scaled by max_norm / inf = 0: the step has no effect."""
    tiny = Tiny()
    tiny.train(grad=1e30, max_norm=1.0)
    tiny.health.logged(1, 1.0, INF)
    tiny.save(2)
    assert tiny.checkpointer.saved == [2]
    assert "step 1: loss 1.0, gradient norm inf: not finite; the weights are finite" in caplog.text
    for step in range(2, 10):  # finite norms in between, so never PATIENCE in a row
        tiny.health.logged(step, 1.0, INF if step % PATIENCE else 1.0)


def test_a_run_that_learns_nothing_for_long_ends_though_its_weights_are_finite() -> None:
    tiny = Tiny()
    tiny.train()
    tiny.save(2)
    for step in range(1, PATIENCE):
        tiny.health.logged(step, 1.0, INF)
    with pytest.raises(Ended, match=rf"in {PATIENCE} logged steps in a row.*step-2"):
        tiny.health.logged(PATIENCE, 1.0, INF)


def test_batches_without_a_label_are_named_as_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    """The mean over no label is NaN: a smaller learning rate would not change it."""
    tiny = Tiny()
    tiny.num_labels = torch.tensor(0.0)
    for step in range(1, PATIENCE):
        tiny.health.logged(step, NAN, 0.0)
    assert "no token of the batch has a label" in caplog.text
    with pytest.raises(Ended, match="with a longer training.seq_len or a larger training.global_batch_size: no token"):
        tiny.health.logged(PATIENCE, NAN, 0.0)


def test_a_loss_that_recovers_is_one_warning_and_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    tiny = Tiny()
    tiny.train(loss=NAN)
    tiny.train()
    tiny.save(2)
    tiny.train()
    tiny.save(4)
    assert tiny.checkpointer.saved == [2, 4]
    assert caplog.text.count("step 1: the loss was not finite; the weights are finite") == 1


def test_a_non_finite_validation_loss_is_a_warning_or_ends_a_poisoned_run(caplog: pytest.LogCaptureFixture) -> None:
    tiny = Tiny()
    tiny.train()
    tiny.health.validated(1, 2.5)
    assert not caplog.text
    tiny.health.validated(1, NAN)
    assert "step 1: the validation loss is nan, though the weights are finite" in caplog.text
    tiny.train(grad=NAN)
    with pytest.raises(Ended, match="step 2"):
        tiny.health.validated(2, INF)


def test_a_start_from_poisoned_weights_or_state_is_refused() -> None:
    for spoil in ("weights", "state"):
        tiny = Tiny()
        tiny.train()
        with torch.no_grad():
            if spoil == "weights":
                tiny.model_parts[0].weight[1, 2] = NAN
            else:
                tiny.optimizers[0].state[tiny.model_parts[0].bias]["exp_avg_sq"][0] = INF
        with pytest.raises(Ended, match=r"starts from \(step 1\).*checkpoint\.load_step"):
            tiny.health.begin()


def test_a_check_works_without_checkpoints() -> None:
    tiny: Any = Tiny()
    tiny.checkpointer = SimpleNamespace(enable=False)
    tiny.train(grad=NAN)
    with pytest.raises(Ended, match="There is no checkpoint"):
        tiny.health.logged(1, 1.0, NAN)
