"""Changes one of torchtitan's keys in the quickstart's configuration: the run passes, or is refused with the fix."""

import copy
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat as compat

import pytest
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.titan.checks import preflight
from titan_attent.titan.checks.value_checks import check_flavor
from titan_attent.titan.train_spec import attent_spec

QUICKSTART = Path(__file__).parents[3] / "train_configs" / "quickstart.toml"
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def spec() -> TrainSpec:
    return attent_spec("llama3_attent")


@pytest.fixture(scope="module")
def quickstart(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    config = ConfigManager().parse_args(
        [
            *("--job.config_file", str(QUICKSTART), "--job.dump_folder", str(tmp_path_factory.mktemp("run"))),
            *("--data.path", str(token_data["train"]), "--data.validation_path", str(token_data["validation"])),
            # Another size, and without the scorers that the script makes.
            *("--model.flavor", "tiny", "--training.steps", "300"),
            *("--teacher.strategy", "hard", "--teacher.scores", "", "--data.unit", "window"),
            *("--training.global_batch_size", "16", "--training.seq_len", "128"),
            *("--validation.local_batch_size", "16", "--validation.seq_len", "128"),
            *("--teacher.importance", "loss", "--teacher.ratio_schedule", "incremental"),
        ]
    )
    return config


def check(quickstart: JobConfig, spec: TrainSpec, values: dict[str, Any], *, world_size: int) -> None:
    config = copy.deepcopy(quickstart)
    config.training.local_batch_size = 16 // world_size
    for path, value in values.items():
        section, _, key = path.partition(".")
        assert hasattr(getattr(config, section), key), path
        setattr(getattr(config, section), key, value)
    preflight.check_run(config, spec, world_size=world_size)


GRANTED: list[dict[str, Any]] = [
    {},
    {"training.steps": 1},
    {"training.steps": 0},
    {"training.local_batch_size": 2},
    {"training.global_batch_size": -1},
    {"training.global_batch_size": 32},
    {"training.seq_len": 256},
    {"training.max_norm": 5},
    {"training.max_norm": INF},
    {"training.gc_freq": 1},
    {"training.dtype": "bfloat16"},
    {"training.mixed_precision_param": "float32"},
    {"validation.local_batch_size": 3},
    {"validation.local_batch_size": 1000},
    {"validation.seq_len": 64},
    {"validation.seq_len": 7},
    {"validation.freq": 1},
    {"validation.freq": 1000},
    {"validation.steps": 1},
    {"validation.enable": False, "validation.seq_len": 4096, "validation.freq": 0},
    {"checkpoint.interval": 1},
    {"checkpoint.keep_latest_k": 0},
    {"checkpoint.keep_latest_k": 2},
    {"checkpoint.load_step": 0},
    {"checkpoint.async_mode": "async"},
    {"checkpoint.export_dtype": "bfloat16"},
    {"checkpoint.enable": False, "checkpoint.interval": 0},
    {"metrics.log_freq": 1},
    {"optimizer.name": "Adam"},
    {"optimizer.lr": 0.0},
    {"optimizer.weight_decay": 0},
    {"optimizer.implementation": "for-loop"},
    {"lr_scheduler.warmup_steps": 0},
    {"lr_scheduler.warmup_steps": 3000},
    {"lr_scheduler.decay_ratio": 0.0},
    {"lr_scheduler.decay_ratio": 1},
    {"lr_scheduler.decay_type": "sqrt"},
    {"lr_scheduler.min_lr_factor": 0.1},
    {"lr_scheduler.total_steps": 400},
    {"activation_checkpoint.mode": "full"},
    {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    {"activation_checkpoint.selective_ac_option": "no matter"},
    {"compile.enable": True, "compile.backend": "eager"},
    {"compile.enable": True, "compile.components": ["loss"]},
    {"compile.backend": "no matter"},
    {"debug.seed": None},
    {"debug.seed": -1},
    {"model.flavor": "bench"},
    {"model.flavor": "debugmodel_flex_attn"},
    {"comm.trace_buf_size": 0},
]


@pytest.mark.parametrize("values", GRANTED, ids=str)
def test_granted(quickstart: JobConfig, spec: TrainSpec, values: dict[str, Any]) -> None:
    for world_size in (1, 2):
        check(quickstart, spec, values, world_size=world_size)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"training.steps": -1}, r"\[training\] steps = -1: it must be a whole number at least 0"),
    ({"training.steps": "300"}, r"\[training\] steps = '300': it must be a whole number"),
    ({"training.steps": 1.5}, r"\[training\] steps = 1.5: it must be a whole number"),
    ({"training.local_batch_size": 0}, r"\[training\] local_batch_size = 0: .* at least 1"),
    ({"training.local_batch_size": -1}, r"\[training\] local_batch_size = -1: .* at least 1"),
    ({"training.local_batch_size": 3}, "global_batch_size = 16 must be a multiple of local_batch_size"),
    ({"training.global_batch_size": 0}, r"\[training\] global_batch_size = 0: .* or -1 for local_batch_size x"),
    ({"training.global_batch_size": -5}, r"\[training\] global_batch_size = -5"),
    ({"training.global_batch_size": 17}, "global_batch_size = 17 must be a multiple"),
    ({"training.seq_len": 64}, r"\[validation\] seq_len = 128 is above .* = 64, .* give --validation.seq_len 64"),
    ({"training.seq_len": 0}, r"\[training\] seq_len = 0: it must be a whole number at least 1"),
    ({"training.seq_len": 129}, r"\[training\] seq_len = 129 must be a multiple"),
    ({"training.max_norm": 0}, r"\[training\] max_norm = 0: it must be a number above 0"),
    ({"training.max_norm": NAN}, r"\[training\] max_norm = nan"),
    ({"training.gc_freq": 0}, r"\[training\] gc_freq = 0: .* at least 1"),
    ({"training.dtype": "float16"}, r"\[training\] dtype = 'float16' is unknown: use one of \"bfloat16\", \"float32\""),
    ({"training.mixed_precision_param": "bf16"}, r"mixed_precision_param = 'bf16' is unknown"),
    ({"training.mixed_precision_reduce": "bfloat16"}, r"mixed_precision_reduce = 'bfloat16' is unknown"),
    ({"training.enable_cpu_offload": "yes"}, r"enable_cpu_offload = 'yes': it must be true or false"),
    ({"validation.local_batch_size": 0}, r"\[validation\] local_batch_size = 0: .* at least 1"),
    ({"validation.local_batch_size": -1}, r"\[validation\] local_batch_size = -1"),
    ({"validation.seq_len": 0}, r"\[validation\] seq_len = 0"),
    ({"validation.seq_len": 256}, r"\[validation\] seq_len = 256 is above \[training\] seq_len = 128"),
    ({"validation.freq": 0}, r"\[validation\] freq = 0: .* at least 1"),
    ({"validation.freq": -1}, r"\[validation\] freq = -1"),
    ({"checkpoint.interval": 0}, r"\[checkpoint\] interval = 0: .* at least 1"),
    ({"checkpoint.interval": -1}, r"\[checkpoint\] interval = -1"),
    ({"checkpoint.keep_latest_k": 1}, r"\[checkpoint\] keep_latest_k = 1: .* 2 or more, or to 0"),
    ({"checkpoint.keep_latest_k": -1}, r"\[checkpoint\] keep_latest_k = -1"),
    ({"checkpoint.load_step": -2}, r"\[checkpoint\] load_step = -2: .* at least -1"),
    ({"checkpoint.async_mode": "pinned"}, r"\[checkpoint\] async_mode = 'pinned' is unknown"),
    ({"checkpoint.last_save_in_hf": True}, "Set last_save_model_only = true"),
    ({"checkpoint.initial_load_path": "/nowhere"}, r"initial_load_path = /nowhere does not exist"),
    ({"metrics.log_freq": 0}, r"\[metrics\] log_freq = 0: .* at least 1"),
    ({"metrics.log_freq": -1}, r"\[metrics\] log_freq = -1"),
    ({"metrics.log_freq": True}, r"\[metrics\] log_freq = True"),
    ({"optimizer.name": "SGD"}, r"\[optimizer\] name = 'SGD' is unknown: use one of \"Adam\", \"AdamW\""),
    ({"optimizer.name": "adamw"}, r"\[optimizer\] name = 'adamw' is unknown"),
    ({"optimizer.lr": -1.0}, r"\[optimizer\] lr = -1.0: it must be a number at least 0"),
    ({"optimizer.lr": NAN}, r"\[optimizer\] lr = nan"),
    ({"optimizer.beta1": 1.0}, r"\[optimizer\] beta1 = 1.0: .* at least 0 and below 1"),
    ({"optimizer.beta2": -0.1}, r"\[optimizer\] beta2 = -0.1"),
    ({"optimizer.eps": -1.0}, r"\[optimizer\] eps = -1.0"),
    ({"optimizer.weight_decay": -1.0}, r"\[optimizer\] weight_decay = -1.0"),
    ({"optimizer.implementation": "slow"}, r"\[optimizer\] implementation = 'slow' is unknown"),
    ({"lr_scheduler.warmup_steps": -1}, r"\[lr_scheduler\] warmup_steps = -1"),
    ({"lr_scheduler.decay_ratio": 1.5}, r"\[lr_scheduler\] decay_ratio = 1.5: .* at least 0 and at most 1"),
    ({"lr_scheduler.decay_ratio": -0.5}, r"\[lr_scheduler\] decay_ratio = -0.5"),
    ({"lr_scheduler.decay_type": "exp"}, r"\[lr_scheduler\] decay_type = 'exp' is unknown"),
    ({"lr_scheduler.min_lr_factor": 2.0}, r"\[lr_scheduler\] min_lr_factor = 2.0"),
    ({"lr_scheduler.total_steps": 200}, r"total_steps = 200 is below \[training\] steps = 300"),
    ({"lr_scheduler.total_steps": 0}, r"total_steps = 0 is below"),
    ({"activation_checkpoint.mode": "half"}, r"\[activation_checkpoint\] mode = 'half' is unknown"),
    ({"activation_checkpoint.mode": "memory_budget"}, "needs a compiled model"),
    (
        {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "ops"},
        r'selective_ac_option = "ops": it must be "op" or',
    ),
    ({"compile.enable": True, "compile.backend": "inducter"}, 'backend = .* did you mean "inductor"'),
    ({"compile.enable": True, "compile.components": ["optimizer"]}, r"\[compile\] components = 'optimizer' is unknown"),
    ({"debug.seed": 2**70}, r"\[debug\] seed = "),
    ({"model.flavor": "huge"}, 'flavor = "huge" is unknown'),
    ({"model.converters": ["flote8"]}, r'\[model\] converters: "flote8" is unknown'),
    ({"job.dump_folder": "/dev/null/run"}, r"\[job\] dump_folder = /dev/null/run: /dev/null cannot be written to"),
    ({"comm.init_timeout_seconds": 0}, r"\[comm\] init_timeout_seconds = 0"),
    ({"comm.train_timeout_seconds": -1}, r"\[comm\] train_timeout_seconds = -1"),
    ({"comm.mode": "fake_backend"}, r'\[comm\] mode = "fake_backend"'),
    ({"parallelism.data_parallel_replicate_degree": 0}, "replicate_degree = 0: it must be at least 1"),
    ({"parallelism.tensor_parallel_degree": 3}, "tensor_parallel_degree 3 .* must be the number of processes"),
    ({"parallelism.expert_tensor_parallel_degree": 2}, "expert_tensor_parallel_degree = 2 must be 1 or"),
    ({"profiling.enable_profiling": True, "profiling.profile_freq": 0}, r"\[profiling\]"),
    ({"data.num_workers": -1}, r"\[data\] num_workers = -1"),
    ({"data.num_workers": "two"}, r"\[data\] num_workers = 'two': it must be a whole number"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=str)
