"""The mixture of transformers under the real trainer, in stages, against one plain process; resumed on one rank."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.parallel_world import NoMesh, Observed, Settings, config_of, full, plain_model, spec_of, write_data
from distributed.spawn import run_on_ranks
from distributed.syncs import CountSyncs, from_forward_to_optimizer
from references import exact_norm
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn import functional as F
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.train import Trainer

from titan_attent.data.text.shards import TokenDataset
from titan_attent.models.mot.gate import route_keys
from titan_attent.titan.checks import preflight
from titan_attent.titan.models.mot import train_spec

STEPS, SAVED, PREFIX, EXPERTS, LAYERS = 5, 3, 5, 3, 2
COMMON: Settings = {
    "model.name": "mot_attent",
    "model.flavor": "cell of 2",
    "teacher.strategy": "uniform",
    "training.steps": STEPS,
    "training.global_batch_size": 8,
    "checkpoint.enable": True,
    "checkpoint.interval": SAVED,
    "mot.num_experts": EXPERTS,
    "mot.prefix": PREFIX,
    "mot.balance": 0.5,
    "mot.noise": 2.0,
    "mot.noise_steps": 4,
    "freezing.policy": "stages",
    "freezing.stages": ["feed_forward:1", "attention:2", "feed_forward"],
    "freezing.warmup_steps": 1,
}
TRAINED = ("both", "feed_forward", "attention", "attention", "feed_forward")
"""Of the layers, in steps 1 to 5."""
FULL: Settings = {"activation_checkpoint.mode": "full", "training.local_batch_size": 2}
COMPILED: Settings = {"compile.enable": True, "compile.components": ["model"], "compile.backend": "aot_eager"}
LLAMA: Settings = {"model.name": "llama3_attent", "training.local_batch_size": 4}
UNIFORM: Settings = {
    "training.local_batch_size": 4,
    "freezing.policy": "off",
    "freezing.stages": [],
    "mot.balance": 0.0,
    "mot.noise_steps": 0,
}
"""Without a balance loss, which torchtitan's loss does not have; the noise of every step comes with the batch."""
DDP: Settings = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1}
OTHERS: dict[str, Settings] = {"llama3": LLAMA, "uniform": UNIFORM, "DDP": UNIFORM | DDP}
NO_ROUTES = torch.zeros(LAYERS, 1, dtype=torch.int64)
CELLS: dict[str, Settings] = {
    "FSDP": {"training.local_batch_size": 4},
    "checkpointed, accumulated": FULL,
    "compiled": {"training.local_batch_size": 4} | COMPILED,
}


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def watched(trainer: Observed, syncs: CountSyncs) -> AbstractContextManager[Any]:
    """Waits are counted where the step is not compiled; where it is, all is compiled before the first step."""
    if not trainer.job_config.compile.enable:
        return from_forward_to_optimizer(trainer, syncs)
    return torch.compiler.set_stance("fail_on_recompile") if trainer.step > 1 else nullcontext()


def train(settings: Settings, *, data: str, folder: str) -> dict[str, Any]:
    """One run of the trainer, from the checkpoint in ``folder`` if there is one."""
    config = config_of(COMMON | settings, data=data, folder=folder)
    preflight.check_run(config, spec_of(config.model.name), world_size=int(os.environ["WORLD_SIZE"]))
    trainer, logged, syncs = Observed(config), [], CountSyncs()
    trainer.metrics_processor.logger.log = lambda metrics, step: logged.append(metrics)
    try:
        (model,) = trainer.model_parts
        if not trainer.checkpointer.load():
            weights = {name: value.clone() for name, value in plain_model(COMMON | settings).state_dict().items()}
            set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
        batches, steps = trainer.batch_generator(trainer.dataloader), {}
        routes: list[torch.Tensor] = []
        model.register_forward_hook(lambda model, args, out: routes.append(getattr(model, "routes", NO_ROUTES)))
        while trainer.step < STEPS:
            trainer.step += 1
            trainer.served = []
            routes.clear()
            with watched(trainer, syncs):
                trainer.train_step(batches)
            steps[trainer.step] = {
                "ids": np.concatenate([ids for ids, _ in trainer.served]),
                "routes": torch.cat(routes[: len(trainer.served)], dim=1).numpy(),
                "metrics": logged[-1],
                "weights": {plain_name(name): full(p) for name, p in model.named_parameters()},
            }
            trainer.checkpointer.save(trainer.step)
        return {"steps": steps, "rank": trainer.dataloader.dp_rank, "syncs": dict(syncs.seen)}
    finally:
        trainer.close()


