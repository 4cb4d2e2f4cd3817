"""Editing checkpoints: time and memory of ``BASE + 0.4 TUNED`` against plain copies, and against mergekit.

    python -m benchmarks.speed.editing --folder SCRATCH [--gb 8] [--mergekit VENV/bin/mergekit-yaml] [--output FILE]

Both operands are made up: a llama of fp32 matrices, with the same values as a DCP checkpoint and as safetensors. Before
each run the files that it reads are dropped from the page cache. Variants take turns; medians are compared.

- ``dd`` copies one operand in blocks of 8 MB past the page cache (O_DIRECT), and fsyncs the copy: the disk's own rate.
  It moves 2 operands, one read and one written.
- ``cp`` copies one operand through the page cache, and fsyncs the copy. On a virtual machine whose host takes free
  memory back, most of its time can be that of getting pages, and its rounds differ far more than those of ``dd``.
- ``edit`` reads two operands and writes one, which it also fsyncs: it moves 3. A fourth, the result that it reads back
  to verify, is not counted, because it is its own choice.
- mergekit's task_arithmetic, in fp32, from safetensors: 3 operands. It neither fsyncs nor verifies.

A rate is the bytes moved per second of wall time, from the start of the command to its end. ``rate / dd`` compares
rates, so that an edit at dd's rate takes 1.5 of its time: goal 0.7. Where other work keeps the processors busy, all
rates fall, and that of ``edit``, which computes, falls most: CPU seconds are given as well.

CPU seconds are those of a command's processes, as they were when they were last looked at.
Memory is the largest sum over a command's processes of what is resident, looked at every 20 ms: a page that processes
share counts once, and pages of mapped files, which the system can drop, do not (``Pss_Anon`` and ``Pss_Shmem`` of
/proc).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from benchmarks.common import measure

WIDTH, HIDDEN, VOCABULARY = 2048, 5632, 32000
LAYER = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"mlp.{name}_proj": (HIDDEN, WIDTH) for name in ("gate", "up")},
    "mlp.down_proj": (WIDTH, HIDDEN),
    **{name: (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")},
}
POLL_SECONDS = 0.02


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """name -> shape of a llama."""
    ends = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    layers = {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in LAYER.items()}
    return {f"{name}.weight": shape for name, shape in {**ends, **layers}.items()}


def make_data(folder: Path, *, gb: float) -> int:
    """Both operands in both formats; returns the number of layers. One operand is in memory at a time."""
    of_ends, of_layer = 2 * VOCABULARY * WIDTH, sum(torch.Size(shape).numel() for shape in LAYER.values())
    num_layers = max(round((gb * 1e9 / 4 - of_ends) / of_layer), 1)
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY},
        **{"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": num_layers},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "torch_dtype": "float32"},
        **{"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    }
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        weights = {key: torch.randn(shape) for key, shape in shapes(num_layers).items()}
        dcp.save(weights, checkpoint_id=folder / name, no_dist=True)
        hf = folder / f"{name}_hf"
        hf.mkdir()
        save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
        (hf / "config.json").write_text(json.dumps(config))
        del weights
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base_hf"),
        "models": [{"model": str(folder / "tuned_hf"), "parameters": {"weight": 0.4}}],
        "dtype": "float32",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return num_layers


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Drop the files of these folders from the page cache."""
    for path in paths:
        for file in path.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: Sequence[str]) -> dict[str, float]:
    """Seconds of a command, CPU seconds, and its largest memory in MB."""
    start, largest, cpu = time.perf_counter(), 0.0, dict[int, float]()
    before = os.times()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        family = _family(process.pid)
        largest = max(largest, sum(map(_resident, family)))
        cpu |= {one: seconds for one in family if (seconds := _cpu_seconds(one))}
        time.sleep(POLL_SECONDS)
    took, after = time.perf_counter() - start, os.times()
    assert process.stderr is not None
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {process.stderr.read()[-2000:]}")
    # Those of processes that their parents waited for, exactly; a server of forks is not waited for.
    waited = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": took, "cpu_seconds": max(waited, sum(cpu.values())), "megabytes": largest / 1e6}


def _family(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for one in found:
        found += children.get(one, [])
    return found


def _cpu_seconds(process: int) -> float:
    """User and system time of a process; 0 of one that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(process: int) -> float:
    """Bytes of a process that are not of a file; of pages shared by n processes, the n-th part."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, with five times --gb of room")
    parser.add_argument("--gb", type=float, default=8.0, help="size of an operand")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", default="", help="the command mergekit-yaml of an environment with mergekit")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    header = measure.header()
    if args.folder.exists():
        parser.error(f"--folder {args.folder} exists: name a new one, for the made-up checkpoints")
    args.folder.mkdir(parents=True)
    num_layers = make_data(args.folder, gb=args.gb)
    size = sum(4 * torch.Size(shape).numel() for shape in shapes(num_layers).values())
    base, tuned, out = (args.folder / name for name in ("base", "tuned", "out"))
    edit = [sys.executable, "-m", "titan_attent.edit", str(base), "+", "0.4", str(tuned), "--output", str(out)]
    copy = f"mkdir {out} && cp {base}/* {out} && sync {out}/*"
    block = 'dd if="$f" of="$0/${f##*/}" bs=8M iflag=direct oflag=direct conv=fsync'
    direct = f'mkdir "$0" && for f in "$1"/* "$1"/.metadata; do {block} || exit 1; done'
    variants: dict[str, tuple[list[str], list[Path], int]] = {
        "dd": (["sh", "-c", direct, str(out), str(base)], [base], 2 * size),
        "cp": (["sh", "-c", copy], [base], 2 * size),
        "edit": (edit, [base, tuned], 3 * size),
        "edit, 2 processes": ([*edit, "--processes", "2"], [base, tuned], 3 * size),
    }
    if args.mergekit:
        hf = [args.folder / "base_hf", args.folder / "tuned_hf"]
        command = [args.mergekit, str(args.folder / "recipe.yaml"), str(out), "--no-copy-tokenizer"]
        variants["mergekit"] = command, hf, 3 * size
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(args.rounds):
        names = list(variants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            command, read, moved = variants[name]
            drop_from_cache(read)
            result = run(command)
            found[name].append(result | {"gb_per_second": moved / 1e9 / result["seconds"]})
            print(name, found[name][-1], flush=True)
            shutil.rmtree(out)
        report(args.output, header | {"operand_gb": size / 1e9}, found)


def report(output: Path | None, header: dict[str, Any], found: dict[str, list[dict[str, float]]]) -> None:
    """Print and write the medians of the rounds so far: a round of large operands takes minutes."""
    medians: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(one[key] for one in results) for key in results[0]}
        for name, results in found.items()
    }
    for one in medians.values():
        for copy in ("dd", "cp"):
            one[f"rate / {copy}"] = one["gb_per_second"] / medians[copy]["gb_per_second"]
    rounds = len(found["cp"])
    result = header | {"rounds": rounds, "load": os.getloadavg(), "medians": medians, "all": found}
    measure.publish(output, result, [{"variant": name, **one} for name, one in medians.items()])


if __name__ == "__main__":
    main()
