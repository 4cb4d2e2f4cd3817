"""Several validation sets with names and weights, and bits per byte that compare between tokenizers."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401, I001

import json_tokenizers
import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.tools.logging import logger

from titan_attent.data.text.any_tokenizer import Tokenizer
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.data.text.tiktoken_tokenizer import TiktokenTokenizer
from titan_attent.data.text.token_bytes import token_bytes, token_bytes_of
from titan_attent.data.text.tokenizer import open_tokenizer
from titan_attent.data.text.writer import write_dataset
from titan_attent.data.validation_sets import ValidationSet, validation_sets
from titan_attent.job_config import JobConfig as OurSections
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.measured_sets import sample
from titan_attent.titan.metrics import TeachingMetricsProcessor
from titan_attent.titan.models.text import Text
from titan_attent.titan.settings import with_validation_set
from titan_attent.titan.validator import build_validator

SEQ_LEN = 64
TEXTS = ["def f(x):\n    return x + 1\n" * 9, "Überall grüßen Vögel. " * 20, "data = [1, 2, 3]\n" * 30, "≤ 10 €\n" * 25]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One text with two tokenizers, ``small`` and ``large``, and a part of it, ``part``, with masked prompts.

    And the text with each kind of ``tokenizer.json``.
    """
    root = tmp_path_factory.mktemp("sets")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    rows = [{"prompt": text[:30], "completion": text[30:]} for text in TEXTS[:2]]
    (root / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, size in (("small", 270), ("large", 400)):
        write_dataset([f"text={root / 'text.jsonl'}"], output=root / name, tokenizer=f"train:{size}")
    for name, eos in json_tokenizers.EOS.items():
        trained = json_tokenizers.train(name, TEXTS, vocab_size=330)
        folder = json_tokenizers.write(root / "tokenizers" / name, trained, eos=eos)
        write_dataset([f"text={root / 'text.jsonl'}"], output=root / name, tokenizer=str(folder))
    keys = {"prompt_key": "prompt", "completion_key": "completion"}
    tokenizer = str(root / "small" / "tokenizer.tiktoken")
    write_dataset([root / "part.jsonl"], output=root / "part", tokenizer=tokenizer, **keys)
    return root


def config_of(data: Path, **sets: Any) -> Any:
    config: Any = ConfigManager._merge_configs(JobConfig, OurSections)()
    config.model.name, config.model.flavor = "llama3_attent", "any"
    config.data.path = str(data)
    config.data.validation_sets = sets
    config.data.num_workers = 0
    config.validation.enable, config.validation.steps = True, -1
    config.validation.seq_len = config.training.seq_len = SEQ_LEN
    config.validation.local_batch_size = 3
    return config


class Echo(nn.Module):
    """A model whose logits are its inputs: the loss alone decides."""

    model_args = SimpleNamespace()

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def logged_by(config: Any, model: nn.Module, loss: Any) -> dict[str, float]:
    """What a validation logs."""
    dims: Any = SimpleNamespace(get_optional_mesh=lambda name: None, pp_enabled=False, cp_enabled=False, tp=1, cp=1)
    logged: dict[str, float] = {}
    with mock.patch.object(TeachingMetricsProcessor, "__init__", lambda self: None):
        processor: Any = TeachingMetricsProcessor()
    processor.parallel_dims, processor.job_config, processor.tokens_per_image = dims, config, None
    processor.device_memory_monitor, processor.color = mock.MagicMock(), mock.MagicMock()
    names = (
        "max_active_gib",
        "max_active_pct",
        "max_reserved_gib",
        "max_reserved_pct",
        "num_alloc_retries",
        "num_ooms",
    )
    processor.device_memory_monitor.get_peak_stats.return_value = SimpleNamespace(**dict.fromkeys(names, 0.0))
    processor.time_last_log, processor.ntokens_since_last_log = 0.0, 0
    processor.parallel_dims.non_data_parallel_size = 1
    processor.logger = SimpleNamespace(log=lambda metrics, step: logged.update(metrics))
    validator = build_validator(
        DataSets(),
        {"any": SimpleNamespace()},  # type: ignore[dict-item]
        config,
        1,
        0,
        None,
        dims,
        loss,
        nullcontext,  # type: ignore[arg-type]
        nullcontext(),
        processor,
    )
    validator.validate([model], step=1)
    return {
        tag.removeprefix("validation_metrics/"): value
        for tag, value in logged.items()
        if "memory" not in tag and "throughput" not in tag
    }


def text_bytes(tokenizer: Tokenizer, labels: list[int]) -> int:
    """The bytes of labels by decoding them; an eos is one."""
    if not isinstance(tokenizer, TiktokenTokenizer):
        return json_bytes(Path(tokenizer._where), labels, eos_id=tokenizer.eos_id)
    text = b"".join(tokenizer._encoding.decode_bytes([label]) for label in labels if label != tokenizer.eos_id)
    return len(text) + labels.count(tokenizer.eos_id)


def json_bytes(file: Path, labels: list[int], *, eos_id: int) -> int:
    """The same by the spelling of the tokens in the file: a character is a byte, or its own bytes."""
    library = tokenizers.Tokenizer.from_file(str(file))
    count = len if "ByteLevel" in str(library.decoder) else num_bytes_of_piece
    return sum(1 if label == eos_id else count(library.id_to_token(label)) for label in labels)


def num_bytes_of_piece(piece: str) -> int:
    return 1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())


