#!/usr/bin/env bash
# torch 2.13, FSDP2: a checkpoint that is loaded in place after a forward pass without gradients is seen by a part of the
# model: the next pass mixes its weights with those of before, and nothing says so.
#
# Expected: model.state_dict() of a sharded model holds the parameters' own shards, and dcp.load fills them in place, so
# that the next forward pass has the loaded weights, as on one GPU and without FSDP.
# Seen: true of the modules that free their gathered weights after a pass. The root module keeps them until a backward
# pass has used them (reshard_after_forward of a root is False by default), and without a backward pass, for good: its
# own parameters (in most models embeddings, last norm, output) are the old ones. A new state_dict() or a
# load_state_dict() drops them, but a state dict that was taken before and is filled again does not; torchtitan keeps one.
# So call reshard() on every FSDPModule of a model in evaluation after its weights were changed in place.
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/loads.py" <<'PY'
import socket
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

RANKS = 2


def work(rank, port, folder, queue):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=RANKS)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    fully_shard(model[0])
    fully_shard(model)  # the root holds model[1]
    weights = model.state_dict()

    def fill(value):
        for weight in weights.values():
            weight.to_local().fill_(value)

    def output():
        return model(torch.ones(1, 4)).sum().item()

    with torch.no_grad():
        fill(2.0)
        dcp.save(weights, checkpoint_id=folder)
        fill(1.0)
        ones = output()
        dcp.load(weights, checkpoint_id=folder)
        loaded = output()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        resharded = output()
    if rank == 0:
        queue.put((ones, loaded, resharded))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(rank, port, sys.argv[1], queue)) for rank in range(RANKS)]
    for worker in workers:
        worker.start()
    found = queue.get(timeout=300)
    for worker in workers:
        worker.join()
    print("output with weights of 1, after a load of weights of 2, and after reshard():", found)
    # Both matrices double: 4 times as much. Where the root's is the old one: twice.
    if found != (64.0, 128.0, 256.0):
        sys.exit("this has changed")
PY
"$folder/venv/bin/python" "$folder/loads.py" "$folder/step-1"
