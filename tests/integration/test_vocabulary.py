"""A flavor of one's own without a vocabulary: trained, resumed, scored with, and refused for other data."""

import re
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from launch import launch, run, write_config
from torch.distributed.checkpoint import FileSystemReader

from titan_attent.data.text.writer import write_dataset
from titan_attent.scores.stored import StoredScores
from titan_attent.titan.models.flavors import VOCABULARY_MULTIPLE

MODULE = """
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

llama3_args["of_mine"] = TransformerModelArgs(dim=32, n_layers=1, n_heads=2, multiple_of=32, vocab_size=0)
"""
NUM_IDS, SIZE = 300, 320


def add_to_path(folder: str) -> None:
    sys.path.insert(0, folder)


@pytest.fixture(scope="module")
def importable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], None]:
    """What a process does first to find the module with the flavor."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "module_with_a_flavor.py").write_text(MODULE)
    return partial(add_to_path, str(folder))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("vocabulary")
    for name, num_ids in {"train": NUM_IDS, "other": 400}.items():
        write_dataset([Path(struct.__file__), Path(re.__file__)], output=folder / name, tokenizer=f"train:{num_ids}")
    data = {"train": folder / "train", "validation": folder / "train"}
    config = write_config(folder, data=data, dump=folder / "run", flavor="of_mine")
    own = ["--experimental.custom_import", "module_with_a_flavor", "--training.seq_len", "32"]
    return ["--job.config_file", str(config), *own, "--teacher.strategy", "uniform", "--checkpoint.enable"]


def test_a_flavor_that_follows_the_data(arguments: list[str], importable: Callable[[], None]) -> None:
    assert SIZE % VOCABULARY_MULTIPLE == 0 and NUM_IDS < SIZE
    folder = Path(arguments[1]).parent
    output = run(*arguments, "--training.steps", "4", prepare=importable)
    line = rf"of_mine has {SIZE} token ids: the data {folder / 'train'} has {NUM_IDS}"
    assert len(re.findall(line, output)) == 1, "on the first rank alone"
    step = folder / "run" / "checkpoint" / "step-4"
    shapes = FileSystemReader(step).read_metadata().state_dict_metadata
    assert list(shapes["tok_embeddings.weight"].size) == list(shapes["output.weight"].size) == [SIZE, 32]

    resumed = run(*arguments, "--training.steps", "6", prepare=importable)
    assert f"Loading the checkpoint from {step}" in resumed

    scores = ["--output", str(folder / "scores"), "--checkpoint.initial_load_path", str(step)]
    run("checkpoint", *scores, *arguments, module="titan_attent.score", prepare=importable)
    assert StoredScores(folder / "scores").num_examples > 0

    other = ["--data.path", str(folder / "other"), "--job.dump_folder", str(folder / "second")]
    refused = launch(*arguments, *other, "--checkpoint.initial_load_path", str(step), prepare=importable)
    assert refused.returncode != 0
    (message,) = re.findall("titan_attent: error: (.*)", refused.stderr)
    assert f"step-4 is of another vocabulary: it has {SIZE} token ids, and this model has 448" in message

    anew = ["--checkpoint.no-enable", "--teacher.ratio_schedule", "constant", "--optimizer.lr", "5e-4"]
    refused = launch(*arguments, *anew, prepare=importable)
    assert refused.returncode != 0
    (message,) = re.findall("titan_attent: error: (.*)", refused.stderr)
    assert "run holds another run: training.steps was 6 and is 20; optimizer.lr was 0.001 and is 0.0005" in message
    assert "teacher.ratio_schedule was incremental and is" in message
    shutil.rmtree(folder)