def test_refused(quickstart: JobConfig, spec: TrainSpec, values: dict[str, Any], message: str) -> None:
    for world_size in (1, 2):
        with pytest.raises(ValueError, match=message):
            check(quickstart, spec, values, world_size=world_size)


def test_degrees_that_the_model_cannot_be_split_by(quickstart: JobConfig, spec: TrainSpec) -> None:
    """The tiny flavor has 6 heads and 4 layers."""
    shapes = {"validation.local_batch_size": 4, "validation.seq_len": 128}
    check(quickstart, spec, {"parallelism.tensor_parallel_degree": 2}, world_size=4)
    with pytest.raises(ValueError, match="tensor_parallel_degree = 4 must divide n_heads = 6 of flavor tiny"):
        check(quickstart, spec, {"parallelism.tensor_parallel_degree": 4}, world_size=4)
    check(quickstart, spec, shapes | {"parallelism.pipeline_parallel_degree": 4}, world_size=4)
    with pytest.raises(ValueError, match="pipeline_parallel_degree = 8 with the 4 layers of flavor tiny: "):
        values = {"validation.local_batch_size": 2, "parallelism.pipeline_parallel_degree": 8}
        check(quickstart, spec, values, world_size=8)
    with pytest.raises(ValueError, match=r"\[validation\] seq_len = 126 must be a multiple of .* = 4"):
        values = {"validation.seq_len": 126, "parallelism.context_parallel_degree": 2}
        check(quickstart, spec, values, world_size=2)