@pytest.mark.parametrize("unit", ["window", "document"])
def test_a_uniform_model_over_bytes_has_8_bits_per_byte_with_any_tokenizer(data: Path, unit: str) -> None:
    """Its loss is of the text alone, so the value is known; nats per token differ with the tokenizer."""
    per_token = []
    for name in ("small", "large", "byte_level", "unigram"):
        tokenizer = open_tokenizer(TokenShards(data / name).tokenizer_info, data / name)

        def uniform(pred: Tensor, labels: Tensor, tokenizer: Tokenizer = tokenizer) -> Tensor:
            return torch.tensor(math.log(256) * text_bytes(tokenizer, labels[labels != -100].tolist()))

        config = config_of(data / name, whole={"path": str(data / name)})
        config.data.unit = unit
        logged = logged_by(config, Echo(), uniform)
        assert logged["bits_per_byte/whole"] == logged["bits_per_byte"] == pytest.approx(8.0, rel=1e-6)
        per_token.append(logged["loss"])
    assert per_token[0] < 0.9 * per_token[1]
    assert len(set(per_token)) == len(per_token)


def test_no_bits_per_byte_where_a_token_has_no_bytes_of_its_own(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(data / "word_piece", whole={"path": str(data / "word_piece")})
    with caplog.at_level("WARNING", logger=logger.name):
        logged = logged_by(config, Echo(), lambda pred, labels: torch.tensor(1.0))
    assert "loss" in logged and not any("bits_per_byte" in tag for tag in logged)
    assert "word_piece: no bits per byte are logged: its tokens are marked as" in caplog.text


class Bigram(nn.Module):
    """A real model: logits of the next id from the last one, drawn at random."""

    model_args = SimpleNamespace()

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(7)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.table[inputs]


def cross_entropy(pred: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(pred.flatten(0, 1), labels.flatten(), reduction="sum")


def by_hand(dataset: Any, model: Bigram, num: int) -> tuple[float, float]:
    """(nats per token, bits per byte) of the first ``num`` examples of the sample, one token at a time."""
    tokenizer = open_tokenizer(dataset.shards.tokenizer_info, dataset.shards.path)
    table, nats, counted = model.table.detach().double().log_softmax(-1).numpy(), 0.0, list[int]()
    for i in sample(dataset, num_examples=num).ids(torch.arange(min(num, len(dataset)))).tolist():
        batch, labels = dataset.read(torch.tensor([i]))
        for token, label in zip(batch["input"][0].tolist(), labels[0].tolist(), strict=True):
            if label != -100:
                nats -= table[token, label]
                counted.append(label)
    return nats / len(counted), nats / math.log(2) / text_bytes(tokenizer, counted)


@pytest.mark.parametrize(("unit", "steps"), [("window", -1), ("document", -1), ("document", 1)])
def test_every_set_is_measured_as_it_is_alone(data: Path, unit: str, steps: int) -> None:
    """Loss, perplexity and bits per byte of each by hand, with masked labels; the mean by weights; the same sample."""
    paths = {"text": str(data / "small"), "part": str(data / "part")}
    config = config_of(data / "small", text={"path": paths["text"], "weight": 3}, part={"path": paths["part"]})
    config.data.unit, config.validation.steps = unit, steps
    config.training.local_batch_size = 5
    model = Bigram(270)
    logged = logged_by(config, model, cross_entropy)
    found = {}
    for name, path in paths.items():
        kind = DocumentDataset if unit == "document" else TokenDataset
        dataset = kind(path, seq_len=SEQ_LEN)
        found[name] = loss, bits = by_hand(dataset, model, 5 if steps > 0 else len(dataset))
        assert logged[f"loss/{name}"] == pytest.approx(loss, rel=1e-6)
        assert logged[f"perplexity/{name}"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert logged[f"bits_per_byte/{name}"] == pytest.approx(bits, rel=1e-6)
        alone = logged_by(with_validation_set(config, path), model, cross_entropy)
        assert [alone[tag] for tag in ("loss", "bits_per_byte")] == [
            logged[f"{tag}/{name}"] for tag in ("loss", "bits_per_byte")
        ]
        assert set(alone) == {"loss", "perplexity", "bits_per_byte"}
    assert logged["loss"] == pytest.approx((3 * found["text"][0] + found["part"][0]) / 4, rel=1e-6)
    assert logged["bits_per_byte"] == pytest.approx((3 * found["text"][1] + found["part"][1]) / 4, rel=1e-6)
    assert logged["perplexity"] == pytest.approx(math.exp(logged["loss"]))


def test_the_bytes_of_tokens(data: Path) -> None:
    tokenizer = open_tokenizer(TokenShards(data / "large").tokenizer_info, data / "large")
    table = token_bytes(tokenizer)
    assert table[tokenizer.eos_id] == 1 and (table[:256] == 1).all() and len(table) == tokenizer.vocab_size
    for text in TEXTS:
        assert table[tokenizer.encode_to_array(text)].sum() == len(text.encode())
    # All labels of the documents, and their eos; a Metaspace puts a space before each.
    for name, added in (("small", 1), ("byte_level", 1), ("unigram", 2)):
        shards = TokenShards(data / name)
        of_ids = token_bytes_of(shards)
        assert of_ids is not None
        expected = sum(len(text.encode()) + added for text in TEXTS)
        assert of_ids[shards.read(0, shards.num_tokens)].sum() == expected
    found = token_bytes_of(TokenShards(data / "large"))
    assert found is not None and np.array_equal(found, table)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"web": "data/web"}, r"web = 'data/web': write web = { path"),
        ({"web": {}}, r"web: path = '': give the folder"),
        ({"web": {"path": "a", "wieght": 2}}, r'unknown key "wieght"; did you mean "weight"'),
        ({"web": {"path": "a", "weight": -1}}, r"weight = -1: it must be a number at least 0"),
        ({"web": {"path": "a", "weight": 0}}, r"all weights are 0"),
        ({"a/b": {"path": "a"}}, r"'a/b': a name has only letters"),
    ],
)
def test_malformed_sets_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validation_sets(SimpleNamespace(validation_path="", validation_sets=section))


