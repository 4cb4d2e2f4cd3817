"""What ``mot_attent`` refuses before a run, and the columns and shares of its system."""

from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from distributed.parallel_world import config_of

from titan_attent.models.mot.config import MotConfig
from titan_attent.systems.freezing.config import FreezingConfig
from titan_attent.systems.freezing.system import Freezing
from titan_attent.systems.freezing.units import find_units
from titan_attent.systems.highway.system import Highway
from titan_attent.systems.settings import RunSettings
from titan_attent.titan.checks.preflight import check_needs
from titan_attent.titan.models.families import FAMILIES
from titan_attent.titan.models.mot import MixtureOfTransformers, MotArgs
from titan_attent.titan.models.routing import Routing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.unit": "document"}, r'\[data\] unit = "document": mot_attent routes a window by its first tokens'),
        ({"data.validation_unit": "document", "validation.enable": True}, 'validation_unit = "document"'),
        ({"mot.prefix": 33}, r"\[mot\] prefix = 33 is more than \[training\] seq_len = 32"),
        ({"mot.num_experts": 0}, r"\[mot\] num_experts = 0"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    config = config_of({"model.name": "mot_attent"} | settings, data="", folder="")
    with pytest.raises(ValueError, match=message):
        FAMILIES["mot"].modality.check(config)


def test_highway_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[highway\] with mot_attent: a block of mot_attent is multiplied"):
        check_needs(FAMILIES["mot"], [Highway])


def test_policies_that_measure_are_refused() -> None:
    model = MixtureOfTransformers(MotArgs(dim=16, n_layers=1, n_heads=2, vocab_size=8, max_seq_len=8))
    settings = RunSettings(family="mot", steps=10, seq_len=8, local_batch_size=1)
    run = SimpleNamespace(settings=settings, mesh=lambda name: None)
    own: Any = SimpleNamespace(model=model, units=find_units(model, seq_len=8), run=run)
    own.config = FreezingConfig(policy="stages", stages=["both"])
    Freezing._check_model(own)
    own.config = FreezingConfig(policy="prefix")
    with pytest.raises(ValueError, match='policy = "prefix" with mot: its gates are trained in every step'):
        Freezing._check_model(own)


def test_stages_that_do_not_fit_the_run_are_refused() -> None:
    config = FreezingConfig(policy="stages", stages=["feed_forward:5", "attention:4", "both"], warmup_steps=1)
    Freezing.check(config, RunSettings(family="llama3", steps=11, seq_len=8, local_batch_size=1))
    with pytest.raises(ValueError, match=r"stages need 11 steps .* training.steps = 10"):
        Freezing.check(config, RunSettings(family="llama3", steps=10, seq_len=8, local_batch_size=1))


def test_losses_of_other_prefixes_have_other_names() -> None:
    names = [
        FAMILIES["mot"].modality.loss(config_of({"mot.prefix": prefix}, data="", folder="")) for prefix in (1, 4, 5)
    ]
    assert names[0] == FAMILIES["llama3"].modality.loss(config_of({}, data="", folder="")) and len(set(names)) == 3


def test_noise_ends_with_its_steps_and_shares_are_those_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, one layer, three experts, a log of every second step."""
    model = SimpleNamespace(model_args=SimpleNamespace(n_layers=1), routes=torch.tensor([[0, 0, 2, 0]]))
    step = 0
    run: Any = SimpleNamespace(
        model_parts=[model], device=torch.device("cpu"), mesh=lambda name: None, step=lambda: step,
        settings=SimpleNamespace(log_every=2),
    )  # fmt: skip
    routing = Routing(run, MotConfig(num_experts=3, noise_steps=2))
    ids = torch.arange(4)
    assert [bool(routing.read_columns_of_step(ids, step)) for step in (1, 2, 3)] == [True, True, False]
    labels = torch.tensor([[-100, 1, 1], [-100, 1, 1], [-100, 1, 1], [-100, -100, -100]])
    for step in (1, 2, 3):
        if step == 3:
            model.routes = torch.tensor([[1, 1, 1, 1]])
        routing.after_microbatch(SimpleNamespace(labels=labels), None)  # type: ignore[arg-type]
        routing.after_step()
        scalars = routing.metrics()
        sequences = [scalars[f"mot/sequence_share/0.{expert}"] for expert in range(3)]
        tokens = [scalars[f"mot/token_share/0.{expert}"] for expert in range(3)]
        if step < 3:
            assert sequences == pytest.approx([3 / 4, 0, 1 / 4]) and tokens == pytest.approx([2 / 3, 0, 1 / 3])
        else:  # of steps 2 and 3
            assert sequences == pytest.approx([3 / 8, 4 / 8, 1 / 8]) and tokens == pytest.approx([2 / 6, 3 / 6, 1 / 6])
            assert scalars["mot/largest_sequence_share"] == pytest.approx(1 / 2)
    shares = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    for got in ([3 / 4, 0, 1 / 4], [3 / 4, 0, 1 / 4], [0, 1, 0]):
        shares = 0.9 * shares + 0.1 * torch.tensor([got], dtype=torch.float64)
    torch.testing.assert_close(routing.shares, shares)
    other = Routing(run, MotConfig(num_experts=3))
    other.load_state_dict(routing.state_dict())
    assert torch.equal(other.shares, routing.shares) and other.metrics() == routing.metrics()
