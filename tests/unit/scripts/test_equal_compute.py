"""Steps of a run without scorers at a taught run's compute."""

import importlib.util
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).parents[3] / "scripts" / "equal_compute.py"
spec = importlib.util.spec_from_file_location("equal_compute", SCRIPT)
assert spec is not None and spec.loader is not None
equal_compute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(equal_compute)


@pytest.mark.parametrize(
    "scorer_seconds, multiple, steps",
    [(0.0, 25, 400), (1.0, 1, 404), (1.0, 25, 425), (25.0, 25, 500), (25.1, 25, 525)],
)
def test_the_scorers_seconds_are_steps_at_the_runs_own_pace(scorer_seconds: float, multiple: int, steps: int) -> None:
    found = equal_compute.equal_steps(steps=400, train_seconds=100.0, scorer_seconds=scorer_seconds, multiple=multiple)
    assert found == steps


def test_the_command_reads_the_last_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SummaryWriter(str(tmp_path / "tb" / "one")) as writer:
        for step, seconds in ((1, 9.0), (30, 60.0)):
            writer.add_scalar("ledger/train_seconds", seconds, step)
            writer.add_scalar("ledger/prepaid_seconds", 6.0, step)
    assert equal_compute.main([str(tmp_path), "--multiple", "10"]) == 0
    assert capsys.readouterr().out == "40\n"  # 33, up to the next ten


def test_a_run_without_a_ledger_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SummaryWriter(str(tmp_path / "tb" / "one")) as writer:
        writer.add_scalar("validation_metrics/loss", 3.0, 1)
    assert equal_compute.main([str(tmp_path)]) == 2
    assert "not a taught run with its ledger in TensorBoard" in capsys.readouterr().err
