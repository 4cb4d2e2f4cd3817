"""Weights that `transformers` wrote train here, and it reads what a run saves: the losses and logits are its own."""

import copy
import dataclasses
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401, I001

import numpy as np
import pytest
import torch
import transformers
from launch import launch, read_scalars, run, write_config
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs
from torchtitan.models.gpt_oss import GptOssModelArgs
from torchtitan.models.llama3 import TransformerModelArgs as Llama3ModelArgs
from torchtitan.models.llama4 import TransformerModelArgs as Llama4ModelArgs
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.protocols.train_spec import get_train_spec

from titan_attent.data.text.writer import write_dataset

SEQ_LEN, WINDOWS, VOCABULARY = 32, 4, 320
FLAVOR = "from_transformers"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SCALED_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
SCALED_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHARED = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}
OURS: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "rope_theta": 10000.0}
EXPERTS = MoEArgs(num_experts=4, num_shared_experts=0, top_k=2, score_func="softmax", route_norm=True)
EXPERTS.score_before_experts, EXPERTS.load_balance_coeff = False, None
EXPERTS.use_grouped_mm = False  # which computes in bfloat16


def llama3() -> tuple[Any, Any]:
    """torchtitan's llama3 has the rotary scaling of Llama 3.1."""
    ours = Llama3ModelArgs(n_kv_heads=2, multiple_of=32, **OURS)
    config = transformers.LlamaConfig(intermediate_size=96, rms_norm_eps=1e-5, rope_parameters=SCALED_ROPE, **SHARED)
    return ours, transformers.LlamaForCausalLM(config)


def qwen3() -> tuple[Any, Any]:
    ours = Qwen3ModelArgs(n_kv_heads=2, head_dim=8, hidden_dim=48, enable_weight_tying=True, **OURS)
    sizes = SHARED | {"intermediate_size": 48, "head_dim": 8, "tie_word_embeddings": True}
    return ours, transformers.Qwen3ForCausalLM(transformers.Qwen3Config(rope_parameters=ROPE, **sizes))


