"""How far a student's next-token distribution is from a source's: the token losses of distillation, in chunks.

    kl_divergence          KL(softmax(s / T) || softmax(z / T_z)) T_z^2, from the source's logits s and the student's z
    target_cross_entropy   - T_z^2 sum_i w_i log softmax(z / T_z)[id_i], from a few target ids of each token

With T_z = 1 only the source is softened, and T -> 0 is cross-entropy with the source's largest logit: target ids from
:func:`largest_id`. With T_z = T both are softened, and the factor T^2 keeps the gradient's size (Hinton et al. 2015,
arXiv 1503.02531).

KL comes from five sums per token, with a = s / T and b = z / T_z, each less its largest value:

    KL = sum e^a (a - b) / sum e^a - log sum e^a + log sum e^b

so no softmax or log-softmax of [tokens x vocabulary] exists. One chunk of tokens at a time is upcast to fp32, before
any arithmetic. The gradient T_z (softmax(b) - softmax(a)) is computed per chunk in fp32, and may overwrite the source's
logits, which nobody reads afterwards: then nothing of size [T, V] is added to the two models' logits.

Where tensor parallelism shards the vocabulary (DTensors, ``Shard(-1)``), each rank sums over its shard. One all-reduce
MAX of 8 bytes per token and one SUM of 12 combine them; the backward is local.

Cost: each model's logits are read twice forward (largest value, sums) and once backward. 20 bytes per token are kept.
Eager kernels need 16 C V bytes of scratch memory for C tokens per chunk, compiled ones none. No host sync.

Shapes: T tokens, C tokens of a chunk, V vocabulary, v this rank's shard of it, N target ids per token.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor, Shard

CHUNK_NUMBERS = 2**24
"""Logits of a chunk: 64 MiB in fp32."""


def _largest(logits_CV: Tensor) -> Tensor:
    """fp32 [C], and finite where every logit of a shard is -inf."""
    return logits_CV.amax(dim=-1).clamp(min=torch.finfo(torch.float32).min)


def _softened(logits_CV: Tensor, temperature: float) -> Tensor:
    """A copy of the logits in fp32, divided by the temperature."""
    copy_CV = logits_CV.to(torch.float32, copy=True)
    return copy_CV if temperature == 1.0 else copy_CV.div_(temperature)


def _widened(logits_CV: Tensor, temperature: float) -> Tensor:
    """As :func:`_softened`, but the logits themselves where nothing has to be computed: to be read only."""
    wide_CV = logits_CV.float()
    return wide_CV if temperature == 1.0 else wide_CV / temperature


def _sums_of_both(
    student_CV: Tensor, source_CV: Tensor, student_temperature: float, source_temperature: float
) -> tuple[Tensor, Tensor]:
    """Largest a and b, fp32 [2, C]; sum e^a, sum e^a (a - b), sum e^b, fp32 [3, C], a and b less their largest."""
    a_CV, b_CV = _softened(source_CV, source_temperature), _softened(student_CV, student_temperature)
    largest_2C = torch.stack((_largest(a_CV), _largest(b_CV)))
    a_CV.sub_(largest_2C[0][:, None])
    b_CV.sub_(largest_2C[1][:, None])
    e_CV = a_CV.exp()
    # An id that the source excludes (a = -inf) adds 0, not 0 x inf.
    cross_CV = torch.where(e_CV > 0, e_CV * (a_CV - b_CV), 0.0)
    return largest_2C, torch.stack((e_CV.sum(dim=-1), cross_CV.sum(dim=-1), b_CV.exp().sum(dim=-1)))


def _sums_of_student(student_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Largest b, fp32 [C]; sum e^b, fp32 [C], b less its largest."""
    b_CV = _widened(student_CV, temperature)
    largest_C = _largest(b_CV)
    return largest_C, (b_CV - largest_C[:, None]).exp_().sum(dim=-1)


def _gradient_of_both_(
    out_CV: Tensor,
    student_CV: Tensor,
    source_CV: Tensor,
    student_shift_C: Tensor,
    source_shift_C: Tensor,
    scale_C: Tensor,
    student_temperature: float,
    source_temperature: float,
) -> None:
    """out = scale (exp(b - shift of b) - exp(a - shift of a)); ``out_CV`` may be ``source_CV``."""
    q_CV = _softened(student_CV, student_temperature).sub_(student_shift_C[:, None]).exp_()
    p_CV = _softened(source_CV, source_temperature).sub_(source_shift_C[:, None]).exp_()
    out_CV.copy_(q_CV.sub_(p_CV).mul_(scale_C[:, None]))


