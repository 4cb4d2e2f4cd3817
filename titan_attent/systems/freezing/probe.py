"""The principal eigenvalue of every module's tangent kernel, on probe examples that are fixed for the whole run.

    s_i       = a scalar of example i: its logits projected on random signs ("ntk"), or its mean loss ("loss"), both
                over the tokens with a valid label
    G_l[i,j]  = <ds_i/dtheta_l, ds_j/dtheta_l>      gram.py
    lambda_l  = the largest eigenvalue of G_l, mean over the groups

All examples of a group share the same signs. Then E[G_l] is the kernel J_l J_l' of MAT (arXiv 2405.07527), averaged
over tokens and vocabulary. The sign of a logit is the product of a sign of its token and a sign of its vocabulary
entry. This has the same mean and takes T + V numbers instead of T V. Each group has its own signs. The paper's sample
size and projection are not public, so both are chosen here.

The groups are distributed over the data-parallel ranks. Each number in the table of eigenvalues is computed by one
rank, so sums over the table do not depend on the number of ranks.

Cost per probe:

- per group one forward pass, one backward pass without weight gradients, and the products of gram.py;
- per group one all-reduce of n^2 numbers per module over the tensor parallel ranks;
- one all-reduce of groups x modules numbers over the data-parallel ranks;
- one host sync, between two steps.

Shapes: n examples per group, T tokens, V vocabulary entries, U modules.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

from titan_attent.foundations.counter_rng import derive_key, hash_ids, permute
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.systems.freezing.capture import Capture
from titan_attent.systems.freezing.gram import at_least_fp32, principal_eigenvalues
from titan_attent.systems.freezing.units import Unit
from titan_attent.systems.system import Run

PROBES_STREAM, SIGNS_STREAM = 101, 102
"""Stream numbers for counter_rng.py."""


def probe_ids(num_examples: int, *, groups: int, size: int, seed: int) -> Tensor:
    """Draw distinct example ids of the data set, int64 [groups, size]; the same for any number of ranks."""
    indices = torch.arange(groups * size)
    return permute(indices, num_examples, derive_key(seed, PROBES_STREAM)).view(groups, size)


def signs(length: int, key: int, *, device: torch.device) -> Tensor:
    """The signs +1 or -1, fp32 [length], from a hash of (key, index)."""
    return (hash_ids(torch.arange(length, device=device), key) >> 40 & 1).float() * 2 - 1


def projected_logits(logits: Tensor, key: int, labels: Tensor | None = None) -> Tensor:
    """The sum over the examples of <signs, logits_i> / sqrt(T_i V), from logits [n, T, V].

    The signs depend on the key only, so they are the same for every example. The sum covers the T_i tokens with a valid
    label in ``labels``, int64 [n, T]; without ``labels``, all T tokens.
    """
    _, length, vocab = logits.shape
    by_token = signs(length, derive_key(key, 0), device=logits.device)
    by_entry = signs(vocab, derive_key(key, 1), device=logits.device).to(logits.dtype)[None, :, None]
    by_entry = by_entry.expand(len(logits), -1, -1)
    if isinstance(logits, DTensor):  # sharded along the vocabulary
        mesh = logits.device_mesh
        placements = [Shard(1) if placement.is_shard(2) else Replicate() for placement in logits.placements]
        by_entry = DTensor.from_local(by_entry, mesh, [Replicate()] * mesh.ndim).redistribute(placements=placements)
    projected = torch.matmul(logits, by_entry)
    projected = projected.full_tensor() if isinstance(projected, DTensor) else projected
    signed = at_least_fp32(projected.squeeze(-1)) * by_token
    if labels is None:
        return signed.sum() / (length * vocab) ** 0.5
    valid, num = _valid(labels)
    return ((signed * valid).sum(dim=1) / (num.to(signed.dtype) * vocab).sqrt()).sum()


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over the examples of their mean loss in nats, from logits [n, T, V] and labels int64 [n, T].

    A mean covers the tokens with a valid label; it is 0 for an example without one.
    """
    losses = []
    for i, num in enumerate(_valid(labels)[1]):
        example_logits = at_least_fp32(logits[i : i + 1].flatten(0, 1))
        loss: Any = F.cross_entropy(example_logits, labels[i], ignore_index=IGNORE_INDEX, reduction="sum")
        losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss) / num)
    return torch.stack(losses).sum()


