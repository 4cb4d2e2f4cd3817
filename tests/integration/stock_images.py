"""torchtitan's own Trainer and loss on images, fed with the batches of a trace: the control of the uniform strategy.

Started by torchrun with torchtitan's arguments. The pixels are read with numpy, independently of the package's data
path; of the package the model is used, and the CPU mends.
"""

import dataclasses
import json
import os
from pathlib import Path

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from torchtitan.train import Trainer, main

from titan_attent.models.vision.vit import VisionTransformer
from titan_attent.titan.models.vision import ViTModelArgs


class TraceLoader(BaseDataLoader):
    def __init__(self, *, dp_world_size, dp_rank, tokenizer, job_config):
        self.job_config, self.rank, self.size = job_config, dp_rank, dp_world_size

    def __iter__(self):
        data, index = np.load(os.environ["STOCK_DATA"]), json.loads(Path(os.environ["STOCK_INDEX"]).read_text())
        pixels, labels = data["images"][:, None], torch.from_numpy(data["labels"])
        (mean,), (std,) = index["mean"], index["std"]
        assert abs(mean - (pixels / 255).mean()) < 1e-6 and abs(std - (pixels / 255).std()) < 1e-6
        scale, shift = np.float32(1 / (255 * std)), np.float32(-mean / std)
        images = torch.from_numpy(pixels * scale + shift)
        local = self.job_config.training.local_batch_size
        for line in Path(os.environ["STOCK_TRACE"]).read_text().splitlines():
            ids = json.loads(line)["ids"]
            mine = ids[self.rank * len(ids) // self.size : (self.rank + 1) * len(ids) // self.size]
            for start in range(0, len(mine), local):
                rows = mine[start : start + local]
                yield {"input": images[rows]}, labels[rows][:, None]

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


if __name__ == "__main__":
    stock = get_train_spec("llama3")
    args = ViTModelArgs(dim=64, n_layers=4, n_heads=4, patch_size=2)
    spec = dataclasses.replace(
        stock,
        model_cls=VisionTransformer,
        model_args={"tiny": args},
        build_dataloader_fn=TraceLoader,
        build_tokenizer_fn=None,
    )
    register_train_spec("stock", spec)
    main(Trainer)
