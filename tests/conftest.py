"""Fixtures that all test folders share: a small token data set of real text."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch
from parsing import skip_missing_sources

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def pytest_configure(config: pytest.Config) -> None:
    """Run files in their given order, so that the slow ones of tests/distributed and tests/integration start first.

    By default pytest-xdist runs files with few tests last. Some of those take a minute, in which a core may be idle.
    """
    config.option.loadscopereorder = False
    skip_missing_sources()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none, except with DEVICE=cpu (tests/gpu/devices.py)."""
    if torch.cuda.is_available() or os.environ.get("DEVICE") == "cpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU; DEVICE=cpu rehearses it"))


@pytest.fixture(scope="session")
def token_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training and validation data sets of some ten thousand tokens, vocabulary of 512; training in several shards."""
    from titan_attent.data.text.writer import write_dataset

    root = tmp_path_factory.mktemp("token_data")
    train, validation = root / "train", root / "validation"
    write_dataset([STDLIB / "json"], output=train, tokenizer="train:512", shard_tokens=8000)
    write_dataset([STDLIB / "wsgiref"], output=validation, tokenizer=str(train / "tokenizer.tiktoken"))
    return {"train": train, "validation": validation}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread: small tensors gain nothing from more threads, and lose speed where cores are shared."""
    torch.set_num_threads(1)
