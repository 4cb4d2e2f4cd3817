"""A step has no graph breaks, no recompiles, and no host syncs beyond those of stock torchtitan.

Runs the trainer on two ranks over many selections and exchanges, and compares it with torchtitan's own trainer.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from distributed.parallel_world import Settings, config_of, spec_of
from distributed.spawn import run_on_ranks
from distributed.syncs import CountSyncs, from_forward_to_optimizer
from torch._dynamo.utils import counters
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.protocols.train_spec import _extra_train_specs, get_train_spec, register_train_spec
from torchtitan.train import Trainer

from titan_attent.data.text.writer import write_dataset
from titan_attent.losses.buffer import LossBuffer
from titan_attent.losses.window import LossWindow
from titan_attent.titan.trainer import TeachingTrainer

FLUSH_EVERY = 1
"""An exchange after every step, and what the one before brought applied: else the next choice would wait for both."""
STEPS = 14
SYNCED_STEPS = 10
STOCK_STEPS = 2
"""Steps of torchtitan's own trainer, which are all alike."""
COMMON: Settings = {
    "model.flavor": "cell of 2",
    "training.local_batch_size": 4,
    "training.steps": STEPS,
    "metrics.log_freq": 1000,
    "teacher.initial_ratio": 0.5,
    "teacher.final_ratio": 0.8,
    "teacher.ratio_schedule": "incremental",
    "teacher.interval_schedule": "incremental",
}
TP: Settings = {"parallelism.tensor_parallel_degree": 2, "training.local_batch_size": 8}
CASES: dict[str, Settings] = {
    "soft, functional gradient": {"teacher.strategy": "soft", "teacher.importance": "functional_gradient"},
    "weights by loss, in chunks": {
        "teacher.strategy": "hard",
        "teacher.importance": "loss",
        "teacher.weighting": "loss",
        "teacher.loss_chunks": 3,
    },
    "the worst case": {"teacher.strategy": "uniform", "teacher.weighting": "worst_case", "teacher.importance": "loss"},
    "loss parallel": {"teacher.strategy": "soft", "teacher.importance": "functional_gradient", **TP},
}


