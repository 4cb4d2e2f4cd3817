"""``[highway] cut = "stage"`` in the real trainer: exact with P - 2 rounds, and in the last steps of a run."""

import os
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch.distributed as dist
from distributed.parallel_world import Settings, config_of, full, plain_name, spec_of
from distributed.spawn import run_on_ranks

from titan_attent.systems.highway.stages import HighwayStages
from titan_attent.systems.highway.stagewise import HighwaySchedule
from titan_attent.titan.checks import preflight
from titan_attent.titan.trainer import TeachingTrainer

STEPS = 3
PIPELINE: Settings = {
    "teacher.strategy": "uniform",
    "parallelism.pipeline_parallel_degree": 4,
    "parallelism.pipeline_parallel_microbatch_size": 4,
    "parallelism.pipeline_parallel_schedule": "GPipe",
    "training.steps": STEPS,
    "validation.enable": True,
    "validation.local_batch_size": 8,
    "validation.steps": 2,
}
STAGES: Settings = {"highway.method": "highway", "highway.cut": "stage", "highway.exact_fraction": 0.0}
CELLS: dict[str, Settings] = {
    "exact": {},
    "two rounds": STAGES | {"highway.iterations": 2},
    "all rounds": STAGES | {"highway.iterations": -1},
    "no round": STAGES,
    "no round, exact from step 2 on": STAGES | {"highway.exact_fraction": 0.67},
}


def train(mesh: Any, data: str, folder: str) -> dict[str, dict[str, Any]]:
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    found = {}
    for name, settings in CELLS.items():
        config = config_of(PIPELINE | settings, data=data, folder=f"{folder}/{name}")
        preflight.check_run(config, spec_of(config.model.name), world_size=4)
        trainer = TeachingTrainer(config)
        try:
            logged: list[dict[str, float]] = []
            trainer.metrics_processor.logger.log = lambda metrics, step, logged=logged: logged.append(metrics)
            batches, gradients, rounds = trainer.batch_generator(trainer.dataloader), [], []
            while trainer.step < STEPS:
                trainer.step += 1
                trainer.train_step(batches)
                parameters = dict(trainer.model_parts[0].named_parameters())
                gradients.append({plain_name(key): full(value.grad) for key, value in parameters.items()})
                rounds.append(logged[-1].get("highway/iterations"))
            trainer.validator.validate(trainer.model_parts, trainer.step)
            found[name] = {
                "gradients": gradients,
                "rounds": rounds,
                "validation": logged[-1]["validation_metrics/loss"],
                "is_ours": isinstance(trainer.pp_schedule, HighwaySchedule),
                "systems": [type(system) is HighwayStages for system in trainer.systems],
            }
        finally:
            trainer.close()
    return found


@pytest.fixture(scope="module")
def ranks(token_data: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("stages")
    return run_on_ranks(train, 4, str(token_data["train"]), str(folder), timeout=300.0)


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_with_enough_rounds_it_is_backpropagation(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ranks:
        for name in ("two rounds", "all rounds"):
            assert rank[name]["is_ours"] and rank[name]["systems"] == [True]
            for ours, exact in zip(rank[name]["gradients"], rank["exact"]["gradients"], strict=True):
                assert equal(ours, exact)
            assert rank[name]["validation"] == rank["exact"]["validation"]
        assert not rank["exact"]["is_ours"] and rank["exact"]["rounds"] == [None] * STEPS


def test_without_rounds_only_the_last_stages_are_exact(ranks: list[dict[str, dict[str, Any]]]) -> None:
    """In the first step the second to last stage gets the exact gradient of the last stage's input."""
    same = [equal(rank["no round"]["gradients"][0], rank["exact"]["gradients"][0]) for rank in ranks]
    assert same == [False, False, True, True]


def test_the_last_steps_of_a_run_are_exact(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ranks:
        tail = rank["no round, exact from step 2 on"]
        assert tail["rounds"] == [0, 2, 2] and rank["no round"]["rounds"] == [0, 0, 0]
        assert equal(tail["gradients"][0], rank["no round"]["gradients"][0])
    # The second step starts from equal weights, but only one of them is exact.
    assert not equal(ranks[0]["no round, exact from step 2 on"]["gradients"][1], ranks[0]["no round"]["gradients"][1])
