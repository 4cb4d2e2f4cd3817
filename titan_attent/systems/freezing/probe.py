"""The principal eigenvalue of every module's tangent kernel, on probe examples that stay the same for the whole run.

    s_i       what is asked of example i: its logits along a random direction of signs ("ntk"), or its mean loss
              ("loss"), both over the tokens whose label counts
    G_l[i,j]  = <ds_i/dtheta_l, ds_j/dtheta_l>      gram.py
    lambda_l  = the largest eigenvalue of G_l, mean over the groups

With the same signs r for all examples of a group, E[G_l] is the kernel J_l J_l' of MAT (arXiv 2405.07527), contracted
over the outputs: the mean over tokens and vocabulary. The sign of a logit is the product of its token's and its
vocabulary entry's, which has the same mean and takes T + V numbers instead of T V. Each group has signs of its own. The
paper's sample size and projection are not public; both are ours.

The groups are shared out over the data-parallel ranks, and the eigenvalues are put together in a table in which one
rank has written each number, so that their sums do not depend on the number of ranks.

Cost: of each group one forward and one backward pass without weight gradients, and gram.py's products; one all-reduce
of n^2 numbers a module over tensor parallel ranks, and one of groups x modules numbers over the data-parallel ones;
one host sync, between two steps.

Shapes: n examples of a group, T tokens, V vocabulary entries, U modules.
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
from titan_attent.systems.freezing.gram import principal_eigenvalues, wide
from titan_attent.systems.freezing.units import Unit
from titan_attent.systems.system import Run

PROBES_STREAM, SIGNS_STREAM = 101, 102


def probe_ids(num_examples: int, *, groups: int, size: int, seed: int) -> Tensor:
    """int64 [groups, size]: distinct examples of the data set, the same at any number of ranks."""
    places = torch.arange(groups * size)
    return permute(places, num_examples, derive_key(seed, PROBES_STREAM)).view(groups, size)


def signs(length: int, key: int, *, device: torch.device) -> Tensor:
    """fp32 [length] of +1 and -1, a hash of (key, place)."""
    return (hash_ids(torch.arange(length, device=device), key) >> 40 & 1).float() * 2 - 1


def projected_logits(logits: Tensor, key: int, labels: Tensor | None = None) -> Tensor:
    """The sum over the examples of <signs, logits_i> / sqrt(T_i V), from logits [n, T, V]; the signs are those of the
    key, the same for every example. Of the T tokens those count whose label in int64 [n, T] does; all without labels.
    """
    _, length, vocab = logits.shape
    by_token = signs(length, derive_key(key, 0), device=logits.device)
    by_entry = signs(vocab, derive_key(key, 1), device=logits.device).to(logits.dtype)[None, :, None]
    by_entry = by_entry.expand(len(logits), -1, -1)
    if isinstance(logits, DTensor):  # cut along the vocabulary
        mesh = logits.device_mesh
        cut = [Shard(1) if place.is_shard(2) else Replicate() for place in logits.placements]
        by_entry = DTensor.from_local(by_entry, mesh, [Replicate()] * mesh.ndim).redistribute(placements=cut)
    along = torch.matmul(logits, by_entry)
    along = along.full_tensor() if isinstance(along, DTensor) else along
    asked = wide(along.squeeze(-1)) * by_token
    if labels is None:
        return asked.sum() / (length * vocab) ** 0.5
    valid, num = _valid(labels)
    return ((asked * valid).sum(dim=1) / (num.to(asked.dtype) * vocab).sqrt()).sum()


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over the examples of their mean loss in nats over the tokens whose label counts, 0 of an example without
    any, from logits [n, T, V] and labels int64 [n, T]."""
    losses = []
    for i, num in enumerate(_valid(labels)[1]):
        of_tokens, own = wide(logits[i : i + 1].flatten(0, 1)), labels[i]
        loss: Any = F.cross_entropy(of_tokens, own, ignore_index=IGNORE_INDEX, reduction="sum")
        losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss) / num)
    return torch.stack(losses).sum()


def _valid(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels count, bool [n, T], and how many of each example, fp32 [n], at least 1."""
    valid = labels != IGNORE_INDEX
    return valid, valid.sum(dim=1).float().clamp(min=1.0)


class Measures(NamedTuple):
    """What a probe found; NaN where a number was not finite.

    Attributes:
        eigenvalues: of the units.
        norms: of the mean gradient of each.
        heads: name of an attention unit -> the eigenvalues of its heads; empty unless asked for.
    """

    eigenvalues: list[float]
    norms: list[float]
    heads: dict[str, list[float]]


class Prober:
    """Probes the modules of a run.

    Args:
        run: of which the model is probed.
        units: U modules.
        kind: "ntk" or "loss".
        groups, size: of probe examples.
        num_heads: of attention; 0 to leave out the heads.
    """

    def __init__(
        self, run: Run, units: Sequence[Unit], *, kind: str, groups: int, size: int, seed: int, num_heads: int = 0
    ):
        self.run, self.units, self.kind, self.seed = run, units, kind, seed
        self.num_heads = num_heads
        self.with_heads = [unit.name for unit in units if unit.kind == "attention"] if num_heads else []
        self.ids = probe_ids(len(run.dataset), groups=groups, size=size, seed=seed)

    def measure(self) -> Measures:
        """A collective, on all ranks, with every parameter requiring gradients."""
        run, groups, num_units = self.run, len(self.ids), len(self.units)
        width = 2 * num_units + len(self.with_heads) * self.num_heads
        table = torch.zeros(groups, width, dtype=torch.float64)
        for turn in range(-(-groups // run.num_ranks)):
            group = turn * run.num_ranks + run.rank
            # FSDP needs all ranks in every pass: one that has no group left makes the first one's, for nothing.
            grams, heads = self._grams(group if group < groups else 0)
            if group < groups:
                norms = grams.double().sum(dim=(1, 2)).clamp(min=0).sqrt().cpu() / len(self.ids[group])
                all_heads = [principal_eigenvalues(heads[name]) for name in self.with_heads]
                table[group] = torch.cat([principal_eigenvalues(grams), norms, *all_heads])
        mesh = run.mesh("batch")
        if mesh is not None:
            on_device = table.to(run.device)
            dist.all_reduce(on_device, group=mesh.get_group())
            table = on_device.cpu()
        means = table.mean(dim=0).tolist()
        starts = [2 * num_units + i * self.num_heads for i in range(len(self.with_heads))]
        of_heads = [means[start : start + self.num_heads] for start in starts]
        return Measures(
            means[:num_units], means[num_units : 2 * num_units], dict(zip(self.with_heads, of_heads, strict=True))
        )

    def _grams(self, group: int) -> tuple[Tensor, dict[str, Tensor]]:
        """[U, n, n] of the examples of a group, equal on the ranks that share a model; and those of the heads."""
        run, mesh, ids = self.run, self.run.mesh("tp"), self.ids[group]
        inputs, labels = run.dataset.read(ids)
        tp_ranks = 1 if mesh is None else mesh.size()
        capture = Capture(self.units, num_examples=len(ids), num_ranks=tp_ranks, num_heads=self.num_heads)
        # Compiled blocks know nothing of a capture; nothing is compiled for it either.
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
