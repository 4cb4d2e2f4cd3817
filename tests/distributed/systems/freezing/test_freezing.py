"""Frozen modules under the real trainer, against one plain process with the same active modules in each step."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.cells import Cells, chosen, merged, parameters
from distributed.parallel_world import (
    NoMesh,
    Settings,
    config_of,
    full,
    plain_model,
    plain_name,
    spec_of,
    token_losses,
)
from distributed.spawn import run_on_ranks
from distributed.syncs import CountSyncs, from_forward_to_optimizer
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.systems.freezing.config import FreezingConfig
from titan_attent.systems.freezing.policy import History
from titan_attent.systems.freezing.system import Freezing
from titan_attent.systems.freezing.units import Unit, find_units
from titan_attent.titan.checks import preflight
from titan_attent.titan.trainer import TeachingTrainer

STEPS, SAVED = 5, 3
COMMON: Settings = {
    "teacher.strategy": "uniform",
    "training.steps": STEPS,
    "checkpoint.interval": SAVED,
    "freezing.warmup_steps": 1,
    "freezing.interval": 1,
    "freezing.backward_share": 0.6,
    "freezing.smoothing": 0.0,
    "freezing.hysteresis": 0.0,
    "freezing.probe_groups": 3,
    "freezing.probe_examples": 2,
}
HEADS: Settings = {"freezing.heads": True}
MAT: Settings = {"freezing.policy": "mat"}
PREFIX: Settings = {"freezing.policy": "prefix"}
DRAWN: Settings = {"freezing.policy": "random", "freezing.backward_share": 0.55}
NORMS: Settings = {"freezing.policy": "gradient_norm"}
TP: Settings = {"parallelism.tensor_parallel_degree": 2}
EXPERTS: Settings = {"model.name": "qwen3_attent", "model.flavor": "moe of 2"}
TWO_LAYERS: Settings = {"model.flavor": "cell of 2"}
HSDP: Settings = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 2}


def batch(size: int) -> Settings:
    return {"training.local_batch_size": size}


CELLS: Cells = {
    1: {
        "mat": batch(8) | MAT,
        "prefix": batch(8) | TWO_LAYERS | PREFIX,
        "random": batch(8) | TWO_LAYERS | DRAWN,
        "norms": batch(8) | TWO_LAYERS | NORMS,
    },
    2: {
        "mat": batch(4) | MAT | HEADS,
        "prefix": batch(2) | TWO_LAYERS | PREFIX | {"activation_checkpoint.mode": "full"},
        "random": batch(4) | TWO_LAYERS | DRAWN,
        "norms": batch(4) | TWO_LAYERS | NORMS | {"activation_checkpoint.mode": "selective"},
        "TP": batch(8) | TWO_LAYERS | TP | PREFIX,
        "experts": batch(4) | EXPERTS | MAT,
    },
    3: {
        "mat": batch(4) | MAT | {"training.global_batch_size": 12},
    },
    4: {
        "HSDP": batch(2) | TWO_LAYERS | HSDP | MAT,
    },
}
MORE: Cells = {
    2: {
        "TP, loss": batch(8) | TWO_LAYERS | TP | MAT | {"freezing.probe": "loss"},
        "bfloat16": batch(4) | TWO_LAYERS | DRAWN | {"training.mixed_precision_param": "bfloat16"},
    },
    4: {
        "FSDP + TP": batch(4) | TWO_LAYERS | TP | PREFIX,
    },
}
ALL = merged(CELLS, MORE)


LAST_STEPS: Settings = batch(4) | DRAWN | {"freezing.final_fraction": 0.4}


def environment() -> None:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(size)


def trainer_of(settings: Settings, *, data: str, folder: str) -> TeachingTrainer:
    environment()
    config = config_of(COMMON | settings, data=data, folder=folder)
    preflight.check_run(config, spec_of(config.model.name), world_size=int(os.environ["WORLD_SIZE"]))
    return TeachingTrainer(config)


def modules_of(trainer: TeachingTrainer) -> Freezing:
    (system,) = (system for system in trainer.systems if isinstance(system, Freezing))
    return system


def train(mesh: Any, settings: Settings, data: str, folder: str, stop: int = STEPS) -> dict[str, Any]:
    """Run until step ``stop``, from the checkpoint in ``folder`` if there is one."""
    trainer = trainer_of(settings, data=data, folder=folder)
    try:
        if not trainer.checkpointer.load():
            weights = plain_model(settings).state_dict()
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(trainer.model_parts[0], {k: v.clone() for k, v in weights.items()}, options=options)
        system = modules_of(trainer)
        probe_at_start = trainer.ledger.seconds["probe"]
        (model,) = trainer.model_parts
        batches, steps, without = trainer.batch_generator(trainer.dataloader), {}, set[str]()
        optimize = trainer.optimizers.step

        def recording_step() -> None:
            without.clear()
            without.update(plain_name(name) for name, parameter in model.named_parameters() if parameter.grad is None)
            optimize()

        trainer.optimizers.step = recording_step
        while trainer.step < stop:
            trainer.step += 1
            active = dict(zip((unit.name for unit in system.units), system.freezer.active, strict=True))
            trainer.train_step(batches)
            current, number = trainer.loader.served
            named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
            steps[trainer.step] = {
                "ids": current.ids(number, number + 1).tolist(),
                "active": active,
                "without_gradient": set(without),
                "weights": {name: full(parameter) for name, parameter in named.items()},
                "values": list(system.history.smooth),
            }
            with mock.patch.object(system.freezer, "_reshard", wraps=system.freezer._reshard) as walks:
                trainer.checkpointer.save(trainer.step)
            steps[trainer.step]["walks"] = walks.call_count
        optimizer = trainer.optimizers.state_dict()
        return {
            "steps": steps,
            "account": system.account.counts,
            "metrics": system.metrics(),
            "moments": sorted(key for key in optimizer if key.endswith("exp_avg")),
            "probe": trainer.ledger.seconds["probe"],
            "probe_at_start": probe_at_start,
        }
    finally:
        trainer.close()


def train_all(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, dict[str, Any]]:
    return {name: train(mesh, settings, data, f"{folder}/{name}") for name, settings in cells.items()}


def replay(settings: Settings, steps: dict[int, dict[str, Any]], data: str) -> dict[int, dict[str, np.ndarray]]:
    """The weights after each step of a plain process in which the same modules were active."""
    config = config_of(COMMON | settings, data=data, folder="")
    model = plain_model(settings)
    optimizers = spec_of(config.model.name).build_optimizers_fn([model], config.optimizer, NoMesh())
    units = {unit.name: unit for unit in find_units(model, seq_len=32)}
    dataset, weights = TokenDataset(data, seq_len=32), {}
    for step, record in steps.items():
        for name, active in record["active"].items():
            for parameter in units[name].parameters:
                parameter.requires_grad_(active)
        optimizers.zero_grad()
        loss, _ = token_losses(model, *dataset.batch(torch.tensor(record["ids"])))
        loss.mean().backward()
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, config.training.max_norm)
        optimizers.step()
        weights[step] = {name: full(parameter) for name, parameter in model.named_parameters()}
    return weights


@pytest.fixture(scope="module")
def data(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("modules_data")
    source = Path(json.__file__).parent / "decoder.py"
    write_dataset([source], output=folder, tokenizer=str(token_data["train"] / "tokenizer.tiktoken"))
    return str(folder)


@pytest.fixture(scope="module")
def worlds(
    request: pytest.FixtureRequest, data: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("modules")
    runs = merged(chosen(request, CELLS, MORE), {2: {"last steps": LAST_STEPS}})
    return {
        size: run_on_ranks(train_all, size, cells, data, f"{folder}/{size}", timeout=400.0, apart=True)
        for size, cells in runs.items()
    }


@pytest.mark.parametrize(("size", "name"), parameters(CELLS, MORE))
def test_a_step_updates_the_active_modules_as_a_plain_process_does(
    worlds: dict[int, list[dict[str, Any]]], data: str, size: int, name: str
) -> None:
    ranks = [rank[name] for rank in worlds[size]]
    steps = ranks[0]["steps"]
    assert all(rank["steps"][step]["active"] == steps[step]["active"] for rank in ranks for step in steps)
    masks = [tuple(record["active"].values()) for record in steps.values()]
    assert all(masks[0]) and not any(map(all, masks[1:]))
    tolerance = 2e-2 if name == "bfloat16" else 2e-5
    expected = replay(ALL[size][name], steps, data)
    before: dict[str, np.ndarray] = {}
    for step, record in steps.items():
        idle = [unit for unit, active in record["active"].items() if not active]
        frozen = {parameter for parameter in expected[step] if unit_of(parameter, record["active"]) in idle}
        assert record["without_gradient"] == frozen, step
        for parameter in frozen:
            assert np.array_equal(record["weights"][parameter], before[parameter]), f"{parameter} moved in step {step}"
        for parameter, weights in expected[step].items():
            assert np.allclose(record["weights"][parameter], weights, atol=tolerance), f"{parameter} in step {step}"
            if before and parameter not in frozen:
                assert not np.array_equal(record["weights"][parameter], before[parameter]), f"{parameter} stood still"
        before = record["weights"]
    assert ranks[0]["probe"] > 0


def unit_of(parameter: str, units: Collection[str]) -> str:
    """The name of a parameter's unit, from the parameter's name alone."""
    top, *rest = parameter.split(".")
    if top != "layers":
        return "output" if top == "norm" else top
    part = "attention" if rest[1].startswith("attention") else "moe"
    return next(unit for unit in (f"layers.{rest[0]}.{part}", f"layers.{rest[0]}.feed_forward") if unit in units)


@pytest.mark.parametrize("name", ["mat", "prefix", "random", "norms"])
def test_the_number_of_ranks_changes_no_decision(worlds: dict[int, list[dict[str, Any]]], name: str) -> None:
    one, two = (worlds[size][0][name]["steps"] for size in (1, 2))
    assert [record["active"] for record in one.values()] == [record["active"] for record in two.values()]
    for step in one:
        assert np.allclose(one[step]["values"], two[step]["values"], rtol=1e-3)


def test_a_probe_of_three_ranks_and_of_one(worlds: dict[int, list[dict[str, Any]]]) -> None:
    """The first probe, after one step from equal weights: equal after the same global batch, not after another."""
    first = {size: worlds[size][0]["mat"]["steps"][1]["values"] for size in (1, 2, 3)}
    assert len(first[1]) == 10 and first[1][1] > 0
    assert np.allclose(first[1], first[2], rtol=1e-4) and not np.allclose(first[1], first[3], rtol=1e-4)


def test_modules_are_unfrozen_for_checkpoints_that_are_written(worlds: dict[int, list[dict[str, Any]]]) -> None:
    """torchtitan calls save in every step; without a save due, no module is switched. A save is tested below."""
    for cells in worlds.values():
        for name, run in cells[0].items():
            assert [record["walks"] for record in run["steps"].values()] == [0] * STEPS, name


def test_heads_are_written_if_requested(
    worlds: dict[int, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert all(rank["mat"]["steps"] for rank in worlds[2])
    (folder,) = tmp_path_factory.getbasetemp().glob("modules[0-9]")
    for name, requested in (("mat", True), ("norms", False)):
        lines = (folder / "2" / name / "freezing" / "decisions.jsonl").read_text().splitlines()
        assert len(lines) == STEPS - 1
        for line in lines:
            heads = json.loads(line).get("heads", {})
            assert [len(values) for values in heads.values()] == ([4] * 4 if requested else [])
            assert all(value > 0 for values in heads.values() for value in values)


def test_modules_become_active_again(worlds: dict[int, list[dict[str, Any]]]) -> None:
    for size, name in ((2, "random"), (1, "norms")):
        masks = np.array([list(record["active"].values()) for record in worlds[size][0][name]["steps"].values()])
        back = (~masks[1:-1] & masks[2:]).sum()
        assert back > 0, name


def test_the_account(worlds: dict[int, list[dict[str, Any]]]) -> None:
    """Against the layers' FLOPs, counted here from their shapes."""
    run = worlds[1][0]["prefix"]
    dim, hidden, length, vocab = 32, 96, 32, 512
    attention = 2 * length * (2 * dim * dim + 2 * dim * dim // 2)
    weight = {"attention": attention, "feed_forward": 2 * length * 3 * dim * hidden, "embedding": 0.0}
    weight["output"] = 2 * length * dim * vocab
    inputs = weight | {"attention": attention + 8 * length**2 * dim}
    saved = {"weight": 0.0, "inputs": 0.0}
    for record in run["steps"].values():
        kinds = {name: "embedding" if name == "tok_embeddings" else name.split(".")[-1] for name in record["active"]}
        below = True
        for name, active in record["active"].items():
            below = below and not active
            saved["weight"] += 0 if active else weight[kinds[name]]
            saved["inputs"] += inputs[kinds[name]] if below else 0
    assert run["account"]["weight_flops"] == pytest.approx(8 * saved["weight"])
    assert run["account"]["input_flops"] == pytest.approx(8 * saved["inputs"])
    assert run["account"]["steps"] == STEPS
    counts = {"attention": 2, "feed_forward": 2, "output": 1}
    full_pass = sum((weight[kind] + inputs[kind]) * number for kind, number in counts.items())
    forward = sum(weight[kind] * number for kind, number in counts.items()) + 2 * 4 * length**2 * dim
    probe = forward + sum(inputs[kind] * number for kind, number in counts.items())
    assert run["account"]["probe_flops"] == pytest.approx((STEPS - 1) * 6 * probe)
    share = 1 - (saved["weight"] + saved["inputs"] - run["account"]["probe_flops"] / 8) / (STEPS * full_pass)
    assert 1 - run["metrics"]["freezing/saved_of_backward"] == pytest.approx(share)


@pytest.mark.parametrize("first, second, name", [(2, 1, "random"), (1, 2, "mat"), (2, 3, "mat")])
def test_killed_and_resumed_is_uninterrupted(
    worlds: dict[int, list[dict[str, Any]]], data: str, tmp_path: Path, first: int, second: int, name: str
) -> None:
    """On another number of ranks, against the uninterrupted runs above."""
    global_batch, whole = (12, worlds[3][0][name]) if second == 3 else (8, worlds[2][0][name])
    settings = CELLS[2][name] | {"checkpoint.enable": True, "training.global_batch_size": global_batch}
    for size, stop in ((first, SAVED), (second, STEPS)):
        own = settings | batch(global_batch // size)
        resumed = run_on_ranks(train, size, own, data, str(tmp_path), stop, timeout=200.0, apart=True)[0]
        walks = {step: record["walks"] for step, record in resumed["steps"].items()}
        assert walks == {step: 2 if step == SAVED else 0 for step in walks}  # all active for the save, then frozen
    assert list(resumed["steps"]) == [4, 5] and resumed["probe_at_start"] > 0
    for step, record in resumed["steps"].items():
        assert record["active"] == whole["steps"][step]["active"] and record["ids"] == whole["steps"][step]["ids"]
        for parameter, weights in record["weights"].items():
            assert np.allclose(weights, whole["steps"][step]["weights"][parameter], atol=2e-5), (step, parameter)
    assert resumed["moments"] == whole["moments"] and len(resumed["moments"]) == (21 if name == "random" else 39)
    differ = {"reduced_bytes"}  # a single process has no FSDP2
    assert {k: v for k, v in resumed["account"].items() if k not in differ} == pytest.approx(
        {k: v for k, v in whole["account"].items() if k not in differ}
    )


# -- no side effects --------------------------------------------------------------------------------------------------


def any_choice(units: list[Unit], history: History, config: FreezingConfig) -> list[bool]:
    """A stand-in for ``decide``: freeze everything below a random cut, and random modules above it."""
    history.decisions += 1
    draw = random.Random(history.decisions)
    cut = draw.choice([0, 0, 1, 2, 3, 4])
    return [i >= cut and (draw.random() < 0.6 or unit.kind == "output") for i, unit in enumerate(units)]


def compiled(mesh: Any, data: str, folder: str) -> dict[str, Any]:
    """Run steps with different active modules, with validations and checkpoints, that must not recompile anything."""
    counters.clear()
    torch.compiler.reset()
    settings = (
        batch(4)
        | TWO_LAYERS
        | {
            "freezing.policy": "mat",
            "compile.enable": True,
            "compile.backend": "eager",
            "validation.enable": True,
            "validation.local_batch_size": 4,
            "validation.steps": 1,
            "checkpoint.enable": True,
            "training.steps": 12,
            # After a validation the groups are still gathered when the active modules change.
            "parallelism.fsdp_reshard_after_forward": "never",
        }
    )
    trainer = trainer_of(settings, data=data, folder=folder)
    try:
        system = modules_of(trainer)
        batches, patterns, moved = trainer.batch_generator(trainer.dataloader), set(), []

        def step() -> None:
            trainer.step += 1
            trainer.train_step(batches)
            if trainer.step % 3 == 1:
                trainer.checkpointer.save(trainer.step)
                trainer.validator.validate(trainer.model_parts, trainer.step)

        with mock.patch("titan_attent.systems.freezing.system.decide", any_choice):
            step()
            graphs = counters["stats"]["unique_graphs"]
            with torch.compiler.set_stance("fail_on_recompile"):
                while trainer.step < 12:
                    active = system.freezer.active
                    patterns.add(tuple(active))
                    before = [full(unit.parameters[-1]) for unit in system.units]
                    step()
                    after = [full(unit.parameters[-1]) for unit in system.units]
                    moved.append([not np.array_equal(*pair) for pair in zip(before, after, strict=True)] == active)
        return {
            "breaks": dict(counters["graph_break"]),
            "graphs": (graphs, counters["stats"]["unique_graphs"]),
            "patterns": len(patterns),
            "moved": all(moved),
        }
    finally:
        trainer.close()


def test_compiled_before_the_first_step_and_never_again(data: str, tmp_path: Path) -> None:
    for record in run_on_ranks(compiled, 2, data, str(tmp_path), timeout=300.0):
        assert record["breaks"] == {} and record["graphs"][0] == record["graphs"][1] > 1
        assert record["moved"], "a graph of another pattern was used"
        assert record["patterns"] > 7


def synced(mesh: Any, data: str, folder: str, settings: Settings) -> Counter[str]:
    """The host syncs between the first forward and the optimizer's step, in steps without a decision."""
    trainer = trainer_of(batch(4) | settings, data=data, folder=folder)
    try:
        batches, syncs = trainer.batch_generator(trainer.dataloader), CountSyncs()
        with from_forward_to_optimizer(trainer, syncs):
            while trainer.step < STEPS - 1:
                trainer.step += 1
                trainer.train_step(batches)
        return syncs.seen
    finally:
        trainer.close()


def off_and(mesh: Any, run: Callable[..., Any], policy: str, data: str, folder: str, settings: Settings) -> list[Any]:
    """The results of ``run`` without freezing and with a policy, in one world."""
    return [run(mesh, data, f"{folder}/{name}", settings | {"freezing.policy": name}) for name in ("off", policy)]


def test_no_host_sync_in_the_step(data: str, tmp_path: Path) -> None:
    for off, on in run_on_ranks(off_and, 2, synced, "prefix", data, str(tmp_path), {}):
        assert on == off


def weights_after(mesh: Any, data: str, folder: str, settings: Settings) -> dict[str, np.ndarray]:
    trainer = trainer_of(batch(4) | settings, data=data, folder=folder)
    try:
        batches = trainer.batch_generator(trainer.dataloader)
        while trainer.step < STEPS:
            trainer.step += 1
            trainer.train_step(batches)
        return {name: full(parameter) for name, parameter in trainer.model_parts[0].named_parameters()}
    finally:
        trainer.close()


@pytest.mark.parametrize("model", [{}, EXPERTS])
def test_probes_change_nothing(data: str, tmp_path: Path, model: Settings) -> None:
    """With probes the weights are bit for bit those of a run without this section."""
    off, probed = run_on_ranks(off_and, 2, weights_after, "all", data, str(tmp_path), model)[0]
    assert off.keys() == probed.keys() and all(np.array_equal(off[name], probed[name]) for name in off)


def test_the_last_steps_train_everything(worlds: dict[int, list[dict[str, Any]]]) -> None:
    steps = worlds[2][0]["last steps"]["steps"]
    assert [all(record["active"].values()) for record in steps.values()] == [True, False, False, True, True]
