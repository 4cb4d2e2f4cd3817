"""The benchmark of mixtures of transformers: its data, its model against loops, its frozen parts, its page."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.mot import __main__ as command
from benchmarks.mot import page
from benchmarks.mot.arms import ARMS, DATA, STAGES, cells
from benchmarks.mot.model import Arm, Data, Model, train

SMALL = Data(classes=3, tokens=5, dim=8)


def drawn(data: Data, count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return data.draw(count, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("plain", [False, True])
def test_a_sequence_has_its_center_its_signal_and_at_most_one_distractor(plain: bool) -> None:
    data = Data(classes=3, tokens=5, dim=8, noise=0.0, plain=plain)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    for x, y, n in zip(*drawn(data), strict=True):
        found = x @ basis.T  # [tokens, basis]
        centers, signals = found[:, :3].sum(0), found[:, 3:6].sum(0)
        assert torch.allclose(centers, torch.eye(3)[n], atol=1e-5)
        own = 0 if plain else int(n)
        assert abs(signals[own] - y) < 1e-5
        others = signals.abs().sum() - signals[own].abs()
        assert abs(others - (0 if plain else 1)) < 1e-5


@pytest.mark.parametrize("arm", [Arm(experts=4), Arm(experts=4, attention="shared"), Arm(experts=4, gate="all")])
def test_the_model_is_its_formula(arm: Arm) -> None:
    x, _, n = drawn(SMALL, 6)
    model = Model(arm, SMALL, seed=0)
    model.attention.normal_(generator=torch.Generator().manual_seed(2))
    output, routing = model(x, n)
    for b in range(6):
        total = 0.0
        for e in range(4) if arm.gate == "all" else [int(routing.route[b])]:
            matrix = model.attention[0 if arm.attention == "shared" else e]
            value = 0.0
            for query in x[b]:
                weights = torch.stack([key @ matrix @ query for key in x[b]]).softmax(0)
                value += float(model.neurons[e] @ sum(w * token for w, token in zip(weights, x[b], strict=True)))
            total += value * float(routing.probability[b]) if arm.gate != "all" else value
        assert abs(float(output[b]) - total) < 1e-4


def test_every_arm_trains_only_what_its_stage_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Model] = []
    init = Model.__init__
    monkeypatch.setattr(Model, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])
    for name, arm in ARMS.items():
        made.clear()
        before: dict[str, torch.Tensor] = {}
        for look in train(arm, SMALL, seed=0, steps=6, rate=0.03, batch=8, every=2):
            now = {key: value.detach().clone() for key, value in made[0].parameters().items()}
            for key in now if look.step else ():
                part = arm.stages[look.step // 2 - 1]
                trained = key == part or (key != "gate" and part == "both") or (key, arm.gate) == ("gate", "learned")
                trained = trained and not (key == "attention" and arm.attention == "none")
                assert torch.equal(before[key], now[key]) != trained, (name, look.step, key)
            before = now
            assert 0 < look.largest_share <= 1 and 0 < look.purity <= 1 and look.loss > 0


def result(arm: str, seed: int, loss: float, data: str = "clusters") -> dict[str, Any]:
    looks = [
        {"step": step, "loss": value, "largest_share": 0.5, "purity": 0.9, "separation": 3}
        for step, value in ((0, 1.0), (30, 0.05), (60, 0.2), (90, loss))
    ]
    own = {"data": data, "arm": arm, "seed": seed, "steps": 90, "rate": 0.1, "looks": looks}
    return own | {"seconds": 1.0, "machine": "a machine"}


@pytest.mark.parametrize(
    ("stages", "rival", "expected"),
    [
        ([0.1, 0.1, 0.1], [0.2, 0.2, 0.2], "reproduced: below it in every seed"),
        ([0.3, 0.3, 0.3], [0.2, 0.2, 0.2], "not reproduced: below it in no seed"),
        ([0.1, 0.3, 0.1], [0.2, 0.2, 0.2], "open: three stages end below it in 2 of 3 seeds"),
        ([0.1, 0.1], [0.2, 0.2], "open: three stages end below it in 2 of 2 seeds, of which three are needed"),
    ],
)
def test_a_verdict_is_no_stronger_than_its_seeds(stages: list[float], rival: list[float], expected: str) -> None:
    results = [result(STAGES, seed, loss) for seed, loss in enumerate(stages)]
    results += [result("end to end", seed, loss) for seed, loss in enumerate(rival)]
    assert page.verdict(results, "end to end") == expected


def test_a_level_counts_from_where_it_is_kept() -> None:
    assert page.reached_at(result(STAGES, 0, 0.09), 0.1) == 90
    assert page.reached_at(result(STAGES, 0, 0.09), 0.3) == 30
    assert page.reached_at(result(STAGES, 0, 0.5), 0.3) is None


def test_the_command_resumes_and_takes_known_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command, "run", lambda data, arm, seed, steps, rate: result(arm, seed, 0.1, data) | {"rate": rate}
    )
    arguments = ["--seeds", "0", "--steps", "90", "--rate", "0.1", "--output"]
    published = tmp_path / "mot"
    assert command.main([*arguments, str(tmp_path / "one"), "--publish", str(published)]) == 0
    assert all(published.with_suffix(suffix).stat().st_size > 0 for suffix in (".md", ".json", ".png"))
    text = published.with_suffix(".md").read_text()
    assert all(arm in text for arm in ARMS) and f"{len(cells())} runs" in text and len(DATA) == 2
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: pytest.fail("it was measured again"))
    known = str(published.with_suffix(".json"))
    assert command.main([*arguments, str(tmp_path / "two"), "--known", known]) == 0
    assert command.main([*arguments, str(tmp_path / "one")]) == 0
