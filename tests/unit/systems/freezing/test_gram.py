"""Gram matrices of per-example gradients against the gradients themselves, in fp64, for torchtitan's models."""

import copy
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from distributed.parallel_world import plain_model
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.systems.freezing import gram
from titan_attent.systems.freezing.capture import Capture
from titan_attent.systems.freezing.gram import principal_eigenvalues
from titan_attent.systems.freezing.probe import mean_losses, probe_ids, projected_logits, signs
from titan_attent.systems.freezing.units import Unit, find_units, plain_name

NUM_EXAMPLES, SEQ_LEN, VOCAB = 3, 16, 512
WITHOUT_MATRIX = ("norm.weight", "sinks")
CELLS = {
    "llama3": {},
    "qwen3": {"model.name": "qwen3_attent"},
    "qwen3, tied": {"model.name": "qwen3_attent", "model.flavor": "tied"},
    "qwen3, experts": {"model.name": "qwen3_attent", "model.flavor": "moe"},
    "llama4": {"model.name": "llama4_attent"},
    "deepseek_v3": {"model.name": "deepseek_v3_attent"},
    "gpt_oss": {"model.name": "gpt_oss_attent"},
}


def model_of(cell: str) -> tuple[nn.Module, list[Unit], torch.Tensor, torch.Tensor]:
    model = plain_model({"training.seq_len": SEQ_LEN, **CELLS[cell]}).double()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (NUM_EXAMPLES, SEQ_LEN + 1), generator=generator)
    return model, find_units(model, seq_len=SEQ_LEN), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def scalar(kind: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return projected_logits(logits, 5, labels) if kind == "ntk" else mean_losses(logits, labels)


def logits_of(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    masks = {}
    if getattr(model.model_args, "attn_type", "sdpa") == "flex":
        masks["attention_masks"] = model.get_attention_masks(inputs, None, {})
    return model(inputs, **masks)


def brute_force(kind: str, model: nn.Module, units: list[Unit], inputs: Any, labels: Any) -> torch.Tensor:
    """The Gram matrices [U, n, n], by one backward pass per example."""
    rows = []
    for i in range(NUM_EXAMPLES):
        model.zero_grad()
        example = slice(i, i + 1)
        scalar(kind, logits_of(model, inputs[example]), labels[example]).backward()
        named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        rows.append(
            [
                torch.cat(
                    [
                        torch.zeros(parameter.numel()).double() if parameter.grad is None else parameter.grad.flatten()
                        for name, parameter in named.items()
                        if not name.endswith(WITHOUT_MATRIX) and any(parameter is own for own in unit.parameters)
                    ]
                )
                for unit in units
            ]
        )
    stacked = [torch.stack([row[u] for row in rows]) for u in range(len(units))]
    model.zero_grad()
    return torch.stack([matrix @ matrix.T for matrix in stacked])


@pytest.mark.parametrize("kind", ["ntk", "loss"])
@pytest.mark.parametrize("cell", CELLS)
def test_against_gradients_of_single_examples(cell: str, kind: str) -> None:
    model, units, inputs, labels = model_of(cell)
    expected = brute_force(kind, model, units, inputs, labels)
    with Capture(units, num_examples=NUM_EXAMPLES) as capture:
        logits = logits_of(model, inputs)
        grams = capture.grams(scalar(kind, logits, labels))
    assert grams.shape == (len(units), NUM_EXAMPLES, NUM_EXAMPLES)
    for unit, ours, theirs in zip(units, grams, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max())), unit.name
        assert theirs.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())  # no forward stays wrapped


def ignored(labels: torch.Tensor) -> torch.Tensor:
    """Ignore no label of the first example, all but one of the second, and every third of the third."""
    labels = labels.clone()
    labels[1, 1:] = labels[2, ::3] = IGNORE_INDEX
    return labels


