"""Folders of safetensors are operands under torchtitan's names, converted by its adapter, box by box."""

import hashlib
import json
import re
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchtitan.models.llama3 import Transformer
from unit.edit.made import files_of, load, save

from titan_attent.edit import boxes as boxes_module
from titan_attent.edit.boxes import boxes
from titan_attent.edit.command import main
from titan_attent.edit.hugging_face import HuggingFaceCheckpoint
from titan_attent.edit.options import open_all
from titan_attent.titan.models.flavors import EXTRA_FLAVORS
from titan_attent.titan.train_spec import attent_spec

HEADS = 4
OF_LLAMA = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
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
MODEL = "--family llama3 --flavor bench"


def to_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A llama under Hugging Face's names: it rotates the halves of a head, where torchtitan rotates neighbours."""
    converted = {}
    for name, weight in weights.items():
        block = re.fullmatch(r"layers\.(\d+)\.(.*)\.weight", name)
        stem = block[2] if block else name.removesuffix(".weight")
        if stem in ("attention.wq", "attention.wk"):
            heads = weight.view(HEADS, -1, weight.shape[1])
            weight = torch.cat([torch.cat([head[0::2], head[1::2]]) for head in heads])
        prefix = f"model.layers.{block[1]}." if block else ""
        converted[f"{prefix}{OF_LLAMA[stem]}.weight"] = weight.contiguous()
    return converted