def _valid(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mask of valid labels, bool [n, T], and their number per example, fp32 [n], at least 1."""
    valid = labels != IGNORE_INDEX
    return valid, valid.sum(dim=1).float().clamp(min=1.0)


class Measures(NamedTuple):
    """The results of a probe; NaN where a Gram matrix was not finite.

    Attributes:
        eigenvalues: principal eigenvalue of each unit.
        norms: norm of the mean gradient of each unit.
        heads: name of an attention unit -> the eigenvalues of its heads; empty if heads are left out.
    """

    eigenvalues: list[float]
    norms: list[float]
    heads: dict[str, list[float]]


class Prober:
    """Probes the modules of a run.

    Args:
        run: the run whose model is probed.
        units: the U modules.
        kind: "ntk" or "loss".
        groups, size: number of groups of probe examples, and examples per group.
        seed: seed of the probe examples and the signs.
        num_heads: number of attention heads; 0 to leave out the heads.
    """

    def __init__(
        self, run: Run, units: Sequence[Unit], *, kind: str, groups: int, size: int, seed: int, num_heads: int = 0
    ):
        self.run, self.units, self.kind, self.seed = run, units, kind, seed
        self.num_heads = num_heads
        self.attention_units = [unit.name for unit in units if unit.kind == "attention"] if num_heads else []
        self.ids = probe_ids(len(run.dataset), groups=groups, size=size, seed=seed)

    def measure(self) -> Measures:
        """Probe all modules. Every parameter must require gradients. A collective of all ranks."""
        run, groups, num_units = self.run, len(self.ids), len(self.units)
        width = 2 * num_units + len(self.attention_units) * self.num_heads
        table = torch.zeros(groups, width, dtype=torch.float64)
        for round_index in range(-(-groups // run.num_ranks)):
            group = round_index * run.num_ranks + run.rank
            # FSDP needs all ranks in every pass: a rank without a group left computes group 0 and discards it.
            grams, heads = self._grams(group if group < groups else 0)
            if group < groups:
                norms = grams.double().sum(dim=(1, 2)).clamp(min=0).sqrt().cpu() / len(self.ids[group])
                head_values = [principal_eigenvalues(heads[name]) for name in self.attention_units]
                table[group] = torch.cat([principal_eigenvalues(grams), norms, *head_values])
        mesh = run.mesh("batch")
        if mesh is not None:
            on_device = table.to(run.device)
            dist.all_reduce(on_device, group=mesh.get_group())
            table = on_device.cpu()
        means = table.mean(dim=0).tolist()
        starts = [2 * num_units + i * self.num_heads for i in range(len(self.attention_units))]
        head_means = [means[start : start + self.num_heads] for start in starts]
        return Measures(
            eigenvalues=means[:num_units],
            norms=means[num_units : 2 * num_units],
            heads=dict(zip(self.attention_units, head_means, strict=True)),
        )

    def _grams(self, group: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The Gram matrices of a group, [U, n, n], equal on all tensor parallel ranks; and those of the heads."""
        run, mesh, ids = self.run, self.run.mesh("tp"), self.ids[group]
        inputs, labels = run.dataset.read(ids)
        tp_ranks = 1 if mesh is None else mesh.size()
        capture = Capture(self.units, num_examples=len(ids), num_ranks=tp_ranks, num_heads=self.num_heads)
        # Compiled blocks would bypass the capture, and compiling new graphs for it would not pay.
        with torch.compiler.set_stance("force_eager"), capture, run.predict(inputs["input"], labels) as predicted:
            capture.stop()
            logits, on_device = predicted
            if self.kind == "ntk":
                scalar = projected_logits(logits, derive_key(self.seed, SIGNS_STREAM, group), on_device)
            else:
                scalar = mean_losses(logits, on_device)
            grams = capture.grams(scalar)
        if mesh is not None:
            dist.all_reduce(grams, group=mesh.get_group())
        return grams, capture.heads