def _gradient_of_student_(
    out_CV: Tensor, student_CV: Tensor, shift_C: Tensor, scale_C: Tensor, temperature: float
) -> None:
    """out = scale exp(b - shift)."""
    out_CV.copy_((_widened(student_CV, temperature) - shift_C[:, None]).exp_().mul_(scale_C[:, None]))


class Kernels(NamedTuple):
    """The functions that pass over a chunk; compiled, they need no fp32 scratch memory."""

    sums_of_both: Callable[..., tuple[Tensor, Tensor]]
    sums_of_student: Callable[..., tuple[Tensor, Tensor]]
    gradient_of_both_: Callable[..., None]
    gradient_of_student_: Callable[..., None]


EAGER = Kernels(_sums_of_both, _sums_of_student, _gradient_of_both_, _gradient_of_student_)


def build_kernels(*, compiled: bool, backend: str = "inductor") -> Kernels:
    """The kernels, each compiled into one graph with ``compiled``."""
    if not compiled:
        return EAGER
    compile_ = partial(torch.compile, backend=backend, fullgraph=True)
    return Kernels(
        compile_(_sums_of_both),
        compile_(_sums_of_student),
        compile_(_gradient_of_both_),
        compile_(_gradient_of_student_),
    )


class _Vocabulary(NamedTuple):
    """This rank's part of the vocabulary: its first id, and the group that shares the vocabulary, or None."""

    first: int = 0
    group: ProcessGroup | None = None

    def total(self, sums: Tensor) -> Tensor:
        return sums if self.group is None else _all_reduce(sums, "sum", self.group)

    def largest(self, values: Tensor) -> Tensor:
        return values if self.group is None else _all_reduce(values, "max", self.group)


def _all_reduce(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x, op, group))