class Given(BaseDataLoader):
    """A loader of batches that were made beforehand."""

    def __init__(self, batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]]):
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        return iter(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("nothing is resumed")


def train_stock(order: list[torch.Tensor], settings: Settings, *, data: str, folder: str) -> dict[str, np.ndarray]:
    """The weights after torchtitan's own Trainer has trained the same model on this rank's examples of each step."""
    dataset = TokenDataset(data, seq_len=32)
    batches = []
    for step, ids in enumerate(order, start=1):
        inputs, labels = dataset.batch(ids)
        labels[:, : PREFIX - 1] = -100
        batches.append(({"input": inputs, "route_keys": route_keys(ids, seed=0, step=step)}, labels))
    spec = replace(
        train_spec(),
        model_args=spec_of("mot_attent").model_args,
        build_dataloader_fn=lambda **kwargs: Given(batches),
        build_tokenizer_fn=None,
    )
    register_train_spec("mot_stock", spec)
    own = {"model.name": "mot_stock", "checkpoint.enable": False}
    trainer = Trainer(config_of(COMMON | settings | own, data=data, folder=folder))
    try:
        (model,) = trainer.model_parts
        weights = {name: value.clone() for name, value in plain_model(COMMON | settings).state_dict().items()}
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
        iterator = trainer.batch_generator(trainer.dataloader)
        for _ in order:
            trainer.step += 1
            trainer.train_step(iterator)
        return {plain_name(name): full(parameter) for name, parameter in model.named_parameters()}
    finally:
        trainer.close()


def train_cells(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, dict[str, Any]]:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(size)
    results = {name: train(settings, data=data, folder=str(Path(folder) / name)) for name, settings in cells.items()}
    if "uniform" in cells:
        order = [torch.from_numpy(step["ids"]) for step in results["uniform"]["steps"].values()]
        results["stock"] = train_stock(order, UNIFORM, data=data, folder=str(Path(folder) / "stock"))
    return results


def train_plainly(data: str, order: list[list[int]]) -> dict[int, dict[str, Any]]:
    """A loop over the examples of each step: masks, noise, balance loss and stages written out, no trainer."""
    config = config_of(COMMON, data=data, folder="")
    model, dataset = plain_model(COMMON), TokenDataset(data, seq_len=32)
    optimizers = spec_of("mot_attent").build_optimizers_fn([model], config.optimizer, NoMesh())
    shares, steps = np.full((LAYERS, EXPERTS), 1 / EXPERTS), {}
    for step, ids in enumerate(order, start=1):
        inputs, labels = dataset.batch(torch.tensor(ids))
        part = TRAINED[step - 1]
        for name, parameter in model.named_parameters():
            other = {"feed_forward": ".attention", "attention": ".f", "both": "nothing"}[part]
            parameter.requires_grad_(not (name.startswith("layers.") and other in name))
        keys = route_keys(torch.tensor(ids), seed=0, step=step) if step <= 4 else None
        logits = model(inputs, keys)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")[:, PREFIX - 1 :]
        aux = (model.probabilities * torch.from_numpy(shares).float()[:, None]).sum(-1).mean() * EXPERTS
        optimizers.zero_grad()
        (losses.mean() + 0.5 * aux).backward()
        norm = torch.tensor(exact_norm(p.grad for p in model.parameters() if p.grad is not None))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.training.max_norm, norm)
        optimizers.step()
        routes = model.routes.numpy()
        got = np.stack([np.bincount(of_layer, minlength=EXPERTS) for of_layer in routes]) / len(ids)
        shares = 0.9 * shares + 0.1 * got
        weights = {name: full(parameter) for name, parameter in model.named_parameters()}
        steps[step] = {"loss": losses.mean().item(), "norm": norm.item(), "routes": routes, "shares": got}
        steps[step]["weights"] = weights
    return steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data(tmp_path_factory.mktemp("text"), "train:512"))


@pytest.fixture(scope="module")
def runs(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, dict[str, Any]]]]:
    folder = str(tmp_path_factory.mktemp("runs"))
    return folder, run_on_ranks(train_cells, 2, CELLS | OTHERS, data, folder, timeout=400.0)