def qwen3_experts() -> tuple[Any, Any]:
    sizes = OURS | {"n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48, "moe_inter_dim": 16}
    ours = Qwen3ModelArgs(moe_enabled=True, moe_args=EXPERTS, **sizes)
    sizes = SHARED | {"intermediate_size": 48, "head_dim": 8, "moe_intermediate_size": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(rope_parameters=ROPE, **experts, **sizes)
    return ours, transformers.Qwen3MoeForCausalLM(config)


def deepseek_v3() -> tuple[Any, Any]:
    """With a bias of the routing, which the format has; torchtitan's last norm has an epsilon of its own."""
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    routing = {"num_shared_experts": 1, "score_func": "sigmoid", "route_scale": 2.5, "load_balance_coeff": 1e-3}
    groups = {"num_expert_groups": 2, "num_limited_groups": 1}
    experts = dataclasses.replace(EXPERTS, **routing, **groups)
    sizes = {"inter_dim": 48, "moe_inter_dim": 16, "n_dense_layers": 1, "norm_eps": 1e-6}
    ours = DeepSeekV3ModelArgs(moe_args=experts, **sizes, **heads, **OURS)
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6}
    routing = {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    routing |= {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
    shared = SHARED | {"num_key_value_heads": 4}
    config = transformers.DeepseekV3Config(rope_parameters=ROPE, **sizes, **routing, **heads, **shared)
    return ours, transformers.DeepseekV3ForCausalLM(config)


def llama4(interleaved: int = 1) -> tuple[Any, Any]:
    """The language model, without what torchtitan's lacks: norms of queries and keys, and layers without positions."""
    experts = MoEArgs(num_experts=4, load_balance_coeff=None, use_grouped_mm=False)
    sizes = {"n_kv_heads": 2, "multiple_of": 32, "interleave_moe_layer_step": interleaved}
    ours = Llama4ModelArgs(moe_args=experts, **sizes, **OURS)
    text = SHARED | {"intermediate_size": 64, "intermediate_size_mlp": 96, "head_dim": 8, "num_local_experts": 4}
    text |= {"use_qk_norm": False, "no_rope_layers": [1, 1], "attn_temperature_tuning": False}
    text |= {"interleave_moe_layer_step": interleaved, "rope_parameters": ROPE}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    return ours, transformers.Llama4ForConditionalGeneration(config)


def gpt_oss() -> tuple[Any, Any]:
    experts = dataclasses.replace(EXPERTS, gate_bias=True)
    sizes = OURS | {"n_kv_heads": 2, "head_dim": 8, "moe_inter_dim": 32}
    ours = GptOssModelArgs(moe_args=experts, **sizes)
    sizes = SHARED | {"intermediate_size": 32, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return ours, transformers.GptOssForCausalLM(transformers.GptOssConfig(rope_parameters=ROPE, **sizes))


CASES: dict[str, tuple[str, Callable[[], tuple[Any, Any]]]] = {
    "llama3": ("llama3", llama3),
    "qwen3": ("qwen3", qwen3),
    "qwen3 with experts": ("qwen3", qwen3_experts),
    "deepseek_v3": ("deepseek_v3", deepseek_v3),
    "llama4": ("llama4", llama4),
}

ON_TWO_RANKS, SHARDED = ("qwen3 with experts", "llama4"), 2
"""Those whose experts are split, joined or transposed: there they are sharded as well."""


def add_flavor(family: str, args: Any) -> None:
    """In a worker: one more flavor of torchtitan's ``family``."""
    get_train_spec(family).model_args[FLAVOR] = args  # type: ignore[index]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All windows are one batch: so the loss of the first step is that of all of them."""
    root = tmp_path_factory.mktemp("transformers")
    (root / "text.txt").write_text("Every window of this text is in the only batch. " * 12)
    write_dataset([root / "text.txt"], output=root / "data", tokenizer="train:300")
    tokens = np.fromfile(root / "data" / "shard-00000.bin", dtype="<u2")
    assert WINDOWS * SEQ_LEN < len(tokens) <= (WINDOWS + 1) * SEQ_LEN, len(tokens)
    return root / "data"


def windows(data: Path) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(np.fromfile(data / "shard-00000.bin", dtype="<u2").astype(np.int64))
    stop = WINDOWS * SEQ_LEN
    return tokens[:stop].view(WINDOWS, SEQ_LEN), tokens[1 : stop + 1].view(WINDOWS, SEQ_LEN)


def written(folder: Path, make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """A model of `transformers`, saved in ``folder``, and torchtitan's arguments of it."""
    torch.manual_seed(0)
    args, model = make()
    for weight in model.parameters():  # norms and biases, too
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return args, model.eval()


@torch.no_grad()
def their_logits(model: Any, tokens: Tensor) -> Tensor:
    if hasattr(model, "vision_model"):
        model = model.language_model
    if isinstance(model, transformers.DeepseekV3ForCausalLM):
        model.model.norm.variance_epsilon = torch.finfo(torch.float32).eps
    return model(tokens).logits


@torch.no_grad()
def our_logits(family: str, args: Any, folder: Path, tokens: Tensor) -> Tensor:
    """torchtitan's model of the weights in ``folder``."""
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    spec, args = get_train_spec(family), copy.deepcopy(args)
    args.moe_impl, args.max_seq_len = "standard", 64
    model = spec.model_cls(args)
    model.init_weights(buffer_device=torch.device("cpu"))
    assert spec.state_dict_adapter is not None
    found = model.load_state_dict(spec.state_dict_adapter(args, None).from_hf(stored), strict=False)
    assert not [name for name in found.missing_keys if not name.endswith("expert_bias")]
    return model(tokens)


def options(folder: Path, data: Path, *, family: str, name: str) -> list[str]:
    config = write_config(folder, data={"train": data, "validation": data}, dump=folder / "run", flavor=FLAVOR)
    return [
        *("--job.config_file", str(config), "--model.name", f"{family}_attent", "--teacher.strategy", "uniform"),
        *("--training.seq_len", str(SEQ_LEN), "--validation.seq_len", str(SEQ_LEN), "--training.steps", "1"),
        *("--training.global_batch_size", str(WINDOWS), "--training.local_batch_size", str(WINDOWS // SHARDED)),
        *("--lr_scheduler.warmup_steps", "0"),
        *("--validation.enable", "--validation.freq", "1", "--validation.steps", "-1"),
        *("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path"),
        *(str(folder / name), "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"),
    ]


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, data: Path, tmp_path: Path) -> None:
    """The first loss is that of the weights of `transformers`, the last that of the weights it reads back."""
    family, make = CASES[case]
    args, model = written(tmp_path / "hf", make)
    prepare = partial(add_flavor, family, args)
    run(
        *options(tmp_path, data, family=family, name="hf"),
        num_processes=SHARDED if case in ON_TWO_RANKS else 1,
        prepare=prepare,
    )
    saved = tmp_path / "run" / "checkpoint" / "step-1"
    shutil.copy(tmp_path / "hf" / "config.json", saved)
    again = type(model).from_pretrained(saved).eval()
    inputs, labels = windows(data)
    dump, logits = tmp_path / "run", []
    for folder, one, tag in (
        (tmp_path / "hf", model, "loss_metrics/global_avg_loss"),
        (saved, again, "validation_metrics/loss"),
    ):
        logits.append(their_logits(one, inputs))
        torch.testing.assert_close(our_logits(family, args, folder, inputs), logits[-1], rtol=0, atol=1e-5)
        loss = F.cross_entropy(logits[-1].flatten(0, 1), labels.flatten()).item()
        assert read_scalars(dump, tag)[1] == pytest.approx(loss, abs=1e-5), tag
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "the run trained nothing"


@pytest.mark.parametrize(
    ("family", "make", "message"),
    [
        ("llama4", partial(llama4, 2), r"conversion of llama4_attent leaves out layers\.0\.feed_forward\.w1\.weight"),
        ("gpt_oss", gpt_oss, r"layers\.0\.mlp\.experts\.down_proj in floating point: .* from MXFP4 files alone"),
    ],
)
def test_what_torchtitans_conversion_lacks_is_refused(
    family: str, make: Callable[[], tuple[Any, Any]], message: str, data: Path, tmp_path: Path
) -> None:
    args, _ = written(tmp_path / "hf", make)
    arguments = options(tmp_path, data, family=family, name="hf")
    result = launch(*arguments, num_processes=1, prepare=partial(add_flavor, family, args))
    assert result.returncode != 0
    [line] = [line for line in result.stderr.splitlines() if "titan_attent: error: " in line]
    assert re.search(message, line), line
