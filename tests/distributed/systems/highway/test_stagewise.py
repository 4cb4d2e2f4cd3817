"""Highway backpropagation between pipeline stages.

It equals GPipe bit for bit with P - 2 rounds, equals the paper's iteration with fewer, and sends a number of messages
that does not depend on the number of stages.
"""

import copy
from collections import Counter
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
from distributed.parallel_world import FLAVORS, full
from distributed.spawn import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part, pipeline_module_split
from torchtitan.models import llama3

from titan_attent.systems.highway.stagewise import HighwaySchedule, highway_schedule, num_rounds, span

VOCABULARY, WIDTH, BATCH, LENGTH, LAYERS = 64, 16, 4, 8, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.outside(torch.tanh(self.inside(h)))


class Part(nn.Module):
    """A stage of a stack in fp64."""

    def __init__(self, p: int, num_stages: int):
        super().__init__()
        torch.manual_seed(p)
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if p == 0 else None
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY) if p == num_stages - 1 else None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(x if self.embed is None else self.embed(x))
        return h if self.head is None else self.head(F.layer_norm(h, (WIDTH,)))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def stack_stage(mesh: DeviceMesh) -> PipelineStage:
    p, num = mesh.get_local_rank(), mesh.size()
    return PipelineStage(Part(p, num), p, num, torch.device("cpu"), group=mesh.get_group())


def llama_stage(mesh: DeviceMesh) -> PipelineStage:
    num_layers = 2 * mesh.size() - 2
    args = copy.deepcopy(FLAVORS["llama3"]["cell"])
    args.n_layers, args.vocab_size, args.max_seq_len = num_layers, VOCABULARY, LENGTH
    torch.manual_seed(0)
    model = llama3.Transformer(args)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
        for weight in model.parameters():  # torchtitan's initial weights are so small that all rounds give the same
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    names = generate_llm_fqn_per_model_part(mesh.size(), num_layers)
    mesh = init_device_mesh("cpu", (mesh.size(),), mesh_dim_names=("pp",))
    ((stage,), _) = pipeline_module_split(model, mesh, "GPipe", torch.device("cpu"), names)
    return stage


