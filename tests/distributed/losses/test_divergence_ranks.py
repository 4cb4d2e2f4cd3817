"""losses/divergence.py with the vocabulary sharded over 2 and 3 ranks, against one process."""

from typing import Any

import pytest
import torch
from distributed.spawn import run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from titan_attent.losses.divergence import build_kernels, kl_divergence, largest_id, target_cross_entropy

V, B, L = 31, 3, 5  # the vocabulary is sharded into 16 and 15 columns, or 11, 11 and 9
CASES: dict[str, dict[str, Any]] = {
    "T = 1": {},
    "source alone": {"source_temperature": 0.5},
    "both, with T^2": {"source_temperature": 2.0, "student_temperature": 2.0},
}


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's and source's logits, which tokens count, weights of the tokens."""
    generator = torch.Generator().manual_seed(0)
    student, source = (torch.randn(B, L, V, generator=generator) * 4 for _ in range(2))
    source[0, :, 16:] = -torch.inf  # all of the second rank's ids
    source[1, 0, [3, 17, 29]] = 40.0  # equal largest logits on several ranks
    valid = torch.ones(B, L, dtype=torch.bool)
    valid[1, 2:] = False
    return student.to(dtype), source.to(dtype), valid, torch.rand(B, L, generator=generator) + 0.1


def losses(student: Tensor, source: Tensor, valid: Tensor, **options: Any) -> dict[str, Tensor]:
    ids = torch.arange(B * L * 4).view(B, L, 4) * 7 % V
    ids[..., 3] = ids[..., 0]
    of_ids = torch.tensor([0.5, 0.2, 0.1, 0.4])
    t = options.get("student_temperature", 1.0)
    kernels = build_kernels(compiled=False)
    return {
        "kl": kl_divergence(student, source, valid, kernels=kernels, **options),
        "ids": target_cross_entropy(student, ids, of_ids.expand(ids.shape), valid, student_temperature=t),
        "largest": target_cross_entropy(student, largest_id(source), None, valid, student_temperature=t),
    }


def measure(mesh: Any) -> dict[str, Any]:
    """Losses and gradients of every case, whole on every rank."""
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        student, source, valid, weights = batch(dtype)
        if mesh is not None:
            student, source = (distribute_tensor(x, mesh, [Shard(-1)]) for x in (student, source))
        results[f"largest {dtype}"] = largest_id(source).numpy()
        for name, options in CASES.items():
            student = student.detach().requires_grad_()
            for kind, found in losses(student, source, valid, **options).items():
                (gradient,) = torch.autograd.grad((found * weights).sum(), student)
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                results[f"{kind}, {name}, {dtype}"] = (found.detach().numpy(), whole.float().numpy())
    if mesh is not None:
        with pytest.raises(ValueError, match="placed Shard"):
            kl_divergence(distribute_tensor(batch()[0], mesh, [Replicate()]), source, valid)
        with pytest.raises(ValueError, match="sharded differently"):
            kl_divergence(batch()[0], distribute_tensor(batch()[1], mesh, [Shard(-1)]), valid)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (result,) = run_on_ranks(measure, 1)
    return result


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_sharded_vocabulary_changes_nothing(num_ranks: int, alone: dict[str, Any]) -> None:
    """Values, gradients with the factor T^2 (NeMo Automodel #1499), and the ids of equal largest logits."""
    for result in run_on_ranks(measure, num_ranks):
        assert result.keys() == alone.keys()
        for key, expected in alone.items():
            if key.startswith("largest torch"):
                assert (result[key] == expected).all(), key
                continue
            (loss, gradient), (expected_loss, expected_gradient) = result[key], expected
            rounding = 1e-5 if "float32" in key else 2**-8
            torch.testing.assert_close(
                torch.from_numpy(loss),
                torch.from_numpy(expected_loss),
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, key=key: f"{key}: {m}",
            )
            torch.testing.assert_close(
                torch.from_numpy(gradient),
                torch.from_numpy(expected_gradient),
                rtol=rounding,
                atol=1e-6,
                msg=lambda m, key=key: f"{key}: {m}",
            )
