#!/usr/bin/env bash
# lightning 2.6.6: resumed within an epoch with another accumulate_grad_batches, a run takes one short optimizer step.
#
# Expected: after the checkpoint of an optimizer step, each further step adds up the new number of batches.
# Seen: Lightning goes on counting batches from the start of the epoch, and steps where this count is a multiple of the new
# number. After three steps of one batch each, a resume with two batches per step first steps with one batch. Its loss is
# divided by two all the same, so the gradient of that step is half of what it should be. The one warning is of the loader.
# So resume within an epoch with the same number, or from the checkpoint of an epoch's end.
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lightning==2.6.6 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'EOF' 2>/dev/null
import sys
from importlib.metadata import version

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

print("torch", torch.__version__, "lightning", version("lightning"))


class One(lightning.LightningModule):
    """A weight whose gradient is 1 in every batch, so that its change in a step is what the step added up."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches, self.steps = 0, []

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return self.weight * batch.mean()

    def optimizer_step(self, *args, **kwargs):
        before = self.weight.item()
        super().optimizer_step(*args, **kwargs)
        self.steps.append((self.batches, round(before - self.weight.item(), 3)))
        self.batches = 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def run(accumulate, max_steps, resume=None):
    model = One()
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=max_steps, accumulate_grad_batches=accumulate, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(dirpath="saved", filename="three", every_n_train_steps=3)],
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(100), batch_size=1), ckpt_path=resume)
    return model.steps


first = run(1, 3)
resumed = run(2, 6, "saved/three.ckpt")
print("(batches, gradient) of each step, one batch per step:", first)
print("resumed with two batches per step:                    ", resumed)
if resumed != [(1, 0.5), (2, 1.0), (2, 1.0)]:
    sys.exit("this has changed")
EOF
