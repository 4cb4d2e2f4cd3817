"""Highway backpropagation in the real trainer.

It is exact with as many rounds as blocks under every supported parallelism, and the same on two ranks as on one. It
adds no collective to backpropagation's, can be resumed, and leaves nothing behind when off.
"""

import json
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch
import torch.compiler.config as compiler
import torch.distributed as dist
from distributed.cells import chosen
from distributed.parallel_world import Settings, config_of, spec_of
from distributed.spawn import run_on_ranks
from distributed.syncs import CountSyncs, from_forward_to_optimizer
from distributed.systems.highway.runs import COMMON, environment, highway, train_all
from torch._dynamo.utils import counters

from titan_attent.data.text.writer import write_dataset
from titan_attent.titan.trainer import TeachingTrainer

NUM_BLOCKS = 4


def batch(size: int) -> Settings:
    return {"training.local_batch_size": size}


def degrees(**degrees: int) -> Settings:
    return {f"parallelism.{name}_degree": degree for name, degree in degrees.items()}


def model(name: str, flavor: str = "cell") -> Settings:
    return {"model.name": f"{name}_attent", "model.flavor": flavor}


COMPILED: Settings = {"compile.enable": True, "compile.backend": "aot_eager"}
TP, CP, EP = (degrees(**{f"{name}_parallel": 2}) for name in ("tensor", "context", "expert"))
OF_TWO: Settings = model("llama3", "cell of 2")
CASES: dict[str, Settings] = {
    "FSDP": batch(4),
    "FSDP, accumulated": batch(2) | OF_TWO,
    "compiled": batch(4) | OF_TWO | COMPILED,
    "TP": batch(8) | OF_TWO | TP,
    "CP": batch(8) | OF_TWO | CP,
    "qwen3 tied": batch(4) | model("qwen3", "tied of 2"),
}
"""Models of two blocks, one layer of each type, where rounds over more blocks need no test."""
MORE: dict[str, Settings] = {
    "llama4, EP": batch(4) | model("llama4", "cell of 2") | EP,
    "gpt_oss": batch(4) | model("gpt_oss", "cell of 2"),
}
BRANCH: Settings = highway(0, cut="branch")
BRANCH_AND_EXACT: Settings = highway(0, cut="branch", exact_fraction=0.5)
BLOCKS_AND_EXACT: Settings = highway(0, exact_fraction=0.5)
ROUNDS_AND_EXACT: Settings = highway(2, exact_fraction=0.5, tolerance=0.3)
ON_EITHER: dict[str, Settings] = {
    "branch": BRANCH,
    "k = 0": highway(0),
    "k = 1": highway(1),
    "k = 2, fitted": highway(2, fit_gain=True, log_cosine=True),
    "k = 3, adaptive": highway(3, tolerance=0.3),
}
SAVED: Settings = highway(3, tolerance=0.6, fit_gain=True) | {"checkpoint.enable": True, "folder": "saved"}
WHOLE: Settings = SAVED | {"folder": "whole", "checkpoint.enable": False, "steps": 4}


@pytest.fixture(scope="module")
def data(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("highway")
    source = Path(json.__file__).parent / "scanner.py"
    write_dataset([source], output=folder, tokenizer=str(token_data["train"] / "tokenizer.tiktoken"))
    return str(folder)


@pytest.fixture(scope="module")
def one_process() -> Any:
    environment()
    yield
    dist.destroy_process_group()


def farthest(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of two runs' gradients, as a share of the largest entry of its tensor."""
    worst = 0.0
    assert found["gradients"].keys() == expected["gradients"].keys()
    for step, gradients in expected["gradients"].items():
        assert found["gradients"][step].keys() == gradients.keys()
        for name, gradient in gradients.items():
            difference = np.abs(found["gradients"][step][name] - gradient).max()
            worst = max(worst, float(difference / np.abs(gradient).max()))
    return worst


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = chosen(request, {2: CASES}, {2: MORE})[2]
    runs = {f"{name}, exact": settings for name, settings in cases.items()}
    runs |= {f"{name}, highway": settings | highway(-1) for name, settings in cases.items()}
    runs |= {name: batch(4) | settings for name, settings in ON_EITHER.items()}
    runs |= {"branch, accumulated": batch(2) | BRANCH, "branch, TP": batch(8) | TP | BRANCH}
    runs |= {"branch, CP": batch(8) | CP | BRANCH, "branch, compiled": batch(4) | COMPILED | BRANCH}
    runs |= {"accumulated, k = 1": batch(2) | highway(1), "saved": batch(4) | SAVED | {"steps": 3}}
    folder = tmp_path_factory.mktemp("two_ranks")
    return run_on_ranks(train_all, 2, runs, data, str(folder), timeout=400.0)[0] | {"folder": str(folder)}


@pytest.fixture(scope="module")
def one_rank(one_process: None, data: str, two_ranks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    runs = ON_EITHER | {"exact": {}, "k = L": highway(-1), "whole": WHOLE}
    found = train_all(None, runs, data, str(tmp_path_factory.mktemp("one_rank")))
    return found | train_all(None, {"resumed": SAVED | {"steps": 4}}, data, two_ranks["folder"])


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)])
def test_with_as_many_rounds_as_blocks_it_is_backpropagation(name: str, two_ranks: dict[str, Any]) -> None:
    assert farthest(two_ranks[f"{name}, highway"], two_ranks[f"{name}, exact"]) < 1e-5


