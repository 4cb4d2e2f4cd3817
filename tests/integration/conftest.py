"""The fork server's imports, and a data set small enough to pass over many times."""

import json.decoder
import multiprocessing
import multiprocessing.forkserver
import os
from pathlib import Path

import pytest
from launch import write_config

from titan_attent.data.text.writer import write_dataset


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server that all processes of the tests are forked from, before a test or the package can start it."""
    # The server leaves out what it cannot import.
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded"])
    if not session.config.option.collectonly:
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def small_run(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run on 64 tokens an example, some 70 of them; give it a dump folder."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = str(token_data["train"] / "tokenizer.tiktoken")
    write_dataset([Path(json.decoder.__file__)], output=folder / "data", tokenizer=tokenizer)
    data = {"train": folder / "data", "validation": folder / "data"}
    config = write_config(folder, data=data, dump=folder / "unused")
    return ["--job.config_file", str(config), "--training.seq_len", "64"]
