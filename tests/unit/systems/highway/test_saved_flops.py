"""The FLOPs that the highway reports as saved, against the FLOPs that torch counts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.parallel_world import config_of, plain_model
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from titan_attent.systems.freezing.units import backward_flops, find_units
from titan_attent.systems.highway.account import HighwayAccount
from titan_attent.systems.highway.branches import BranchCuts
from titan_attent.systems.highway.links import Cuts
from titan_attent.systems.highway.sums import Sums
from titan_attent.systems.highway.sweep import num_vjps, separate_vjps, sweep
from titan_attent.systems.highway.system import Highway
from titan_attent.titan.settings import settings_of

BATCH, SEQ_LEN, NUM_BLOCKS = 2, 16, 4
MODELS: dict[str, dict[str, Any]] = {
    "llama3": {},
    "qwen3": {"model.name": "qwen3_attent"},
    "qwen3, tied": {"model.name": "qwen3_attent", "model.flavor": "tied"},
    "qwen3, experts": {"model.name": "qwen3_attent", "model.flavor": "moe"},
    "deepseek_v3": {"model.name": "deepseek_v3_attent"},
}


@pytest.fixture(autouse=True)
def countable_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute attention by matrix products, twice as many in a backward; torch does not count fused CPU attention."""
    monkeypatch.setattr(ScaledDotProductAttentionWrapper, "sdpa_backends", [SDPBackend.MATH])


def model_of(name: str = "llama3") -> nn.Module:
    return plain_model({"training.seq_len": SEQ_LEN, **MODELS[name]})


def account_of(model: nn.Module, **options: bool) -> HighwayAccount:
    blocks = list(model.layers.children())  # type: ignore[union-attr]
    return HighwayAccount(model, blocks, seq_len=SEQ_LEN, **{"is_compiled": False} | options)


def counted(model: nn.Module, backward: Callable[[torch.Tensor], None]) -> int:
    """The FLOPs per example of the backward."""
    tokens = torch.arange(BATCH * SEQ_LEN).reshape(BATCH, SEQ_LEN) * 5 % 64
    logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens.roll(1, 1))
    with FlopCounterMode(display=False) as flops:
        backward(loss)
    return flops.get_total_flops() // BATCH


def highway(
    model: nn.Module, rounds: int, *, branches: bool = False, measured: bool = False, exact: bool = False
) -> int:
    """The FLOPs per example of the highway's backward, with the hooks of a run."""
    blocks = list(model.layers.children())  # type: ignore[union-attr]
    cuts = Cuts(blocks, root=model, needs_input_gradients=lambda: rounds > 0 or exact)
    at_branches = BranchCuts(blocks) if branches else None
    if at_branches is not None:
        at_branches.switch.is_on = True

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        top = cuts.gradient()
        assert top is not None
        sums = Sums(NUM_BLOCKS, rounds, wants_exact=exact, device=torch.device("cpu")) if measured else None
        cuts.send_below(sweep(cuts.links, top, iterations=rounds, sums=sums))

    return counted(model, backward)


def saved(account: HighwayAccount) -> tuple[float, float]:
    """The FLOPs per example that the only step saved, computed from each of the two shares."""
    scalars = account.metrics()
    whole = account.full + account.forward
    return scalars["saved_of_backward"] * account.full, scalars["saved_of_step"] * whole


def test_a_backward_costs_what_torch_counts() -> None:
    model = model_of()
    assert account_of(model).full == counted(model, torch.Tensor.backward)


def test_no_round_at_branches() -> None:
    account = account_of(model_of())
    account.step_done(branches=True, vjps=separate_vjps(NUM_BLOCKS, 0))
    made = counted(model_of(), torch.Tensor.backward) - highway(model_of(), 0, branches=True)
    assert made > 0 and saved(account) == pytest.approx((made, made))


