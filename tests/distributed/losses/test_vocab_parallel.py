"""losses/vocab_parallel.py on 2 and 3 ranks: sharded vocabulary and sharded sequences against one process."""

from typing import Any

import pytest
import torch
from distributed.spawn import run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from titan_attent.losses.cross_entropy import IGNORE_INDEX, weighted_cross_entropy
from titan_attent.losses.vocab_parallel import build_vocab_parallel_loss, whole_example_means
from titan_attent.losses.window import CappedLinear

V, L = 31, 12  # the vocabulary is sharded into 11, 11 and 9 columns
WEIGHTS_B = torch.tensor([0.25, 1.0, 3.5, 2.0])
CASES = {
    "plain": {},
    "without gradients": {"with_gradient": False},
    "bfloat16": {"dtype": torch.bfloat16},
    "large logits": {"scale": 2000.0},
}


def batch(*, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Rows with all tokens valid, some ignored, none valid, one valid."""
    generator = torch.Generator().manual_seed(0)
    logits_BLV = (torch.randn(4, L, V, generator=generator) * scale).to(dtype)
    labels_BL = torch.randint(0, V, (4, L), generator=generator)
    labels_BL[1, 3:7] = IGNORE_INDEX
    labels_BL[2] = IGNORE_INDEX
    labels_BL[3, 1:] = IGNORE_INDEX
    return logits_BLV, labels_BL


def cut_vocabulary(mesh: Any, *, with_gradient: bool = True, **kind: Any) -> dict[str, Any]:
    logits_BLV, labels_BL = batch(**kind)
    cut = distribute_tensor(logits_BLV, mesh, [Shard(-1)]).requires_grad_()
    loss = build_vocab_parallel_loss(compile_loss=False, with_gradient=with_gradient)
    weighted, unweighted, means_B, norms_B, counts_B = loss(cut, labels_BL, WEIGHTS_B)
    (weighted / 7).backward()
    assert isinstance(cut.grad, DTensor) and counts_B.tolist() == [12, 8, 0, 1]
    return {
        "weighted": weighted.item(),
        "unweighted": unweighted.item(),
        "means": means_B.numpy(),
        "norms": None if norms_B is None else norms_B.numpy(),
        "gradient": cut.grad.full_tensor().float().numpy(),
    }


def cut_sequences(mesh: Any) -> tuple[Any, Any]:
    """Three shards with different numbers of valid tokens; the last row has valid tokens on the first rank only."""
    logits_BLV, labels_BL = batch()
    logits_BlV, labels_Bl = (x.chunk(3, dim=1)[mesh.get_local_rank()] for x in (logits_BLV, labels_BL))
    _, _, means_B, norms_B, counts_B = weighted_cross_entropy(logits_BlV, labels_Bl, WEIGHTS_B, with_gradient=True)
    means_B, norms_B = whole_example_means(means_B, norms_B, counts_B, group=mesh.get_group())
    only, none = whole_example_means(means_B, None, torch.ones(4), group=mesh.get_group())
    assert none is None and torch.allclose(only, means_B)
    assert norms_B is not None
    return means_B.numpy(), norms_B.numpy()


def measure(mesh: Any) -> dict[str, Any]:
    results: dict[str, Any] = {name: cut_vocabulary(mesh, **case) for name, case in CASES.items()}
    results["sequences"] = cut_sequences(mesh)
    logits_BLV, labels_BL = batch()
    cut, statistics = distribute_tensor(logits_BLV, mesh, [Shard(-1)]), torch.tensor([2.0, 6.0, 1.5])
    rule = CappedLinear(0.5)
    by_loss = build_vocab_parallel_loss(compile_loss=False, rule=rule)(cut, labels_BL, WEIGHTS_B, statistics)
    whole = weighted_cross_entropy(logits_BLV, labels_BL, WEIGHTS_B, statistics, rule=rule)
    torch.testing.assert_close(by_loss[:3], whole[:3])
    unfollowed = weighted_cross_entropy(logits_BLV, labels_BL, WEIGHTS_B)
    assert not torch.isclose(whole.weighted_sum, unfollowed.weighted_sum)
    with pytest.raises(ValueError, match="not a plain tensor: set parallelism.disable_loss_parallel"):
        build_vocab_parallel_loss(compile_loss=False)(*batch(), WEIGHTS_B)
    whole = distribute_tensor(batch()[0], mesh, [Replicate()])
    with pytest.raises(ValueError, match="Replicate"):
        build_vocab_parallel_loss(compile_loss=False)(whole, batch()[1], WEIGHTS_B)
    return results


SPANS = [0] * 5 + [3] * 4 + [1] * 3 + [2] * 3 + [1] * 6 + [0] * 4 + [3] * 13 + [1] * 10  # 0, 1 and 3 in both halves
PACKED_WEIGHTS = torch.tensor([0.25, 1.0, 3.5, 2.0, 1.0])  # the last example has no token


def packed(mesh: Any, compile_loss: bool) -> dict[str, Any]:
    """The batch as one packed row: on 2 ranks with half of the vocabulary or of the tokens each, or on one."""
    logits, labels = (x.flatten(0, 1) for x in batch())
    index, statistics = torch.tensor(SPANS), torch.tensor([2.0, 6.0, 1.5])
    options: dict[str, Any] = {"with_gradient": True, "rule": CappedLinear(0.5)}
    if mesh is None:
        z = logits.clone().requires_grad_()
        losses = weighted_cross_entropy(z, labels, PACKED_WEIGHTS, statistics, example_index=index, **options)
        halves = losses
    else:
        z = distribute_tensor(logits, mesh, [Shard(-1)]).requires_grad_()
        loss = build_vocab_parallel_loss(compile_loss=compile_loss, backend="aot_eager", **options)
        losses = loss(z, labels, PACKED_WEIGHTS, statistics, example_index=index)
        z_half, labels_half, index_half = (x.chunk(2)[mesh.get_local_rank()] for x in (logits, labels, index))
        halves = weighted_cross_entropy(
            z_half, labels_half, PACKED_WEIGHTS, example_index=index_half, with_gradient=True
        )
    losses.weighted_sum.backward()
    means, norms = halves.losses, halves.gradients
    if mesh is not None:
        means, norms = whole_example_means(means, norms, halves.counts, group=mesh.get_group())
    assert z.grad is not None and norms is not None
    gradient = z.grad.full_tensor() if isinstance(z.grad, DTensor) else z.grad
    tensors = {**losses._asdict(), "gradient of logits": gradient, "means of halves": means, "norms of halves": norms}
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("compile_loss", [False, True])
def test_packed_tokens_of_a_cut_vocabulary_or_sequence_are_those_of_one_process(compile_loss: bool) -> None:
    (expected,) = run_on_ranks(packed, 1, compile_loss)
    assert len(set(expected["losses"].tolist())) == 5 and expected["counts"].tolist()[4] == 0
    for rank in run_on_ranks(packed, 2, compile_loss):
        for name, values in expected.items():
            assert rank[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return run_on_ranks(measure, 3)


def plain(**kind: Any) -> dict[str, Any]:
    """The expected values in float64, from the definitions."""
    logits_BLV, labels_BL = batch(**kind)
    z_BLV = logits_BLV.double().requires_grad_()
    log_p = z_BLV.log_softmax(-1)
    valid_BL = labels_BL != IGNORE_INDEX
    counts_B = valid_BL.sum(1).clamp(min=1)
    onehot = F.one_hot(labels_BL.clamp(min=0), V)
    loss_BL = torch.where(valid_BL, -(log_p * onehot).sum(-1), 0.0)
    weighted = (loss_BL.sum(1) * WEIGHTS_B).sum()
    (weighted / 7).backward()
    assert z_BLV.grad is not None
    squared_BL = torch.where(valid_BL, (log_p.exp() - onehot).square().sum(-1), 0.0)
    return {
        "weighted": weighted.item(),
        "unweighted": loss_BL.sum().item(),
        "means": (loss_BL.sum(1) / counts_B).detach().numpy(),
        "norms": (squared_BL.sum(1) / counts_B).sqrt().detach().numpy(),
        "gradient": z_BLV.grad.numpy(),
    }


@pytest.mark.parametrize("name", CASES)
def test_cut_vocabulary_is_the_whole_one(measured: list[dict[str, Any]], name: str) -> None:
    case = dict(CASES[name])
    with_gradient = case.pop("with_gradient", True)
    expected = plain(**case)
    for rank in measured:
        actual = rank[name]
        assert actual["weighted"] == pytest.approx(expected["weighted"], rel=1e-5)
        assert actual["unweighted"] == pytest.approx(expected["unweighted"], rel=1e-5)
        assert actual["means"] == pytest.approx(expected["means"], rel=1e-5, abs=1e-6)
        if with_gradient:
            assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-4, abs=1e-3)
        else:
            assert actual["norms"] is None
        rounding = 1e-2 if case.get("dtype") is torch.bfloat16 else 1e-5
        assert actual["gradient"] == pytest.approx(expected["gradient"], rel=rounding, abs=1e-6)
        # Equal bit for bit on all ranks, as decisions depend on them.
        assert actual["means"].tobytes() == measured[0][name]["means"].tobytes()


def test_cut_sequences_give_the_means_of_whole_examples(measured: list[dict[str, Any]]) -> None:
    expected = plain()
    for rank in measured:
        means, norms = rank["sequences"]
        assert means == pytest.approx(expected["means"], rel=1e-5)
        assert norms == pytest.approx(expected["norms"], rel=1e-4)