class Observed:
    """Counts the steps that weigh examples unequally, and the selections."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.weights, self.ids = trainer, set[tuple[float, ...]](), set[tuple[int, ...]]()
        self.batches = self._watched(trainer.batch_generator(trainer.dataloader))

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if "weight" in batch[0]:
                self.weights.add(tuple(batch[0]["weight"].tolist()))
                self.ids.add(tuple(batch[0]["example_id"].tolist()))
            yield batch

    def step(self) -> None:
        self.trainer.step += 1
        self.trainer.train_step(self.batches)


def environment() -> None:
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    spec_of("llama3_attent")
    for part in (LossBuffer, LossWindow):
        part.__init__.__kwdefaults__["flush_every"] = FLUSH_EVERY


def compiled_steps(mesh: Any, settings: Settings, data: str, folder: str) -> dict[str, Any]:
    environment()
    counters.clear()
    torch.compiler.reset()
    compiled: Settings = {"compile.enable": True, "compile.backend": "eager"}
    trainer = TeachingTrainer(config_of(COMMON | compiled | settings, data=data, folder=folder))
    try:
        observed = Observed(trainer)
        observed.step()
        graphs = counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance("fail_on_recompile"):
            while trainer.step < STEPS:
                observed.step()
        return {
            "breaks": dict(counters["graph_break"]),
            "graphs": (graphs, counters["stats"]["unique_graphs"]),
            "weights": len(observed.weights),
            "ids": len(observed.ids),
        }
    finally:
        trainer.close()


class RandomLoader(BaseDataLoader):
    """Batches for the stock trainer."""

    def __init__(self, *, dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any):
        self.shape = (job_config.training.local_batch_size, job_config.training.seq_len)

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield {"input": torch.randint(512, self.shape)}, torch.randint(512, self.shape)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def synced_steps(mesh: Any, settings: Settings, data: str, folder: str, *, stock: bool) -> Counter[str]:
    """What waited in ``SYNCED_STEPS`` steps of two microbatches, of torchtitan's own trainer or of ours."""
    steps = STOCK_STEPS if stock else SYNCED_STEPS
    environment()
    config = config_of(COMMON | {"training.local_batch_size": 2} | settings, data=data, folder=folder)
    if stock:
        spec = dataclasses.replace(
            get_train_spec("llama3"),
            model_args=spec_of("llama3_attent").model_args,
            build_dataloader_fn=RandomLoader,
            build_tokenizer_fn=None,
        )
        if "stock" not in _extra_train_specs:
            register_train_spec("stock", spec)
        config.model.name = "stock"
    trainer = Trainer(config) if stock else TeachingTrainer(config)
    try:
        observed, syncs = Observed(trainer), CountSyncs()
        with from_forward_to_optimizer(trainer, syncs):
            while trainer.step < steps:
                observed.step()
        return Counter({name: number * SYNCED_STEPS // steps for name, number in syncs.seen.items()})
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def data(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hot_path")
    source = Path(json.__file__).parent / "scanner.py"  # 21 windows: passes of two steps, of one when half is selected
    write_dataset([source], output=folder, tokenizer=str(token_data["train"] / "tokenizer.tiktoken"))
    return str(folder)


def all_compiled_steps(mesh: Any, data: str, folder: str) -> dict[str, dict[str, Any]]:
    return {name: compiled_steps(mesh, settings, data, f"{folder}/{name}") for name, settings in CASES.items()}


def all_synced_steps(mesh: Any, data: str, folder: str) -> dict[str, Counter[str]]:
    own = {
        name: synced_steps(mesh, settings, data, f"{folder}/{name}", stock=False) for name, settings in CASES.items()
    }
    # torch's own cut embedding makes a tensor of a host number.
    stock = {"stock": {}, "stock, tensor parallel": TP}
    return own | {
        name: synced_steps(mesh, parts, data, f"{folder}/{name}", stock=True) for name, parts in stock.items()
    }


def test_one_compilation_for_all_selections_and_weights(data: str, tmp_path: Path) -> None:
    for rank in run_on_ranks(all_compiled_steps, 2, data, str(tmp_path), timeout=300.0):
        for name, seen in rank.items():
            assert seen["breaks"] == {}, name
            assert seen["graphs"][0] == seen["graphs"][1] > 1, f"{name}: compiled again"
            assert seen["ids"] > 8, f"{name}: the same selection all the time"
            is_equal = {"hard", "uniform"} & set(CASES[name].values())
            assert seen["weights"] > 5 or is_equal, f"{name}: the same weights all the time"


def test_no_more_host_syncs_than_stock_torchtitan(data: str, tmp_path: Path) -> None:
    for rank in run_on_ranks(all_synced_steps, 2, data, str(tmp_path), timeout=300.0):
        stock, cut = rank.pop("stock"), rank.pop("stock, tensor parallel")
        assert rank == dict.fromkeys(CASES, stock) | {"loss parallel": cut}


def test_the_double_notices_what_would_wait() -> None:
    x = torch.arange(4.0)
    waits: dict[str, Callable[[], Any]] = {
        "item": lambda: x[0].item(),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "__bool__": lambda: bool(x.max() > 1),
        "__int__": lambda: int(x[1]),
        "__float__": lambda: float(x[1]),
        "numpy": lambda: x.numpy(),
        "index by mask": lambda: x[x > 1],
        "nonzero": lambda: x.nonzero(),
        "masked_select": lambda: x.masked_select(x > 1),
        "equal": lambda: torch.equal(x, x),
        "_local_scalar_dense": lambda: x[:1].sum().item(),
        "lift_fresh": lambda: torch.tensor([0.0, 1.0], device=x.device),
    }
    for name, wait in waits.items():
        with CountSyncs() as syncs:
            wait()
        assert syncs.seen[name] == 1, name
    with CountSyncs() as syncs:
        torch.where(x > 1, x.mul(2), 0.0).sum().sqrt() + torch.full((3,), 2.0)
    assert not syncs.seen