class Count(TorchDispatchMode):
    """Messages and collectives of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen[func._opname] += 1
        return func(*args, **(kwargs or {}))


def step(schedule: Any, *, backward: bool = True) -> tuple[list[float], Any]:
    """Run a step and return, on the last stage, the losses and the merged outputs."""
    stage, (inputs, labels) = schedule._stage, batch()
    losses: list[Tensor] = []
    run = schedule.step if backward else schedule.eval
    args = (inputs,) if stage.is_first else ()
    outputs = run(*args, target=labels if stage.is_last else None, losses=losses if stage.is_last else None)
    return [loss.item() for loss in losses], None if outputs is None else full(outputs)


def gradients(stage: PipelineStage) -> dict[str, np.ndarray]:
    """Return the gradients and reset them."""
    found = {name: full(weight.grad) for name, weight in stage.submod.named_parameters() if weight.grad is not None}
    stage.submod.zero_grad()
    return found


def run_steps(schedule: Any) -> dict[str, Any]:
    step(schedule)  # in its first step torch exchanges shapes
    gradients(schedule._stage)
    with Count() as count:
        losses, outputs = step(schedule)
    return {"losses": losses, "outputs": outputs, "gradients": gradients(schedule._stage), "count": count.seen}


def work(mesh: DeviceMesh, kind: str) -> dict[Any, dict[str, Any]]:
    """Run every schedule on a rank: (microbatches, name or rounds) -> its results."""
    stage = (stack_stage if kind == "stack" else llama_stage)(mesh)
    scaled = kind == "stack"
    results: dict[Any, dict[str, Any]] = {}
    for num in (1, 2, 4):
        stock = ScheduleGPipe(stage, num, loss_fn, scale_grads=scaled)
        results[num, "GPipe"] = run_steps(stock)
        results[num, "GPipe"]["eval"] = step(stock, backward=False)[0]
        for k in range(-1, mesh.size() - 1):
            results[num, k] = run_steps(highway_schedule(stock, k))
        if num >= mesh.size():
            stock = Schedule1F1B(stage, num, loss_fn, scale_grads=scaled)
            results[num, "1F1B"] = run_steps(stock)
        schedule = highway_schedule(stock, 0)
        schedule.exact = True
        results[num, "exact"] = run_steps(schedule)
        schedule.exact = False
        step(schedule)
        losses, _ = step(schedule, backward=False)
        gradients(stage) if scaled else None  # eval scales existing gradients, as GPipe's does
        step(schedule)
        results[num, "after eval"] = {"eval": losses, "gradients": gradients(stage)}
    return results


@cache
def world(kind: str, num_stages: int) -> list[dict[Any, dict[str, Any]]]:
    return run_on_ranks(work, num_stages, kind)


WORLDS = [("stack", 2), ("stack", 4), ("llama3", 4)]


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("kind, num_stages", WORLDS)
def test_with_all_rounds_the_stock_schedules_bit_for_bit(kind: str, num_stages: int) -> None:
    for results in world(kind, num_stages):
        for num in (1, 2, 4):
            exact = results[num, "GPipe"]
            same = [-1, num_stages - 2, "exact"] + (["1F1B"] if num >= num_stages else [])
            for name in same:
                assert_equal(results[num, name]["gradients"], exact["gradients"])
            for name in [*same, *range(num_stages - 1)]:
                assert results[num, name]["losses"] == exact["losses"]
                if exact["outputs"] is not None:
                    np.testing.assert_array_equal(results[num, name]["outputs"], exact["outputs"])


@pytest.mark.parametrize("kind, num_stages", WORLDS)
def test_eval_is_the_stock_schedules_and_disturbs_no_step(kind: str, num_stages: int) -> None:
    for results in world(kind, num_stages):
        for num in (1, 2, 4):
            after = results[num, "after eval"]
            assert after["eval"] == results[num, "GPipe"]["eval"]
            times = 1 if kind == "stack" else 2
            once = results[num, 0]["gradients"]
            for name in once:
                np.testing.assert_allclose(after["gradients"][name], times * once[name], rtol=1e-4, atol=1e-7)


def as_written(num_stages: int, num: int, rounds: int) -> list[dict[str, np.ndarray]]:
    """The gradients by the paper's iteration, with all stages at once in one process."""
    parts = [Part(p, num_stages) for p in range(num_stages)]
    for inputs, labels in zip(*(x.chunk(num) for x in batch()), strict=True):
        ends: list[tuple[Tensor, Tensor]] = []
        x = inputs
        for p in range(num_stages):
            x = x if p == 0 else x.detach().requires_grad_()
            ends.append((x, y := parts[p](x)))
            x = y
        loss_fn(x, labels).backward()
        g = ends[-1][0].grad
        w = [g] * (num_stages - 1)
        for _ in range(rounds):
            v = [
                None if p == 0 else torch.autograd.grad(ends[p][1], ends[p][0], w[p], retain_graph=True)[0] - w[p]
                for p in range(num_stages - 1)
            ]
            w = [g + sum(v[p + 1 :]) for p in range(num_stages - 1)]
        for p in range(num_stages - 1):
            ends[p][1].backward(w[p])
    return [{name: full(weight.grad) / num for name, weight in part.named_parameters()} for part in parts]


@pytest.mark.parametrize("num_stages, rounds", [(2, 0), (4, 0), (4, 1), (4, 2)])
def test_each_number_of_rounds_is_the_iteration_as_written(num_stages: int, rounds: int) -> None:
    for num in (1, 2, 4):
        expected = as_written(num_stages, num, rounds)
        for results, gradients in zip(world("stack", num_stages), expected, strict=True):
            assert results[num, rounds]["gradients"].keys() == gradients.keys()
            for name in gradients:
                np.testing.assert_allclose(
                    results[num, rounds]["gradients"][name], gradients[name], rtol=1e-9, atol=1e-14
                )


@pytest.mark.parametrize("kind", ["stack", "llama3"])
def test_rounds_bring_the_gradients_closer(kind: str) -> None:
    for num in (1, 4):
        cosines = []
        for k in range(3):
            pairs = [
                (results[num, k]["gradients"][name], results[num, "GPipe"]["gradients"][name])
                for results in world(kind, 4)
                for name in results[num, "GPipe"]["gradients"]
            ]
            flat, exact = (
                np.concatenate([x.ravel().astype(np.float64) for x in side]) for side in zip(*pairs, strict=True)
            )
            cosines.append(flat @ exact / (np.linalg.norm(flat) * np.linalg.norm(exact)))
        assert 0.3 < cosines[0] < cosines[1] < cosines[2] == pytest.approx(1)


