"""A system that refuses its run when it is built ends all ranks with one message."""

import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import titan_attent.titan.patches.compat  # noqa: F401

import torch.distributed as dist
from distributed.parallel_world import config_of, spec_of
from distributed.spawn import run_on_ranks

from titan_attent.systems.system import Run, System
from titan_attent.systems.system_list import SystemOn
from titan_attent.titan import trainer, user_errors


class Refusing(System):
    name = "refusing"

    def __init__(self, run: Run, config: Any):
        raise ValueError("[refusing] mode = 1: this model has no such layers. Set it to 0")


def build(mesh: Any, data: str, folder: str) -> tuple[int | str | None, str]:
    """The exit code of this rank, and its standard error."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    spec_of("llama3_attent")
    sys.stderr = io.StringIO()
    with (
        mock.patch.object(trainer, "systems_of", lambda job_config: [SystemOn(Refusing, None)]),
        mock.patch.object(user_errors, "wait_for_first_rank"),
    ):
        try:
            trainer.TeachingTrainer(config_of({"training.local_batch_size": 4}, data=data, folder=folder))
        except SystemExit as end:
            return end.code, sys.stderr.getvalue()
    return None, ""


def test_a_system_that_refuses_the_run_ends_it_with_one_message(token_data: dict[str, Path], tmp_path: Path) -> None:
    (code, said), (other_code, other_said) = run_on_ranks(build, 2, str(token_data["train"]), str(tmp_path))
    assert code == other_code == 2
    assert said.count("titan_attent: error: [refusing] mode = 1: this model has no such layers. Set it to 0\n") == 1
    assert "titan_attent: error" not in other_said and "Traceback" not in said + other_said