ON_CPU: list[tuple[dict[str, Any], str]] = [
    ({"checkpoint.async_mode": "async_with_pinned_mem"}, 'no accelerator to copy from. Set it to "async"'),
    ({"profiling.enable_profiling": True}, "enable_profiling = true: torchtitan profiles accelerators only"),
    ({"profiling.enable_memory_snapshot": True}, "enable_memory_snapshot = true"),
    ({"model.flavor": "debugmodel_varlen_attn"}, r"its attention \(varlen\) runs on GPUs only"),
]


@pytest.mark.parametrize(("values", "message"), ON_CPU, ids=str)
def test_refused_without_an_accelerator_only(
    quickstart: JobConfig, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(compat, "IS_CPU", True)
    with pytest.raises(ValueError, match=message):
        check(quickstart, spec, values, world_size=2)
    monkeypatch.setattr(compat, "IS_CPU", False)
    check(quickstart, spec, values, world_size=2)


def test_the_seed_checkpoint_of_a_run_without_one(quickstart: JobConfig, spec: TrainSpec, tmp_path: Path) -> None:
    values = {"job.dump_folder": str(tmp_path), "checkpoint.load_step": 0}
    check(quickstart, spec, values, world_size=1)
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match="load_step = 0 asks for the seed checkpoint .*step-0, which does not exist"):
        check(quickstart, spec, values, world_size=1)


def test_a_seed_checkpoint_takes_one_process(
    quickstart: JobConfig, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"checkpoint.create_seed_checkpoint": True}
    for world_size in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        if world_size == 1:
            check(quickstart, spec, values, world_size=world_size)
            continue
        with pytest.raises(ValueError, match="create_seed_checkpoint = true: start it with one process"):
            check(quickstart, spec, values, world_size=world_size)


def test_a_flavor_of_another_model_than_the_runs_is_not_blamed_on_the_runs_key(spec: TrainSpec) -> None:
    with pytest.raises(ValueError, match='^its flavor = "huge" is unknown to llama3_attent'):
        check_flavor(spec, model="llama3_attent", flavor="huge", key="its flavor")
