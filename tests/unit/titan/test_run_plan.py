"""The plan of runs on many processes, which no test starts: what each holds, by plain arithmetic."""

# ruff: noqa: F811

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_value_checks import quickstart, spec  # noqa: F401
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from benchmarks.common.measure import peak_bytes
from titan_attent.scores.targets import TargetFacts, TargetsWriter, facts_of_data, window_places
from titan_attent.titan.checks import preflight
from titan_attent.titan.first_checks import check_option
from titan_attent.titan.frozen_model import FrozenModel, check_frozen
from titan_attent.titan.run_plan import RunPlan, plan_of


def plan(quickstart: JobConfig, spec: TrainSpec, *, world_size: int = 1, **values: Any) -> RunPlan:
    config = copy.deepcopy(quickstart)
    config.training.local_batch_size = 1
    config.checkpoint.enable = False
    for name, value in values.items():
        section, _, key = name.partition("__")
        setattr(getattr(config, section), key, value)
    facts = preflight.check_run(config, spec, world_size=world_size)
    return plan_of(config, spec, facts, world_size=world_size)


def memory(of: RunPlan) -> dict[str, int]:
    return {name: size for name, size, _ in of.memory}


def test_weights_and_state_are_divided_over_the_processes(quickstart: JobConfig, spec: TrainSpec) -> None:
    alone = plan(quickstart, spec)
    num = alone.num_parameters
    assert memory(alone)["weights"] == memory(alone)["gradients"] == 4 * num and memory(alone)["optimizer"] == 8 * num
    assert "gathered" not in memory(alone)
    many = plan(quickstart, spec, world_size=16)
    assert memory(many)["weights"] == 4 * -(-num // 16) and memory(many)["gathered"] > 0
    assert memory(many)["teacher"] < memory(alone)["teacher"] / 4
    replicas = {"parallelism__data_parallel_replicate_degree": 16, "parallelism__data_parallel_shard_degree": 1}
    assert memory(plan(quickstart, spec, world_size=16, **replicas))["weights"] == 4 * num
    split = plan(quickstart, spec, world_size=32, parallelism__tensor_parallel_degree=2)
    assert memory(split)["weights"] == 4 * -(-num // 32)
    assert memory(split)["activations"] == memory(many)["activations"] // 2
    assert (many.steps, many.batch_size, many.passes) == (alone.steps, alone.batch_size, alone.passes)


def test_activations(quickstart: JobConfig, spec: TrainSpec) -> None:
    args: Any = spec.model_args["tiny"]
    values: dict[str, Any] = {"training__mixed_precision_param": "bfloat16", "training__local_batch_size": 2}
    tokens, logits = 2 * 128, 2 * 128 * args.vocab_size * 10
    none = memory(plan(quickstart, spec, **values))["activations"]
    assert none == 34 * args.n_layers * args.dim * tokens + logits
    full = memory(plan(quickstart, spec, **values, activation_checkpoint__mode="full"))["activations"]
    assert full == (2 * args.n_layers + 34) * args.dim * tokens + logits


@pytest.fixture
def source(quickstart: JobConfig, spec: TrainSpec, tmp_path: Path) -> torch.nn.Module:
    """A model of the learner's flavor, with its checkpoint in ``tmp_path``/step-5."""
    args: Any = copy.deepcopy(spec.model_args["tiny"])
    args.update_from_config(quickstart)
    model = spec.model_cls(args)
    with torch.no_grad():
        model.init_weights()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "step-5", no_dist=True)
    return model


def distilling_from(source: Path) -> dict[str, Any]:
    keys = {"distillation__schedule": "final", "distillation__source": str(source)}
    return keys | {"training__mixed_precision_param": "float32"}


def test_the_frozen_source_is_counted(
    quickstart: JobConfig, spec: TrainSpec, source: torch.nn.Module, tmp_path: Path
) -> None:
    distilling = distilling_from(tmp_path)
    num = sum(parameter.numel() for parameter in source.parameters())
    alone, many = (plan(quickstart, spec, world_size=size, **distilling) for size in (1, 16))
    assert memory(alone)["source"] == 4 * num and "its blocks" not in memory(alone)
    assert memory(many)["source"] == 4 * -(-num // 16)
    block = sum(parameter.numel() for parameter in source.layers["0"].parameters())
    rest = num - block * len(source.layers)
    assert memory(many)["its blocks"] == 2 * 4 * max(block, rest)
    assert many.checkpoint_bytes == plan(quickstart, spec, world_size=16).checkpoint_bytes, "no checkpoint holds it"
    split = plan(quickstart, spec, world_size=16, **distilling, parallelism__tensor_parallel_degree=2)
    assert memory(split)["source"] == memory(many)["source"]
    assert memory(split)["its pass"] == memory(many)["its pass"] // 2
    replicas = {"parallelism__data_parallel_replicate_degree": 16, "parallelism__data_parallel_shard_degree": 1}
    assert memory(plan(quickstart, spec, world_size=16, **distilling, **replicas))["source"] == 4 * num
    pipeline: dict[str, Any] = {"parallelism__pipeline_parallel_degree": 2, "training__local_batch_size": 4}
    pipeline |= {"parallelism__pipeline_parallel_schedule": "1F1B", "validation__enable": False}
    staged = plan(quickstart, spec, world_size=2, **distilling, **pipeline)
    assert memory(staged)["source"] == 4 * num and memory(staged)["its pass"] == memory(alone)["its pass"]


@pytest.mark.parametrize(
    ("family", "flavor", "dimension"),
    [("hyla", "tiny", "tensor_parallel"), ("mot", "tiny", "context_parallel"), ("mot", "tiny", "expert_parallel")],
)
def test_a_source_whose_family_lacks_the_parallelism_is_refused(
    family: str, flavor: str, dimension: str, quickstart: JobConfig, spec: TrainSpec, source: Any, tmp_path: Path
) -> None:
    """The learner's own family has it."""
    values = distilling_from(tmp_path) | {"distillation__family": family, "distillation__flavor": flavor}
    with pytest.raises(ValueError, match=f"family {family}, flavor {flavor}.*{dimension}_degree = 2: "):
        plan(quickstart, spec, world_size=2, **values, **{f"parallelism__{dimension}_degree": 2})


def test_a_source_with_another_vocabulary_is_refused(
    quickstart: JobConfig, spec: TrainSpec, source: torch.nn.Module, tmp_path: Path
) -> None:
    """Its checkpoint is of its flavor, so only the logits of the first step would differ."""
    config = copy.deepcopy(quickstart)
    config.model.flavor = "bench"
    config.distillation.schedule, config.distillation.source = "final", str(tmp_path)
    config.distillation.flavor = "tiny"
    with pytest.raises(ValueError, match="flavor tiny.*it has 4,096 token ids, and .* bench, has 1,024"):
        preflight.check_run(config, spec, world_size=1, check_frozen=partial(check_frozen, config))


def test_a_source_of_another_flavor_is_told_its_own_keys(
    quickstart: JobConfig, spec: TrainSpec, source: torch.nn.Module, tmp_path: Path
) -> None:
    """Not those of the student."""
    config = copy.deepcopy(quickstart)
    config.distillation.schedule, config.distillation.source = "final", str(tmp_path)
    config.distillation.flavor = "bench"
    with pytest.raises(ValueError, match=r"\[distillation\] source = .*of another model.*Name the family and flavor"):
        preflight.check_run(config, spec, world_size=1, check_frozen=partial(check_frozen, config))


def test_a_pass_of_the_source_takes_no_more_than_planned(
    quickstart: JobConfig, spec: TrainSpec, source: torch.nn.Module, tmp_path: Path
) -> None:
    distilling = distilling_from(tmp_path)
    planned = memory(plan(quickstart, spec, **distilling, training__local_batch_size=4))["its pass"]
    frozen = FrozenModel(source.requires_grad_(False).eval(), tokenizer=None, precision=nullcontext)
    inputs = torch.zeros(4, quickstart.training.seq_len, dtype=torch.int64)
    frozen(inputs)
    measured = peak_bytes(lambda: frozen(inputs), device="cpu")
    assert 0.5 * planned < measured <= planned


def test_targets_on_disk_are_counted(
    quickstart: JobConfig, spec: TrainSpec, source: torch.nn.Module, tmp_path: Path
) -> None:
    """The microbatches that the reader holds, and the one in training."""
    dataset = preflight.check_run(quickstart, spec, world_size=1).dataset
    facts = TargetFacts(
        **facts_of_data(dataset),  # type: ignore[arg-type]
        model="tiny",
        precision="float32",
        checkpoint="",
        checkpoint_sha256="",
        kind="draws",
        num=3,
        temperature=1.0,
        seed=0,
    )
    writer = TargetsWriter(tmp_path / "step-7", facts=facts)
    with writer.prepared():
        places = window_places(torch.arange(len(dataset)), seq_len=facts.seq_len)
        writer.write(places, torch.zeros(len(dataset), facts.seq_len, 3, dtype=torch.int32), None)
        writer.durable(len(dataset), num_records=facts.num_records)
    values = {"distillation__schedule": "final", "distillation__targets": str(tmp_path), "data__num_workers": 2}
    held = plan(quickstart, spec, **values, training__local_batch_size=2)
    assert memory(held)["targets"] == (2 + 2 + 1) * 2 * facts.seq_len * 3 * 4
    assert "source" not in memory(held)


def test_checkpoints(quickstart: JobConfig, spec: TrainSpec) -> None:
    values = {"checkpoint__enable": True, "training__steps": 10, "checkpoint__keep_latest_k": 2}
    assert plan(quickstart, spec).checkpoints == []
    saved = plan(quickstart, spec, **values, checkpoint__interval=4)
    assert (saved.checkpoints, saved.num_kept) == ([4, 8, 10], 2)
    saved = plan(quickstart, spec, **values, checkpoint__interval=4, checkpoint__enable_first_step_checkpoint=True)
    assert saved.checkpoints == [1, 4, 8, 10]


def test_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rest = ["--job.config_file", "x.toml", "--checkpoint.enable"]
    assert check_option(rest) == (rest, None)
    assert check_option(["--check", *rest]) == (rest, 1)
    assert check_option([*rest, "--check", "64"]) == (rest, 64)
    assert check_option([*rest[:2], "--check=8", *rest[2:]]) == (rest, 8)
    monkeypatch.setenv("WORLD_SIZE", "4")  # started by torchrun
    assert check_option([*rest, "--check"]) == (rest, 4)
    for bad in ("x.toml", "0", "1.5"):
        with pytest.raises(ValueError, match=f"--check {bad}: give the number of processes"):
            check_option(["--check", bad])