@pytest.mark.parametrize("measured, exact", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("rounds", range(NUM_BLOCKS + 1))
def test_rounds_between_blocks(rounds: int, measured: bool, exact: bool) -> None:
    account = account_of(model_of())
    vjps = separate_vjps(NUM_BLOCKS, rounds, complete=measured, exact_too=exact)
    assert sum(vjps) + rounds == num_vjps(NUM_BLOCKS, rounds, complete=measured, exact_too=exact)
    account.step_done(vjps=vjps)
    made = counted(model_of(), torch.Tensor.backward) - highway(model_of(), rounds, measured=measured, exact=exact)
    assert saved(account) == pytest.approx((made, made), abs=0.5)
    assert made == -sum(vjps) * account.vjp_flops[0]


def test_exact_steps_count_as_full_and_compiled_rounds_twice() -> None:
    eager, compiled = account_of(model_of()), account_of(model_of(), is_compiled=True)
    for account in (eager, compiled):
        account.step_done(vjps=[1, 1, 1, 0])
        for _ in range(3):
            account.step_done()
    one = sum(eager.vjp_flops[:3]) / eager.full
    assert eager.metrics()["saved_of_backward"] == pytest.approx(-one / 4)
    weights = sum(unit.weight for unit in find_units(model_of(), seq_len=SEQ_LEN)[1:7]) / eager.full
    assert compiled.metrics()["saved_of_backward"] == pytest.approx(-(one + weights) / 4)


@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_that_of_all_modules(name: str) -> None:
    model = model_of(name)
    units, account = find_units(model, seq_len=SEQ_LEN), account_of(model)
    assert account.full == backward_flops(units) and account.forward == sum(unit.forward for unit in units)


# -- in a run ---------------------------------------------------------------------------------------------------------


class Made:
    """A system of a run without a trainer."""

    def __init__(self, **settings: Any):
        keys = {f"highway.{key}": value for key, value in ({"method": "highway"} | settings).items()}
        config = config_of({"training.steps": 8, "training.seq_len": SEQ_LEN} | keys, data="", folder="")
        self.at = 0
        model = model_of()
        run: Any = SimpleNamespace(
            settings=settings_of(config),
            model_parts=[model],
            device=torch.device("cpu"),
            step=lambda: self.at,
            mesh=lambda _: None,
        )
        self.system = Highway(run, config.highway)

    def steps(self, last: int) -> dict[str, float]:
        while self.at < last:
            self.at += 1
            self.system.after_step()
        return self.system.metrics()


@pytest.mark.parametrize("settings", [{"cut": "branch"}, {"cut": "block", "iterations": 1}], ids=["branch", "k = 1"])
def test_the_scalars_and_a_resumed_run(settings: dict[str, Any]) -> None:
    whole, first = Made(**settings), Made(**settings)
    one = whole.steps(1)["highway/saved_of_backward"]
    assert one > 0 if settings["cut"] == "branch" else one < 0
    assert whole.steps(6)["highway/saved_of_backward"] == pytest.approx(one)
    assert whole.steps(8)["highway/saved_of_backward"] == pytest.approx(0.75 * one)  # the last quarter is exact
    first.steps(5)
    resumed = Made(**settings)
    resumed.system.load_state_dict(first.system.state_dict())
    resumed.at = 5
    for tag in ("highway/saved_of_backward", "highway/saved_of_step"):
        assert resumed.steps(8)[tag] == whole.steps(8)[tag] != 0


def test_a_checkpoint_of_an_earlier_version_loads() -> None:
    made = Made(cut="block", iterations=3, tolerance=0.3)
    made.system.load_state_dict({"rounds": 2, "gains": torch.full((NUM_BLOCKS,), 1.5)})
    assert made.system.rounds == 2 and made.system.gains.tolist() == [1.5] * NUM_BLOCKS
    assert made.system.account.counts == {"steps": 0.0, "saved": 0.0}


def test_the_state_has_the_keys_that_earlier_checkpoints_have(tmp_path: Path) -> None:
    """torch reads every key of the target state from the checkpoint."""
    earlier = {"highway": {"rounds": 2, "gains": torch.full((NUM_BLOCKS,), 1.5)}}
    dcp.save(earlier, checkpoint_id=tmp_path / "earlier", no_dist=True)
    made = Made(cut="block", iterations=3, tolerance=0.3)
    dcp.load({"highway": made.system}, checkpoint_id=tmp_path / "earlier", no_dist=True)
    assert made.system.rounds == 2 and made.system.gains.tolist() == [1.5] * NUM_BLOCKS
    made.steps(3)
    dcp.save({"highway": made.system}, checkpoint_id=tmp_path / "now", no_dist=True)
    again = Made(cut="block", iterations=3, tolerance=0.3)
    dcp.load({"highway": again.system}, checkpoint_id=tmp_path / "now", no_dist=True)
    assert again.system.account.counts == made.system.account.counts and again.system.rounds == 2
