import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from token_files import write_ranks

from titan_attent.data.adopt import adopt


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank file of 1,000 tokens; the id of its eos is 1000."""
    return write_ranks(tmp_path_factory.mktemp("ranks") / "small.tiktoken", num_ranks=1000)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank file of the size of GPT-2's; the id of its eos is 50256."""
    return write_ranks(tmp_path_factory.mktemp("ranks") / "gpt2.tiktoken", num_ranks=50256)


@pytest.fixture(scope="session", autouse=True)
def tokenizers_are_loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adopt, "load_tokenizer", functools.cache(adopt.load_tokenizer))
        yield