def test_messages_per_microbatch_are_one_forward_and_at_most_one_per_round_and_one_more() -> None:
    for num_stages in (2, 4):
        for p, results in enumerate(world("stack", num_stages)):
            for num in (1, 2, 4):
                for k in range(num_stages - 1):
                    seen = results[num, k]["count"]
                    assert set(seen) <= {"send", "recv_"}
                    back = 0 if p == 0 else 1 if p == num_stages - 1 else len(rounds_of(p - 1, num_stages, k))
                    assert seen["send"] == num * (back + (p < num_stages - 1))
                    assert back <= k + 1
                    assert results[num, num_stages - 2]["count"] == results[num, "GPipe"]["count"]


def rounds_of(p: int, num_stages: int, k: int) -> range:
    first, last = span(p, num_stages, k)
    return range(first, last + 1)


@pytest.mark.parametrize("k", [0, 1, 3, 5, 30])
def test_messages_do_not_grow_with_the_pipeline(k: int) -> None:
    for num_stages in (8, 32, 128):
        assert max(len(rounds_of(p, num_stages, k)) for p in range(num_stages - 1)) <= k + 1


def sharded(mesh: DeviceMesh, num_stages: int) -> dict[Any, dict[str, Any]]:
    """Run stages sharded by FSDP2, and the same stages unsharded."""
    both = init_device_mesh("cpu", (num_stages, 2), mesh_dim_names=("pp", "dp"))
    plain, cut = stack_stage(both["pp"]), stack_stage(both["pp"])
    for block in cut.submod.blocks:
        fully_shard(block, mesh=both["dp"], reshard_after_forward=False)
    fully_shard(cut.submod, mesh=both["dp"], reshard_after_forward=False)
    results = {"GPipe": run_steps(ScheduleGPipe(cut, 2, loss_fn))}
    for k in range(num_stages - 1):
        for name, stage in {"plain": plain, "cut": cut}.items():
            results[name, k] = run_steps(HighwaySchedule(stage, 2, loss_fn, iterations=k))
    return results


@pytest.mark.parametrize("num_stages", [2, 4])
def test_sharded_stages_are_reduced_once_as_by_gpipe(num_stages: int) -> None:
    """Every rank has the same examples, so the mean over the ranks equals the gradient of each rank."""
    for results in run_on_ranks(sharded, 2 * num_stages, num_stages):
        for k in range(num_stages - 1):
            plain, cut = results["plain", k]["gradients"], results["cut", k]["gradients"]
            assert plain.keys() == cut.keys() and plain
            for name in plain:
                np.testing.assert_allclose(cut[name], plain[name], rtol=1e-12, atol=1e-15)
            assert collectives(results["cut", k]["count"]) == collectives(results["GPipe"]["count"])
        assert len(collectives(results["GPipe"]["count"])) >= 2


def collectives(seen: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in seen.items() if name not in ("send", "recv_")}


def test_number_of_rounds() -> None:
    assert [num_rounds(4, k) for k in (-1, 0, 1, 2, 9)] == [2, 0, 1, 2, 2]
    assert [num_rounds(p, -1) for p in (1, 2, 3)] == [0, 0, 1]
    with pytest.raises(ValueError, match="iterations = -2"):
        num_rounds(4, -2)


def test_refusals() -> None:
    make = partial(HighwaySchedule, n_microbatches=1, iterations=0)
    compiled = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    with pytest.raises(ValueError, match="0 is compiled"):
        make(SimpleNamespace(submod=compiled))
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    with pytest.raises(ValueError, match="the stage is compiled"):
        make(SimpleNamespace(submod=in_place))
    with pytest.raises(ValueError, match="one stage per rank"):
        highway_schedule(object.__new__(ScheduleInterleaved1F1B), 0)  # type: ignore[arg-type]
    run_on_ranks(refused, 2)


def refused(mesh: DeviceMesh) -> None:
    p = mesh.get_local_rank()
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="DDP"):
        HighwaySchedule(PipelineStage(ddp, p, 2, torch.device("cpu"), group=mesh.get_group()), 1, iterations=0)