def test_one_set_or_several() -> None:
    assert validation_sets(SimpleNamespace(validation_path="v", validation_sets={})) == (ValidationSet("", "v"),)
    assert validation_sets(SimpleNamespace(validation_path="", validation_sets={})) == ()
    with pytest.raises(ValueError, match=r"validation_path = v beside \[data.validation_sets\]"):
        validation_sets(SimpleNamespace(validation_path="v", validation_sets={"a": {"path": "a"}}))


def test_a_set_of_another_tokenizer_is_refused(data: Path) -> None:
    config = config_of(data / "small", other={"path": str(data / "large")})
    with pytest.raises(ValueError, match="written with another tokenizer"):
        Text().open(DataSets(), with_validation_set(config, str(data / "large")), validation=True)


@pytest.mark.parametrize("validation", [False, True])
def test_windows_warn_of_a_mask_that_they_do_not_read(
    data: Path, caplog: pytest.LogCaptureFixture, validation: bool
) -> None:
    config = config_of(data / "part", part={"path": str(data / "part")})
    config.data.unit, config.data.validation_unit = "document", "document"
    config = with_validation_set(config, str(data / "part"))
    Text().open(DataSets(), config, validation=validation)
    assert "mask" not in caplog.text
    key = "validation_unit" if validation else "unit"
    setattr(config.data, key, "window")
    datasets = DataSets()
    for _ in range(2):
        Text().open(datasets, config, validation=validation)
    assert caplog.text.count("the prompts count, too") == 1 and f'[data] {key} = "document"' in caplog.text


@pytest.mark.parametrize("num", [1, 7, 9, 12, 100])
def test_a_sample_of_inputs_has_all_their_rows(num: int) -> None:
    pool = sample(range(12), num_examples=num, group_size=3)
    ids = pool.ids(torch.arange(pool.size)).view(-1, 3)
    assert pool.size == min(12, max(3, num // 3 * 3)) and len(set(ids.flatten().tolist())) == pool.size
    assert (ids == ids[:, :1] // 3 * 3 + torch.arange(3)).all()
