"""torchtitan's own Trainer and loss, fed with the batches of a trace: the control of the uniform strategy.

Started by torchrun with torchtitan's arguments. The trace's ids are cut from the shard files with numpy, independently
of the package's data path; of the package only the CPU mends are used, and with
STOCK_FAMILY the model of that family.
"""

import dataclasses
import json
import os
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from torchtitan.train import Trainer, main

from titan_attent.titan.models.families import FAMILIES


class TraceLoader(BaseDataLoader):
    def __init__(self, *, dp_world_size, dp_rank, tokenizer, job_config):
        self.job_config, self.rank, self.size = job_config, dp_rank, dp_world_size

    def __iter__(self):
        shards = sorted(Path(os.environ["STOCK_DATA"]).glob("shard-*.bin"))
        tokens = np.concatenate([np.fromfile(shard, dtype="<u2") for shard in shards]).astype(np.int64)
        length, local = self.job_config.training.seq_len, self.job_config.training.local_batch_size
        for line in Path(os.environ["STOCK_TRACE"]).read_text().splitlines():
            ids = json.loads(line)["ids"]
            mine = ids[self.rank * len(ids) // self.size : (self.rank + 1) * len(ids) // self.size]
            for start in range(0, len(mine), local):
                rows = [tokens[i * length : i * length + length + 1] for i in mine[start : start + local]]
                window = torch.from_numpy(np.stack(rows))
                yield {"input": window[:, :-1]}, window[:, 1:]

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


if __name__ == "__main__":
    if family := os.environ.get("STOCK_FAMILY"):  # a model of this package in torchtitan's trainer
        stock = FAMILIES[family].train_spec()
        flavors = stock.model_args
    else:
        stock = get_train_spec("llama3")
        small = TransformerModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=512, multiple_of=32, rope_theta=10000)
        flavors = {"scorer_xs": small}
    register_train_spec(
        "stock",
        dataclasses.replace(stock, model_args=flavors, build_dataloader_fn=TraceLoader, build_tokenizer_fn=None),
    )
    main(Trainer)