@pytest.mark.parametrize("cell", ["llama3", "qwen3, tied", "qwen3, experts"])
def test_ignored_labels_leave_the_mean_over_the_others(cell: str) -> None:
    """Against the gradient of each example's mean loss over its tokens with a valid label."""
    model, units, inputs, labels = model_of(cell)
    labels = ignored(labels)
    with Capture(units, num_examples=NUM_EXAMPLES) as capture:
        grams = capture.grams(mean_losses(logits_of(model, inputs), labels))
    rows = []
    for one, own in zip(inputs, labels, strict=True):
        valid = own != IGNORE_INDEX
        loss = -logits_of(model, one[None])[0].log_softmax(-1)[valid, own[valid]].mean()
        weights = [weight for unit in units for weight in unit.parameters]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        names = {id(weight): plain_name(name) for name, weight in model.named_parameters()}
        rows.append(
            {
                id(weight): gradient.flatten()
                for weight, gradient in zip(weights, found, strict=True)
                if gradient is not None and not names[id(weight)].endswith(WITHOUT_MATRIX)
            }
        )
    for unit, ours in zip(units, grams, strict=True):
        vectors = [torch.cat([row[id(w)] for w in unit.parameters if id(w) in row]) for row in rows]
        theirs = torch.tensor([[float(a @ b) for b in vectors] for a in vectors], dtype=torch.float64)
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max())), unit.name


def test_logits_of_ignored_labels_get_no_gradient() -> None:
    logits = torch.randn(NUM_EXAMPLES, SEQ_LEN, VOCAB, generator=torch.Generator().manual_seed(2)).double()
    logits.requires_grad_()
    _, _, _, labels = model_of("llama3")
    assert projected_logits(logits, 5, labels).item() == pytest.approx(projected_logits(logits, 5).item(), rel=1e-12)
    labels = ignored(labels)
    (gradient,) = torch.autograd.grad(projected_logits(logits, 5, labels), logits)
    valid = labels != IGNORE_INDEX
    assert torch.equal(gradient.abs().sum(-1) > 0, valid)
    # The entries are signs divided by the root of their number, so each example's squared norm is 1.
    assert gradient.square().sum(dim=(1, 2)).tolist() == pytest.approx([1.0] * NUM_EXAMPLES, rel=1e-12)
    labels[0] = IGNORE_INDEX
    assert mean_losses(logits[:1], labels[:1]).item() == projected_logits(logits[:1], 5, labels[:1]).item() == 0


def test_eigenvalues_are_those_of_the_kernel_of_torch_func() -> None:
    """The kernel J J' of one module of a llama, by a Jacobian over that module's weights."""
    model, units, inputs, _ = model_of("llama3")
    with Capture(units, num_examples=NUM_EXAMPLES) as capture:
        grams = capture.grams(projected_logits(model(inputs), 5))
    name = "layers.2.feed_forward"
    weights = {key: value.detach() for key, value in model.named_parameters() if key.startswith(name + ".")}

    def projections(own: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = functional_call(model, own, (inputs,))
        return torch.stack([projected_logits(logits[i : i + 1], 5) for i in range(NUM_EXAMPLES)])

    jacobian = torch.cat([part.flatten(1) for part in jacrev(projections)(weights).values()], dim=1)
    expected = torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1]
    index = [unit.name for unit in units].index(name)
    assert principal_eigenvalues(grams)[index].item() == pytest.approx(expected.item(), rel=1e-9)


def test_heads_share_out_the_matrices_of_queries_and_outputs() -> None:
    model, units, inputs, labels = model_of("llama3")
    heads = model.model_args.n_heads
    with Capture(units, num_examples=NUM_EXAMPLES, num_heads=heads) as capture:
        logits = model(inputs)
        capture.grams(mean_losses(logits, labels))
    gradients = []
    for i in range(NUM_EXAMPLES):
        model.zero_grad()
        mean_losses(model(inputs[i : i + 1]), labels[i : i + 1]).backward()
        attention = model.layers["1"].attention
        rows, columns = attention.wq.weight.grad.chunk(heads), attention.wo.weight.grad.chunk(heads, dim=1)
        gradients.append([torch.cat([r.flatten(), c.flatten()]) for r, c in zip(rows, columns, strict=True)])
    for head, ours in enumerate(capture.heads["layers.1.attention"]):
        matrix = torch.stack([gradient[head] for gradient in gradients])
        assert torch.allclose(ours, matrix @ matrix.T, rtol=1e-9, atol=1e-12)
    assert len(capture.heads) == 4 and len(capture.heads["layers.0.attention"]) == heads


@pytest.mark.parametrize("length, width", [(3, 40), (200, 4)])
def test_both_ways_of_a_linear_layer(length: int, width: int) -> None:
    a, g = torch.randn(4, length, width).double(), torch.randn(4, length, 2 * width + 600).double()
    gradients = torch.einsum("itp,itq->ipq", a, g).flatten(1)
    for way in (gram.ghost_gram, gram.column_gram, gram.linear_gram):
        assert torch.allclose(way(a, g), gradients @ gradients.T, rtol=1e-10, atol=1e-8)


