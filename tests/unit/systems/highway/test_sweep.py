"""The sweep against the paper's iteration: all gradients of a round from those of the previous round."""

import copy
from collections.abc import Callable

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from torch import Tensor, nn
from torchtitan.models import deepseek_v3, llama3, llama4, qwen3
from torchtitan.models.moe import MoEArgs

from titan_attent.systems.highway.links import Cuts
from titan_attent.systems.highway.sums import Sums, enough_rounds, fitted_gains, read
from titan_attent.systems.highway.sweep import num_vjps, sweep

NUM_BLOCKS = 4
Gradients = dict[str, Tensor]


class Block(nn.Module):
    """h + g(h), with the arguments of a block of a model."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, h: Tensor, rope: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(self.norm(h)))) * rope


class Stack(nn.Module):
    def __init__(self, dim: int = 6, num_tokens: int = 11):
        super().__init__()
        self.tok_embeddings, self.output = nn.Embedding(num_tokens, dim), nn.Linear(dim, num_tokens)
        self.layers = nn.ModuleDict({str(i): Block(dim) for i in range(NUM_BLOCKS)})

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, torch.ones(()))
        return self.output(h)


SMALL = {"dim": 32, "n_layers": NUM_BLOCKS, "n_heads": 4, "vocab_size": 512, "max_seq_len": 8}
EXPERTS = MoEArgs(num_experts=4, num_shared_experts=1, top_k=2, score_func="softmax", use_grouped_mm=False)
QWEN3 = SMALL | {"n_kv_heads": 2, "head_dim": 8, "hidden_dim": 64}
DEEPSEEK = {"inter_dim": 64, "moe_inter_dim": 32, "n_dense_layers": 1, "moe_args": EXPERTS, "q_lora_rank": 0}
DEEPSEEK |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "stack": Stack,
    "llama3": lambda: llama3.Transformer(llama3.TransformerModelArgs(**SMALL, n_kv_heads=2, multiple_of=16)),
    "llama4": lambda: llama4.Transformer(llama4.TransformerModelArgs(**SMALL, multiple_of=16, moe_args=EXPERTS)),
    "qwen3 tied": lambda: qwen3.Qwen3Model(qwen3.Qwen3ModelArgs(**QWEN3, enable_weight_tying=True)),
    "deepseek_v3": lambda: deepseek_v3.DeepSeekV3Model(deepseek_args()),
}


def deepseek_args() -> deepseek_v3.DeepSeekV3ModelArgs:
    args = deepseek_v3.DeepSeekV3ModelArgs(**SMALL, **DEEPSEEK)
    args.moe_impl = "standard"  # as update_from_config would
    return args


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape) / max(1, weight.shape[-1]) ** 0.5
    return model.double()


def loss_of(model: nn.Module) -> Tensor:
    tokens = torch.arange(16).reshape(2, 8) * 5 % 11
    return torch.nn.functional.cross_entropy(model(tokens).transpose(1, 2), tokens.roll(1, 1), reduction="sum")


def gradients(model: nn.Module) -> Gradients:
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }


def exact(model: nn.Module) -> Gradients:
    model = copy.deepcopy(model)
    loss_of(model).backward()
    return gradients(model)


def highway(
    model: nn.Module, rounds: int, *, gains: Tensor | None = None, sums: Sums | None = None, inputs: bool = True
) -> Gradients:
    model = copy.deepcopy(model)
    cuts = Cuts(list(model.layers.children()), root=model, needs_input_gradients=lambda: inputs)
    loss_of(model).backward()
    top = cuts.gradient()
    assert top is not None
    cuts.send_below(sweep(cuts.links, top, iterations=rounds, gains=gains, sums=sums))
    assert all(link.x.grad is None for link in cuts.links), "an input gradient that was not requested"
    cuts.remove()
    return gradients(model)


def literal(model: nn.Module, rounds: int, gains: list[float]) -> tuple[Gradients, list[list[Tensor]]]:
    """Section 3 of the paper with K_i = c_i I: (gradients, w[m][i])."""
    model = copy.deepcopy(model)
    states: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in model.layers.children()
    ]
    handles.append(list(model.layers.children())[-1].register_forward_hook(lambda *args: states.append(args[2])))
    loss = loss_of(model)
    for handle in handles:
        handle.remove()

    def times_jacobian(i: int, w: Tensor) -> Tensor:
        return torch.autograd.grad(states[i + 1], states[i], w, retain_graph=True)[0]

    (g,) = torch.autograd.grad(loss, states[-1], retain_graph=True)
    w = [g]
    for c in reversed(gains):
        w.insert(0, c * w[0])
    history = [w]
    for _ in range(rounds):
        v = [times_jacobian(i, w[i + 1]) for i in range(NUM_BLOCKS)]  # all at once, from the previous round
        new = [g]
        for i in reversed(range(NUM_BLOCKS)):
            new.insert(0, gains[i] * new[0] + v[i] - gains[i] * w[i + 1])
        w = new
        history.append(w)
    found = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}

    def add(output: Tensor, gradient: Tensor, part: nn.Module) -> None:
        ids = {id(weight) for weight in part.parameters()}
        named = [(name, weight) for name, weight in model.named_parameters() if id(weight) in ids]
        values = torch.autograd.grad(
            output, [weight for _, weight in named], gradient, retain_graph=True, allow_unused=True
        )
        for (name, _), value in zip(named, values, strict=True):
            if value is not None:
                found[name] += value

    for i, block in enumerate(model.layers.children()):
        add(states[i + 1], w[i + 1], block)
    add(states[0], w[0], model.tok_embeddings)
    # The head, after the last block: make its input a leaf.
    top = states[-1].detach().requires_grad_()
    handle = list(model.layers.children())[-1].register_forward_hook(lambda *_: top)
    head_gradients = torch.autograd.grad(loss_of(model), list(model.parameters()), allow_unused=True)
    for name, value in zip(found, head_gradients, strict=True):
        if value is not None:
            found[name] += value
    handle.remove()
    return found, history


def check(found: Gradients, expected: Gradients, *, rtol: float = 1e-10) -> None:
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= rtol * gradient.norm().clamp_min(1e-12), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rounds", range(NUM_BLOCKS + 1))
def test_it_is_the_papers_iteration(name: str, rounds: int) -> None:
    model = model_of(name)
    expected, _ = literal(model, rounds, [1.0] * NUM_BLOCKS)
    check(highway(model, rounds, inputs=rounds > 0), expected)
    far = max(float((expected[n] - g).norm() / g.norm().clamp_min(1e-12)) for n, g in exact(model).items())
    assert (far < 1e-10) == (rounds == NUM_BLOCKS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rounds", [NUM_BLOCKS, NUM_BLOCKS + 3])
def test_with_as_many_rounds_as_blocks_it_is_backpropagation(name: str, rounds: int) -> None:
    model = model_of(name)
    check(highway(model, rounds), exact(model))


@pytest.mark.parametrize("rounds", range(1, NUM_BLOCKS + 1))
def test_gains_of_the_residual_path(rounds: int) -> None:
    model, gains = model_of("stack"), [0.5, 1.25, 0.75, 1.5]
    expected, _ = literal(model, rounds, gains)
    check(highway(model, rounds, gains=torch.tensor(gains)), expected)


@pytest.mark.parametrize("wants_exact", [False, True])
@pytest.mark.parametrize("rounds", range(NUM_BLOCKS + 1))
def test_measured_sums(rounds: int, wants_exact: bool) -> None:
    model = model_of("llama3")
    sums = Sums(NUM_BLOCKS, rounds, wants_exact=wants_exact, device=torch.device("cpu"))
    check(highway(model, rounds, sums=sums), literal(model, rounds, [1.0] * NUM_BLOCKS)[0])
    _, history = literal(model, NUM_BLOCKS, [1.0] * NUM_BLOCKS)
    measurements = read(sums.table)
    for m, change in enumerate(measurements.changes, 1):
        ratios = [(history[m][i] - history[m - 1][i]).norm() / history[m][i].norm() for i in range(NUM_BLOCKS)]
        assert change == pytest.approx(float(sum(ratios)) / NUM_BLOCKS, rel=1e-4)
    assert len(measurements.changes) == rounds and len(measurements.cosines) == (NUM_BLOCKS if wants_exact else 0)
    for i, cosine in enumerate(measurements.cosines):
        expected = torch.cosine_similarity(history[rounds][i + 1].flatten(), history[-1][i + 1].flatten(), dim=0)
        assert cosine == pytest.approx(float(expected), abs=1e-5)


def test_gains_are_fitted_to_what_blocks_do_to_gradients() -> None:
    model = model_of("stack")
    sums = Sums(NUM_BLOCKS, 1, wants_exact=False, device=torch.device("cpu"))
    highway(model, 1, sums=sums)
    _, history = literal(model, 1, [1.0] * NUM_BLOCKS)
    g = history[0][-1]
    # w^1_i - w^1_{i+1} = g J_i - g
    products = [history[1][i] - history[1][i + 1] + g for i in range(NUM_BLOCKS)]
    expected = [float((g * product).sum() / (g * g).sum()) for product in products]
    assert fitted_gains(sums.table).tolist() == pytest.approx(expected, rel=1e-5)
    nothing = Sums(NUM_BLOCKS, 1, wants_exact=False, device=torch.device("cpu"))
    assert fitted_gains(nothing.table).tolist() == [1.0] * NUM_BLOCKS


class Counted:
    """A link that counts its passes; J = 1."""

    def __init__(self) -> None:
        self.inputs = self.weights = 0

    def input_gradient(self, w: Tensor) -> Tensor:
        self.inputs += 1
        return 1 * w

    def weight_gradients(self, w: Tensor) -> None:
        self.weights += 1

    def both(self, w: Tensor) -> Tensor:
        self.weights += 1
        return self.input_gradient(w)


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 8])
def test_the_number_of_passes(num_blocks: int) -> None:
    for k in range(num_blocks + 2):
        for measured, wants_exact in ((False, False), (True, False), (True, True)):
            links = [Counted() for _ in range(num_blocks)]
            sums = Sums(num_blocks, min(k, num_blocks), wants_exact=wants_exact, device=torch.device("cpu"))
            sweep(links, torch.ones(3), iterations=k, sums=sums if measured else None)
            total = sum(link.inputs for link in links)
            assert total == num_vjps(num_blocks, k, complete=measured, exact_too=wants_exact), (
                k,
                measured,
                wants_exact,
            )
            assert all(link.weights == 1 for link in links)
    assert [num_vjps(num_blocks, k) for k in (0, 1, num_blocks)] == [0, num_blocks, num_blocks]


def test_low_precision_is_summed_in_fp32() -> None:
    class Bf16(Counted):
        def input_gradient(self, w: Tensor) -> Tensor:
            assert w.dtype == torch.float32
            return w * 1.001

        def weight_gradients(self, w: Tensor) -> None:
            self.dtype = w.dtype

    links = [Bf16() for _ in range(4)]
    below = sweep(links, torch.full((3,), 1.0, dtype=torch.bfloat16), iterations=2)
    assert below.dtype == links[0].dtype == torch.float32
    assert float(below[0]) == pytest.approx(
        1 + 4e-3 + 6e-6, abs=1e-6
    )  # paths through at most two blocks; in bf16 the sum would be 1
    sweep(links, torch.ones(3, dtype=torch.bfloat16), iterations=0)
    assert links[0].dtype == torch.bfloat16  # without rounds nothing is added


def test_frozen_weights_get_no_gradient() -> None:
    model = model_of("stack")
    for i, frozen in enumerate(("layers.1", "tok_embeddings")):
        model.get_submodule(frozen).requires_grad_(False)
        for rounds in (0, 2, NUM_BLOCKS):
            found = highway(model, rounds, inputs=rounds > 0)
            whole = copy.deepcopy(model).requires_grad_(True)
            expected, _ = literal(whole, rounds, [1.0] * NUM_BLOCKS)
            for name, gradient in expected.items():
                is_frozen = name.startswith(("layers.1", "tok_embeddings")[: i + 1])
                check({name: found[name]}, {name: 0 * gradient if is_frozen else gradient})


def test_a_pass_that_is_not_to_be_cut_stays_whole() -> None:
    model = model_of("stack")
    cuts = Cuts(list(model.layers.children()), root=model, needs_input_gradients=lambda: None)
    expected = exact(model)
    loss_of(model).backward()
    assert cuts.gradient() is None and not cuts.links
    check(gradients(model), expected)
    cuts.needs_input_gradients = lambda: True
    with torch.no_grad():
        loss_of(model)
    model.eval()
    loss_of(model)
    assert not cuts.links, "cut without gradients, or in eval mode"


def test_the_number_of_rounds() -> None:
    assert enough_rounds([0.5, 0.2, 0.05], tolerance=0.3) == 2
    assert enough_rounds([0.5, 0.4, 0.3], tolerance=0.3) == 3
    assert enough_rounds([float("nan")] * 3, tolerance=0.3) == 3
    assert enough_rounds([0.0], tolerance=0.3) == 1