def llama(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(EXTRA_FLAVORS["llama3"]["bench"])
    return {name: torch.randn(weight.shape) for name, weight in model.state_dict().items()}


def write(folder: Path, weights: dict[str, Tensor]) -> Path:
    """In two files, as large models are."""
    folder.mkdir()
    names = list(weights)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors")
    return folder


def test_a_llama_is_added_to_a_dcp_checkpoint(tmp_path: Path) -> None:
    base, tuned = llama(1), llama(2)
    save(tmp_path / "base", base)
    write(tmp_path / "hf", to_hugging_face(tuned))
    words = [str(tmp_path / "base"), "+", "0.5", str(tmp_path / "hf"), "--output", str(tmp_path / "out")]
    assert main([*words, *MODEL.split()]) == 0
    result = load(tmp_path / "out")
    for name, weight in base.items():
        torch.testing.assert_close(result[name], weight + 0.5 * (tuned[name] - weight), msg=name)


def test_a_conversion_is_the_same_bytes_as_an_edit_of_the_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted weights of several boxes too, of which each is written alone."""
    monkeypatch.setattr(boxes_module, "ELEMENTS", 5000)
    weights = llama(1)
    assert weights["layers.0.attention.wq.weight"].numel() > 5000
    base, hf = save(tmp_path / "base", weights), write(tmp_path / "hf", to_hugging_face(weights))
    for words, name in (([str(base)], "from_dcp"), ([str(hf), *MODEL.split()], "from_hf")):
        assert main([*words, "--output", str(tmp_path / name)]) == 0
    files, expected = files_of(tmp_path / "from_hf"), files_of(tmp_path / "from_dcp")
    assert [name for name in expected if files[name] != expected[name]] == ["edit.json"]


def test_its_tokenizer_is_compared_with_that_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the run's data was written with a ``tokenizer.json``; the ranks of tiktoken have another hash."""
    hf = write(tmp_path / "hf", to_hugging_face(llama(2)))
    (hf / "tokenizer.json").write_text("{}")
    own = hashlib.sha256(b"{}").hexdigest()[:8]
    for number, (recorded, code, message) in enumerate(
        (
            (f"tokenizer.json, 512 ids, {own}", 0, ""),
            ("tokenizer.json, 512 ids, bbbb0000", 2, f"with the tokenizer tokenizer.json bbbb0000, and {hf} with"),
            ("trained, 512 ids, bbbb0000", 0, f"tokenizers are not compared: {hf} recorded none"),
        )
    ):
        run = tmp_path / f"run{number}"
        save(run / "checkpoint" / "step-1", llama(1))
        (run / "teacher").mkdir()
        (run / "teacher" / "data.json").write_text(json.dumps({"measured": {"tokenizer": recorded}}))
        words = [str(run / "checkpoint" / "step-1"), "+", str(hf), "--output", str(run / "out"), *MODEL.split()]
        assert main(words) == code
        assert message in capsys.readouterr().err


def tiny_qwen(num_experts: int = 0) -> dict[str, Tensor]:
    """The weights of a layer with names of its own: the adapter does not look at sizes."""
    of_layer = {"attention.wq.weight": (8, 4), "attention.q_norm.weight": (2,), "ffn_norm.weight": (4,)}
    if num_experts:
        of_layer |= {"moe.experts.w1": (num_experts, 6, 4), "moe.router.gate.weight": (num_experts, 4)}
    weights = {f"layers.{i}.{name}": torch.randn(shape) for i in range(2) for name, shape in of_layer.items()}
    return weights | {"tok_embeddings.weight": torch.randn(9, 4), "norm.weight": torch.randn(4)}


@pytest.mark.parametrize("flavor", ["0.6B", "debugmodel_moe"])
def test_tied_embeddings_and_experts(flavor: str, tmp_path: Path) -> None:
    """An output that is not in the files is the embeddings; experts are one weight in torchtitan, many in the files."""
    spec = attent_spec("qwen3_attent")
    args = spec.model_args[flavor]
    is_moe = "moe" in flavor
    weights = tiny_qwen(args.moe_args.num_experts if is_moe else 0)  # type: ignore[attr-defined]
    weights["output.weight"] = weights["tok_embeddings.weight"] if not is_moe else torch.randn(9, 4)
    assert spec.state_dict_adapter is not None
    stored = spec.state_dict_adapter(args, None).to_hf(dict(weights))
    write(tmp_path / "hf", {name: weight.contiguous() for name, weight in stored.items()})
    checkpoint = HuggingFaceCheckpoint(str(tmp_path / "hf"), family="qwen3", flavor=flavor)
    assert set(checkpoint.weights) == set(weights)
    for name, weight in weights.items():
        parts = [checkpoint.read(name, box).flatten() for box in boxes(weight.shape, 20)]
        assert torch.equal(torch.cat(parts), weight.flatten()), name


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "name its model, such as --family llama3 --flavor 8B"),
        ("--family lama3 --flavor 8B", 'did you mean "llama3"'),
        ("--family llama3 --flavor 9B", "--flavor 9B is none of llama3"),
        ("--family vit --flavor tiny", "vit has no Hugging Face format in torchtitan"),
        ("--family deepseek_v3 --flavor 16B", "does not hold the weights of deepseek_v3 16B"),
    ],
)
def test_mistakes_are_one_error(model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "hf", {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)})
    assert main([str(tmp_path / "hf"), "--output", str(tmp_path / "out"), *model.split()]) == 2
    assert message in capsys.readouterr().err


def test_quantized_and_damaged_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = to_hugging_face(llama(1))
    write(tmp_path / "fp8", weights | {"lm_head.weight": weights["lm_head.weight"].to(torch.float8_e4m3fn)})
    assert main([str(tmp_path / "fp8"), "--output", str(tmp_path / "out"), *MODEL.split()]) == 2
    assert "lm_head.weight is F8_E4M3: quantized weights cannot be combined" in capsys.readouterr().err
    write(tmp_path / "cut", weights)
    file = tmp_path / "cut" / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert main([str(tmp_path / "cut"), "--output", str(tmp_path / "out"), *MODEL.split()]) == 2
    assert "model-1.safetensors does not hold all of" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_told_before_a_family_that_nothing_needs(tmp_path: Path) -> None:
    there = str(save(tmp_path / "there", {"weight": torch.ones(2)}))
    with pytest.raises(ValueError, match="nowhere"):
        open_all([there, str(tmp_path / "nowhere")], family="llama3", flavor="bench")
    with pytest.raises(ValueError, match="--family and --flavor are for folders"):
        open_all([there], family="llama3", flavor="bench")