@pytest.fixture(scope="module")
def plain(data: str, runs: Any) -> dict[int, dict[str, Any]]:
    order = [ids_of(runs[1], "FSDP", step) for step in range(1, STEPS + 1)]
    return train_plainly(data, order)


def ids_of(ranks: list[dict[str, Any]], cell: str, step: int) -> list[int]:
    by_rank = sorted((rank[cell] for rank in ranks), key=lambda result: result["rank"])
    return np.concatenate([result["steps"][step]["ids"] for result in by_rank]).tolist()


def compare(ranks: list[dict[str, Any]], cell: str, plain: dict[int, dict[str, Any]], steps: range) -> None:
    by_rank = sorted((rank[cell] for rank in ranks), key=lambda result: result["rank"])
    for step in steps:
        expected, here = plain[step], [result["steps"][step] for result in by_rank]
        routes = np.concatenate([one["routes"] for one in here], axis=1)
        np.testing.assert_array_equal(routes, expected["routes"], err_msg=f"{cell}, step {step}")
        for one in here:
            metrics = one["metrics"]
            np.testing.assert_allclose(metrics["loss_metrics/global_avg_loss"], expected["loss"], rtol=1e-4)
            np.testing.assert_allclose(metrics["grad_norm"], expected["norm"], rtol=1e-3)
            for name, weight in expected["weights"].items():
                np.testing.assert_allclose(
                    one["weights"][name], weight, rtol=1e-3, atol=2e-5, err_msg=f"{cell}, step {step}: {name}"
                )
            if step > 1 and step - 1 in plain:  # logged with the next step
                for layer in range(LAYERS):
                    for kind in ("sequence", "token"):
                        logged = [metrics[f"mot/{kind}_share/{layer}.{expert}"] for expert in range(EXPERTS)]
                        np.testing.assert_allclose(logged, plain[step - 1]["shares"][layer])


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_what_a_plain_process_trains(runs: Any, plain: dict[int, dict[str, Any]], cell: str) -> None:
    assert len(np.unique(np.concatenate([plain[step]["routes"].flatten() for step in plain]))) == EXPERTS
    compare(runs[1], cell, plain, range(1, STEPS + 1))


def test_stages_freeze_whole_parts_and_never_the_gates(runs: Any) -> None:
    steps = runs[1][0]["FSDP"]["steps"]
    for step in range(2, STEPS + 1):
        before, after = (steps[number]["weights"] for number in (step - 1, step))
        for name in after:
            if name.startswith("layers."):
                is_frozen = (".attention" in name) != (TRAINED[step - 1] == "attention")
                assert np.array_equal(before[name], after[name]) == is_frozen, f"step {step}: {name}"
            elif name.startswith("gates."):
                assert not np.array_equal(before[name], after[name]), name


def test_the_step_waits_for_nothing(runs: Any) -> None:
    """From the first forward to the optimizer no more than llama3's step."""
    for rank in runs[1]:
        assert rank["FSDP"]["syncs"] == rank["llama3"]["syncs"]


def test_uniform_is_stock_torchtitan_bit_for_bit(runs: Any) -> None:
    for rank in runs[1]:
        ours = rank["uniform"]["steps"][STEPS]["weights"]
        assert ours.keys() == rank["stock"].keys()
        assert all(np.array_equal(ours[name], rank["stock"][name]) for name in ours)


def test_ddp_trains_the_same(runs: Any) -> None:
    for rank in runs[1]:
        fsdp, ddp = (rank[cell]["steps"][STEPS]["weights"] for cell in ("uniform", "DDP"))
        for name, weight in fsdp.items():
            np.testing.assert_allclose(ddp[name], weight, rtol=1e-3, atol=2e-5, err_msg=name)


def test_resumed_on_one_rank(runs: Any, plain: dict[int, dict[str, Any]], data: str) -> None:
    """From step 3, in the middle of a stage, with another number of ranks and microbatches."""
    cell = {"FSDP": {"training.local_batch_size": 8, "checkpoint.load_step": SAVED}}
    ranks = run_on_ranks(train_cells, 1, cell, data, runs[0], timeout=300.0, apart=True)
    assert sorted(ranks[0]["FSDP"]["steps"]) == [SAVED + 1, SAVED + 2]
    compare(ranks, "FSDP", plain, range(SAVED + 1, STEPS + 1))
