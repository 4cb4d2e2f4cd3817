#!/usr/bin/env bash
# torch 2.13: dcp.save keeps the copy of every tensor that it has written, until the file is complete.
#
# Expected: FileSystemWriter copies one tensor, writes it and lets it go; per_thread_copy_ahead (10 MB) bounds what is
# copied ahead. So a save needs little memory beside the tensors themselves.
# Seen: a tensor whose storage is larger than itself is cloned before it is written, and all clones live at once: 64 views
# of 4 MB raise the peak by 256 MB. The writer puts each tensor into a dictionary that only the safetensors format reads,
# also in the default format, and with one file per rank that dictionary ends with the rank's last tensor. In the same way
# it holds the copies of tensors from a GPU: the host needs the whole shard of the rank.
# So a save needs as much free host memory as a rank's shard, and a planner that makes tensors when they are asked for
# (resolve_data) cannot stream them; single_file_per_rank=False bounds both by one tensor.
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import resource
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")
print("torch", torch.__version__)
NUM, NUMBERS = 64, 2**20
whole = torch.ones(2 * NUMBERS)
views = {f"layer.{i}": whole[:NUMBERS] for i in range(NUM)}


def peak():
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def growth(name, **options):
    """How far a save raises the peak of this process."""
    before = peak()
    writer = dcp.FileSystemWriter(f"{sys.argv[1]}/{name}", **options)
    dcp.save(views, storage_writer=writer, no_dist=True)
    return peak() - before


dcp.save({"first": torch.ones(NUMBERS)}, checkpoint_id=f"{sys.argv[1]}/warm", no_dist=True)
by_tensor = growth("many", single_file_per_rank=False)
by_rank = growth("one")
all_copies = NUM * NUMBERS * 4 / 2**20
print(f"{NUM} views of {all_copies / NUM:.0f} MB: the peak grows by {by_rank:.0f} MB of {all_copies:.0f}")
print(f"in a file per tensor: by {by_tensor:.0f} MB")
if by_rank < 0.8 * all_copies or by_tensor > 0.2 * all_copies:
    sys.exit("this has changed")
PY