def test_the_cheaper_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("ghost_gram", "column_gram"):
        monkeypatch.setattr(gram, name, lambda a, g, name=name: taken.append(name))
    gram.linear_gram(torch.zeros(4, 8, 64), torch.zeros(4, 8, 64))
    gram.linear_gram(torch.zeros(4, 512, 8), torch.zeros(4, 512, 8))
    assert taken == ["ghost_gram", "column_gram"]


def test_a_bias_is_a_column_of_ones() -> None:
    g = torch.randn(3, 5, 7).double()
    assert torch.allclose(gram.bias_gram(g), gram.linear_gram(torch.ones(3, 5, 1).double(), g))


def test_a_matrix_that_is_not_finite_has_no_eigenvalue() -> None:
    grams = torch.eye(3).repeat(2, 1, 1)
    grams[1, 0, 1] = float("inf")
    first, second = principal_eigenvalues(grams).tolist()
    assert first == pytest.approx(1) and second != second


def test_checkpointing_changes_nothing() -> None:
    model, units, inputs, labels = model_of("llama3")
    expected = brute_force("loss", model, units, inputs, labels)
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.layers["1"] = checkpoint_wrapper(model.layers["1"], preserve_rng_state=False)
    units = find_units(model, seq_len=SEQ_LEN)
    with Capture(units, num_examples=NUM_EXAMPLES) as capture:
        logits = model(inputs)
        grams = capture.grams(mean_losses(logits, labels))
    assert torch.allclose(grams, expected, rtol=1e-9, atol=1e-12)


def test_signs_are_balanced_and_differ_between_keys() -> None:
    values = torch.stack([signs(300, key, device=torch.device("cpu")) for key in range(200)])
    assert set(values.unique().tolist()) == {-1.0, 1.0} and abs(values.mean()) < 0.02
    products = values @ values.T / 300
    products.fill_diagonal_(0)
    assert products.abs().max() < 0.4 and products.std() == pytest.approx(300**-0.5, rel=0.05)


def test_the_mean_over_signs_is_the_kernel() -> None:
    """A linear map has a known Jacobian: its kernel, contracted over the outputs, is V sum_t a_it . a_jt / T V."""
    a = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    total = torch.zeros(2, 2).double()
    for key in range(800):
        weight = torch.zeros(5, 4).double().requires_grad_()
        scalars = [projected_logits(a[i : i + 1] @ weight.T, key) for i in range(2)]
        matrix = torch.stack([torch.autograd.grad(scalar, weight)[0].flatten() for scalar in scalars])
        total += matrix @ matrix.T
    expected = torch.einsum("itp,jtp->ij", a, a) / 3
    assert torch.allclose(total / 800, expected, atol=0.1 * float(expected.abs().max()))


def test_probe_ids_are_distinct_and_depend_on_the_seed_only() -> None:
    ids = probe_ids(50, groups=5, size=4, seed=2)
    assert ids.shape == (5, 4) and len(set(ids.flatten().tolist())) == 20 and ids.max() < 50
    assert ids.equal(probe_ids(50, groups=5, size=4, seed=2)) and not ids.equal(probe_ids(50, groups=5, size=4, seed=3))


def test_the_loss_of_a_probe() -> None:
    logits, labels = torch.randn(3, 4, 9).double(), torch.randint(9, (3, 4))
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1).sum()
    assert mean_losses(logits, labels).item() == pytest.approx(expected.item())


def test_the_modules_of_a_model_hold_every_parameter_once() -> None:
    for cell in CELLS:
        model, units, _, _ = model_of(cell)
        held = [id(parameter) for unit in units for parameter in unit.parameters]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters()), cell
        names = [unit.name for unit in units]
        assert names[0] == "tok_embeddings" and names[1] == "layers.0.attention"
        assert ("output" in names) == (cell != "qwen3, tied")


def test_a_parameter_of_an_unknown_module_is_named() -> None:
    model = copy.deepcopy(model_of("llama3")[0])
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r'the parameter "extra.weight" belongs to no module'):
        find_units(model, seq_len=SEQ_LEN)