def _local(logits: Tensor) -> tuple[Tensor, _Vocabulary]:
    """This rank's logits [T, v], and which part of the vocabulary they are."""
    if not isinstance(logits, DTensor):
        return logits.flatten(0, -2), _Vocabulary()
    mesh = logits.device_mesh
    if mesh.ndim != 1 or logits.placements[0] not in (Shard(-1), Shard(logits.ndim - 1)):
        raise ValueError(
            f"distillation needs whole logits, or logits placed Shard(-1) on one mesh dimension, not "
            f"{logits.placements}"
        )
    # Shard splits as torch.chunk does: ceil(V / ranks) columns per rank, fewer on the last.
    first = mesh.get_local_rank() * -(-logits.shape[-1] // mesh.size())
    return logits.to_local().flatten(0, -2), _Vocabulary(first, mesh.get_group())


def _chunks(logits_TV: Tensor) -> Iterator[slice]:
    num_tokens, width = logits_TV.shape
    size = max(1, CHUNK_NUMBERS // max(1, width))
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


class _Divergence(torch.autograd.Function):
    """(student logits [T, v], source logits [T, v], valid [T], ...) -> KL of each token, fp32 [T]; 0 if not valid."""

    @staticmethod
    def forward(
        ctx: Any,
        student_Tv: Tensor,
        source_Tv: Tensor,
        valid_T: Tensor,
        vocabulary: _Vocabulary,
        temperatures: tuple[float, float],
        overwrite: bool,
        kernels: Kernels,
    ) -> Tensor:
        parts = [kernels.sums_of_both(student_Tv[rows], source_Tv[rows], *temperatures) for rows in _chunks(student_Tv)]
        local_2T, sums_3T = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        largest_2T = vocabulary.largest(local_2T)
        shift_a_T, shift_b_T = local_2T - largest_2T
        of_a_T, cross_T, of_b_T = sums_3T
        difference_T = torch.where(of_a_T * shift_a_T.exp() > 0, shift_a_T - shift_b_T, 0.0)
        sums_3T = torch.stack(
            (
                of_a_T * shift_a_T.exp(),
                (cross_T + of_a_T * difference_T) * shift_a_T.exp(),
                of_b_T * shift_b_T.exp(),
            )
        )
        of_a_T, cross_T, of_b_T = vocabulary.total(sums_3T)
        student_temperature = temperatures[0]
        loss_T = (cross_T / of_a_T - of_a_T.log() + of_b_T.log()) * student_temperature**2
        ctx.temperatures, ctx.kernels = temperatures, kernels
        ctx.overwrite = overwrite and student_Tv.dtype == source_Tv.dtype
        ctx.save_for_backward(
            student_Tv, source_Tv, valid_T, largest_2T[1] + of_b_T.log(), largest_2T[0] + of_a_T.log()
        )
        return torch.where(valid_T, loss_T, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        student_Tv, source_Tv, valid_T, student_shift_T, source_shift_T = ctx.saved_tensors
        scale_T = torch.where(valid_T, grad_T * ctx.temperatures[0], 0.0)
        # detach() shares the version counter: a second backward, which needs the logits, raises autograd's error.
        source_Tv = source_Tv.detach()
        out_Tv = source_Tv if ctx.overwrite else torch.empty_like(student_Tv)
        for rows in _chunks(student_Tv):
            source_CV = source_Tv[rows]
            ctx.kernels.gradient_of_both_(
                source_CV if ctx.overwrite else out_Tv[rows],  # one tensor: compiled kernels refuse two views of it
                student_Tv[rows],
                source_CV,
                student_shift_T[rows],
                source_shift_T[rows],
                scale_T[rows],
                *ctx.temperatures,
            )
        return out_Tv, None, None, None, None, None, None


class _TargetCrossEntropy(torch.autograd.Function):
    """(student logits [T, v], ids [T, N], weights [T, N], valid [T], ...) -> loss of each token, fp32 [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        student_Tv: Tensor,
        ids_TN: Tensor,
        weights_TN: Tensor,
        valid_T: Tensor,
        vocabulary: _Vocabulary,
        temperature: float,
        kernels: Kernels,
    ) -> Tensor:
        parts = [kernels.sums_of_student(student_Tv[rows], temperature) for rows in _chunks(student_Tv)]
        local_T, sum_T = (torch.cat(part) for part in zip(*parts, strict=True))
        largest_T = vocabulary.largest(local_T)
        column_TN = ids_TN.long() - vocabulary.first
        is_local_TN = (column_TN >= 0) & (column_TN < student_Tv.shape[1])
        column_TN = torch.where(is_local_TN, column_TN, 0)
        weights_TN = torch.where(is_local_TN, weights_TN.float(), 0.0)
        b_TN = student_Tv.gather(1, column_TN).float() / temperature - largest_T[:, None]
        # An id without weight adds 0, also where the student excludes it.
        at_ids_T = torch.where(weights_TN > 0, weights_TN * b_TN, 0.0).sum(dim=1)
        sum_T, at_ids_T, weight_T = vocabulary.total(
            torch.stack((sum_T * (local_T - largest_T).exp(), at_ids_T, weights_TN.sum(dim=1)))
        )
        loss_T = (weight_T * sum_T.log() - at_ids_T) * temperature**2
        ctx.temperature, ctx.kernels = temperature, kernels
        ctx.save_for_backward(student_Tv, column_TN, weights_TN, valid_T, largest_T + sum_T.log(), weight_T)
        return torch.where(valid_T, loss_T, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        student_Tv, column_TN, weights_TN, valid_T, shift_T, weight_T = ctx.saved_tensors
        scale_T = torch.where(valid_T, grad_T * ctx.temperature, 0.0)
        out_Tv = torch.empty_like(student_Tv)
        for rows in _chunks(student_Tv):
            student_Cv, out_Cv, columns_CN, scale_C = student_Tv[rows], out_Tv[rows], column_TN[rows], scale_T[rows]
            of_softmax_C = scale_C * weight_T[rows]
            ctx.kernels.gradient_of_student_(out_Cv, student_Cv, shift_T[rows], of_softmax_C, ctx.temperature)
            if out_Cv.dtype == torch.float32:
                out_Cv.scatter_add_(1, columns_CN, weights_TN[rows] * -scale_C[:, None])
                continue
            # The gradient at the ids is computed in fp32 and written once: adding draw after draw to a bf16 number
            # would round each time. Repeated ids, and column 0 where an id is on another rank, get the same number.
            same_CNN = columns_CN[:, :, None] == columns_CN[:, None, :]
            weight_CN = (same_CNN * weights_TN[rows][:, None, :]).sum(dim=2)
            b_CN = student_Cv.gather(1, columns_CN).float() / ctx.temperature - shift_T[rows][:, None]
            at_ids_CN = b_CN.exp() * of_softmax_C[:, None] - weight_CN * scale_C[:, None]
            index_C = torch.arange(len(columns_CN), device=columns_CN.device)[:, None]
            out_Cv.index_put_((index_C, columns_CN), at_ids_CN.to(out_Cv.dtype))
        return out_Tv, None, None, None, None, None, None


def _check_temperatures(*temperatures: float) -> None:
    if not all(0 < temperature < float("inf") for temperature in temperatures):
        raise ValueError(f"temperatures {temperatures}: each must be above 0 and finite; for T -> 0 use largest_id")


def kl_divergence(
    student: Tensor,
    source: Tensor,
    valid: Tensor,
    *,
    source_temperature: float = 1.0,
    student_temperature: float = 1.0,
    overwrite: bool = False,
    kernels: Kernels = EAGER,
) -> Tensor:
    """KL(source || student) of each token times the student's temperature squared, in nats.

    Args:
        student: logits [..., V] of any float dtype, or a DTensor of them placed ``Shard(-1)``.
        source: logits of the same shape and placement; gets no gradient.
        valid: bool [...]: whether a token counts.
        overwrite: the backward pass writes the gradient over the source's logits if the dtypes are the same. They must
            not be read afterwards.
        kernels: from :func:`build_kernels`, or eager ones.

    Returns:
        fp32 in the shape of ``valid``, differentiable by ``student``; 0 where a token does not count. A collective if
        the vocabulary is sharded.

    ValueError for other shapes, placements or temperatures.
    """
    _check_temperatures(source_temperature, student_temperature)
    if student.shape != source.shape or student.shape[:-1] != valid.shape:
        raise ValueError(
            f"student {tuple(student.shape)}, source {tuple(source.shape)} and valid {tuple(valid.shape)} differ in "
            "shape: both models need the same token ids. Nothing is padded, as padding would get probability"
        )
    student_Tv, vocabulary = _local(student)
    source_Tv, of_source = _local(source)
    if vocabulary != of_source:
        raise ValueError("the vocabularies of student and source are sharded differently: shard both in the same way")
    temperatures = (student_temperature, source_temperature)
    args = (student_Tv, source_Tv.detach(), valid.flatten(), vocabulary, temperatures, overwrite, kernels)
    return _Divergence.apply(*args).view(valid.shape)


def target_cross_entropy(
    student: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    valid: Tensor,
    *,
    student_temperature: float = 1.0,
    kernels: Kernels = EAGER,
) -> Tensor:
    """Cross-entropy of each token with a few weighted target ids, times the student's temperature squared, in nats.

    Args:
        student, kernels: as in :func:`kl_divergence`.
        ids: integers [..., N] in [0, V). An id may be repeated: its weights add up.
        weights: floats [..., N], at least 0; None for 1 / N each, as for N draws.
        valid: bool [...]: whether a token counts.

    Returns:
        As :func:`kl_divergence`. It differs from KL by the entropy of the targets, which has no gradient.

    ValueError for other shapes, placements or temperatures.
    """
    _check_temperatures(student_temperature)
    if weights is None:
        weights = torch.full(ids.shape, 1.0 / ids.shape[-1], device=ids.device)
    if not ids.shape[:-1] == student.shape[:-1] == valid.shape or weights.shape != ids.shape:
        raise ValueError(
            f"student {tuple(student.shape)}, ids {tuple(ids.shape)}, weights {tuple(weights.shape)} and valid "
            f"{tuple(valid.shape)} do not fit together: give N ids for each token of the student"
        )
    student_Tv, vocabulary = _local(student)
    targets = ids.flatten(0, -2), weights.flatten(0, -2)
    args = (student_Tv, *targets, valid.flatten(), vocabulary, student_temperature, kernels)
    return _TargetCrossEntropy.apply(*args).view(valid.shape)


def largest_id(logits: Tensor) -> Tensor:
    """The id of each token's largest logit, the smallest of those that tie: int64 [..., 1].

    A collective of 12 bytes per token if ``logits`` is sharded along the vocabulary.
    """
    local_Tv, vocabulary = _local(logits)
    largest_T, column_T = local_Tv.max(dim=-1)
    ids_T = column_T + vocabulary.first
    if vocabulary.group is not None:
        largest_T = largest_T.float()
        elsewhere = largest_T < vocabulary.largest(largest_T)
        ids_T = _all_reduce(torch.where(elsewhere, torch.iinfo(torch.int64).max, ids_T), "min", vocabulary.group)
    return ids_T.view(*logits.shape[:-1], 1)