def test_the_same_in_one_process(one_rank: dict[str, Any]) -> None:
    assert farthest(one_rank["k = L"], one_rank["exact"]) < 1e-5


@pytest.mark.parametrize("name", ON_EITHER)
def test_two_ranks_do_what_one_does(name: str, one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    found, expected = two_ranks[name], one_rank[name]
    assert farthest(found, expected) < 2e-3 < 0.1 < farthest(found, one_rank["exact"])
    for key, value in expected["logged"][-1].items():
        if key.startswith("highway/"):
            assert found["logged"][-1][key] == pytest.approx(value, rel=1e-4), key
    assert found["state"]["rounds"] == expected["state"]["rounds"]
    np.testing.assert_allclose(found["state"]["gains"], expected["state"]["gains"], rtol=1e-4)


def test_microbatches_add_up(two_ranks: dict[str, Any]) -> None:
    assert farthest(two_ranks["accumulated, k = 1"], two_ranks["k = 1"]) < 2e-3


@pytest.mark.parametrize("how", ["accumulated", "TP", "CP", "compiled"])
def test_branches_under(how: str, two_ranks: dict[str, Any]) -> None:
    assert farthest(two_ranks[f"branch, {how}"], two_ranks["branch"]) < 2e-3


def test_no_collective_more_than_backpropagation(two_ranks: dict[str, Any]) -> None:
    expected = two_ranks["FSDP, exact"]["collectives"]
    assert expected == {"foreach_all_gather": 2 * NUM_BLOCKS + 3, "foreach_reduce": NUM_BLOCKS + 2}
    for name in ("FSDP, highway", *ON_EITHER):
        assert two_ranks[name]["collectives"] == expected, name
    for name in ("qwen3 tied", "FSDP, accumulated"):
        assert two_ranks[f"{name}, highway"]["collectives"] == two_ranks[f"{name}, exact"]["collectives"], name


def test_the_number_of_rounds_follows_the_tolerance(one_rank: dict[str, Any]) -> None:
    adaptive, logged = one_rank["k = 3, adaptive"], [run["highway/iterations"] for run in one_rank["whole"]["logged"]]
    assert 1 <= adaptive["state"]["rounds"] <= 3
    assert logged[0] == 3 and logged[1:] == [one_rank["whole"]["state"]["rounds"]] * 3 and logged[1] < 3


def test_cosines_are_logged(one_rank: dict[str, Any]) -> None:
    logged = one_rank["k = 2, fitted"]["logged"][-1]
    cosines = [logged[f"highway/cosine/layer_{i}"] for i in range(NUM_BLOCKS)]
    assert cosines[1:] == pytest.approx([1.0] * 3, abs=1e-5)  # two rounds: the last block and two below it are exact
    assert 0.5 < cosines[0] < 0.999
    assert logged["highway/cosine"] == pytest.approx(sum(cosines) / NUM_BLOCKS)
    assert 0 < logged["highway/step_norm"] < 1 and logged["highway/exact"] == 0


def test_a_resumed_run_on_other_ranks_equals_an_uninterrupted_one(
    one_rank: dict[str, Any], two_ranks: dict[str, Any]
) -> None:
    saved, resumed, whole = two_ranks["saved"], one_rank["resumed"], one_rank["whole"]
    assert list(resumed["gradients"]) == [4]
    whole_end = whole | {"gradients": {4: whole["gradients"][4]}}
    assert farthest(resumed, whole_end) < 5e-3
    for name in ("rounds", "gains"):
        np.testing.assert_array_equal(resumed["state"][name], saved["state"][name])
        np.testing.assert_allclose(resumed["state"][name], whole["state"][name], rtol=1e-4)
    assert saved["state"]["rounds"] < 3 and np.abs(saved["state"]["gains"] - 1).max() > 0.01


# -- in one process: compiled, without host syncs, off ----------------------------------------------------------------


def trainer_of(settings: Settings, *, data: str, folder: Path) -> TeachingTrainer:
    spec_of("llama3_attent")
    return TeachingTrainer(config_of(COMMON | settings, data=data, folder=str(folder)))


def step(trainer: TeachingTrainer, batches: Any) -> None:
    trainer.step += 1
    trainer.train_step(batches)


@pytest.mark.parametrize(
    "settings",
    [BRANCH_AND_EXACT, BLOCKS_AND_EXACT, ROUNDS_AND_EXACT, highway(0, log_cosine=True)],
    ids=["branch", "k = 0", "k = 2", "k = 0, cosines"],
)
def test_compiled_once(settings: Settings, one_process: None, data: str, tmp_path: Path) -> None:
    counters.clear()
    torch.compiler.reset()
    long: Settings = {"training.steps": 12, "metrics.log_freq": 3}
    trainer = trainer_of(settings | COMPILED | long, data=data, folder=tmp_path)
    try:
        batches = trainer.batch_generator(trainer.dataloader)
        step(trainer, batches)
        # Otherwise a backward's first pass may overwrite tensors that the next pass reads. The key of torch's on-disk
        # cache gets a tag, as it does not distinguish the two kinds of graphs.
        may_overwrite = settings is BRANCH_AND_EXACT or settings is BLOCKS_AND_EXACT
        assert functorch.donated_buffer == may_overwrite
        assert compiler.cache_key_tag == ("" if may_overwrite else "titan_attent.systems.highway")
        with torch.compiler.set_stance("fail_on_recompile"):
            while trainer.step < 12:
                step(trainer, batches)
        assert not counters["graph_break"]
    finally:
        trainer.close()
        torch.compiler.reset()
    assert functorch.donated_buffer and compiler.cache_key_tag == ""


def synced(settings: Settings, *, data: str, folder: Path) -> dict[str, int]:
    trainer = trainer_of(settings | {"metrics.log_freq": 50}, data=data, folder=folder)
    try:
        batches, syncs = trainer.batch_generator(trainer.dataloader), CountSyncs()
        with from_forward_to_optimizer(trainer, syncs):
            while trainer.step < 18:
                step(trainer, batches)
        return dict(syncs.seen)
    finally:
        trainer.close()


@pytest.mark.parametrize("settings", [BRANCH, highway(2, fit_gain=True, tolerance=0.3)], ids=["branch", "k = 2"])
def test_no_host_sync_in_the_step(settings: Settings, one_process: None, data: str, tmp_path: Path) -> None:
    long: Settings = {"training.steps": 18}
    stock = synced(long, data=data, folder=tmp_path / "exact")
    assert synced(long | settings, data=data, folder=tmp_path / "highway") == stock


def test_off_leaves_no_trace(one_process: None, data: str, tmp_path: Path) -> None:
    hooks: dict[str, list[int]] = {}
    for name, settings in {"off": {}, "on": highway(0), "branch": BRANCH}.items():
        trainer = trainer_of(settings, data=data, folder=tmp_path / name)
        hooks[name] = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model_parts[0].modules()]
        assert ("highway" in trainer.systems.states) == (name != "off")
        trainer.close()
        left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model_parts[0].modules())
        assert left == sum(hooks["off"])
    assert sum(hooks["on"]) == sum(hooks["off"]) + 2 * NUM_BLOCKS
    assert sum(hooks["branch"]) == sum(hooks["on"]) + 2 * NUM_BLOCKS


def test_more_rounds_than_blocks_are_refused(
    one_process: None, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        trainer_of(highway(5), data=data, folder=tmp_path)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "iterations = 5 with a model of 4 blocks" in message and "-1" in message
