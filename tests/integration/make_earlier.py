"""Write tests/integration/earlier: what a run and a scoring of a released state of the package left behind.

    PYTHONPATH=tests:tests/integration python tests/integration/make_earlier.py FOLDER

test_earlier.py goes on from it with today's code. It was made by commit 955ab85, the last before the modules moved
into rooms; make another one beside it, with that commit's own version of this script, when the format of a checkpoint
or of a data set is to change.
"""

import json
import multiprocessing
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from launch import read_scalars, read_trace, run, write_config

TRAIN_LOSS = "loss_metrics/global_avg_loss"
STEPS, SAVED_AT = 60, 35
ARGUMENTS = [
    *("--model.flavor", "earlier", "--training.seq_len", "32", "--training.steps", str(STEPS)),
    *("--teacher.importance", "functional_gradient", "--teacher.weighting", "loss", "--teacher.pool_size", "96"),
    *("--teacher.warmup_passes", "0", "--checkpoint.enable"),
]


def add_flavor() -> None:
    """A flavor of some ten thousand parameters, whose checkpoint may lie in a repository."""
    from torchtitan.models.llama3 import TransformerModelArgs

    from titan_attent.titan.models.flavors import EXTRA_FLAVORS

    EXTRA_FLAVORS["llama3"]["earlier"] = TransformerModelArgs(
        dim=16, n_layers=1, n_heads=2, vocab_size=300, multiple_of=8, rope_theta=10000
    )


def make(folder: Path) -> None:
    from titan_attent.data.text.writer import write_dataset

    folder.mkdir()
    source = Path(sysconfig.get_paths()["stdlib"]) / "json" / "encoder.py"
    write_dataset([source], output=folder / "tokens", tokenizer="train:300", shard_tokens=4000)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        config = write_config(
            work, data={"train": folder / "tokens", "validation": folder / "tokens"}, dump=work / "run"
        )
        arguments = ["--job.config_file", str(config), *ARGUMENTS]
        run(*arguments, "--checkpoint.interval", str(SAVED_AT), "--checkpoint.keep_latest_k", "0", prepare=add_flavor)
        checkpoint = folder / "run" / "checkpoint" / f"step-{SAVED_AT}"
        shutil.copytree(work / "run" / "checkpoint" / checkpoint.name, checkpoint)
        ids = {line["step"]: line["ids"] for line in read_trace(work / "run")}
        losses = read_scalars(work / "run", TRAIN_LOSS)
        lines = [json.dumps({"step": step, "loss": losses[step], "ids": ids[step]}) for step in sorted(ids)]
        (folder / "steps.jsonl").write_text("\n".join(lines) + "\n")
        scoring = ["--checkpoint.initial_load_path", str(checkpoint), "--validation.local_batch_size", "4"]
        score = ["checkpoint", "--output", str(folder / "reference"), *arguments, *scoring]
        run(*score, module="titan_attent.score", prepare=add_flavor)
        written = folder / "reference" / "reference.json"
        written.write_text(written.read_text().replace(str(folder.resolve()), ""))  # a path of the machine


if __name__ == "__main__":
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded", "make_earlier"])
    make(Path(sys.argv[1]))
