"""Training starts from weights in Hugging Face's format, which this test writes by hand, and ends in that format."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from launch import launch, read_weights, run, write_config
from safetensors.torch import load_file

from titan_attent.titan.checkpoint_metadata import safetensors_shapes

HEADS = 2
OF_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OF_MODEL = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def to_hugging_face(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same llama under Hugging Face's names, with the rows of queries and keys in its order.

    It rotates the halves of a head (i, i + d/2), where torchtitan rotates neighbours (2i, 2i + 1).
    """
    converted = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if match := re.fullmatch(r"layers\.(\d+)\.(.*)", stem):
            stem = f"model.layers.{match[1]}.{OF_BLOCK[match[2]]}"
            if match[2] in ("attention.wq", "attention.wk"):
                heads = weight.view(HEADS, -1, weight.shape[1])
                weight = torch.cat([torch.cat([head[0::2], head[1::2]]) for head in heads])
        else:
            stem = OF_MODEL[stem]
        converted[f"{stem}.weight"] = weight.contiguous()
    return converted


def write_safetensors(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A safetensors file, by its specification: the length of the header, the header, the bytes of the tensors."""
    header, content = {}, b""
    for name, weight in weights.items():
        data = weight.numpy().tobytes()
        offsets = [len(content), len(content) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": offsets}
        content += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


@pytest.fixture(scope="module")
def folder(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps in run/, and its weights in Hugging Face's format in hf/, in two files."""
    folder = tmp_path_factory.mktemp("hugging_face")
    config = write_config(folder, data=token_data, dump=folder / "run")
    run(*arguments(config), "--training.steps", "2", "--checkpoint.enable")
    converted = to_hugging_face(read_weights(folder / "run", step=2))
    (folder / "hf").mkdir()
    names = list(converted)
    for number, part in enumerate((names[:3], names[3:]), 1):
        file = folder / "hf" / f"model-0000{number}-of-00002.safetensors"
        write_safetensors(file, {name: converted[name] for name in part})
    return folder


def arguments(config: Path) -> list[str]:
    return ["--job.config_file", str(config), "--training.seq_len", "32", "--teacher.strategy", "uniform"]


def start(folder: Path, name: str) -> list[str]:
    source = ["--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", str(folder / "hf")]
    return [*arguments(folder / "config.toml"), "--job.dump_folder", str(folder / name), "--checkpoint.enable", *source]


def test_a_run_starts_from_the_weights_and_resumes_from_its_own(folder: Path) -> None:
    assert set(safetensors_shapes(folder / "hf")) == set(to_hugging_face(read_weights(folder / "run", step=2)))
    frozen = ["--optimizer.lr", "0"]
    run(*start(folder, "second"), *frozen, "--training.steps", "1")
    expected, loaded = read_weights(folder / "run", step=2), read_weights(folder / "second", step=1)
    assert expected.keys() == loaded.keys()
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight), name
    last = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    resumed = run(*start(folder, "second"), *frozen, *last, "--training.steps", "2")
    assert f"Loading the checkpoint from {folder / 'second' / 'checkpoint' / 'step-1'}" in resumed
    saved: dict[str, torch.Tensor] = {}
    for file in (folder / "second" / "checkpoint" / "step-2").glob("*.safetensors"):
        saved |= load_file(file)
    converted = to_hugging_face(expected)
    assert saved.keys() == converted.keys()
    assert all(torch.equal(saved[name], converted[name]) for name in saved)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    messages = {
        "tiny": r"hf is of another model: lm_head.weight is \[4096, 192\] here and \[512, 32\] there",
        "scorer_s": r"hf is of another model: .* here and .* there",
    }
    for flavor, message in messages.items():
        result = launch(*start(folder, "third"), "--model.flavor", flavor, num_processes=1)
        assert result.returncode != 0
        assert re.search("titan_attent: error: .*" + message, result.stderr), result.stderr
