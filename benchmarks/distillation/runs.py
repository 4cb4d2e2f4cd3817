"""Trains a source and its students, in a plain loop with the package's schedule.

A student's loss is the divergence from the source alone (``label_weight = 0``), as in the reference code: torch's
cross-entropy with the source's probabilities, which has the gradient of losses/divergence.py and is quicker for a few
numbers. Sources see other rows than students. Students of one seed have the same first weights, the same rows in the
same order, and one constant learning rate.

The logits of a checkpoint on the student's rows are computed once and kept in memory for all arms of a seed; every arm
is charged for the passes that it uses.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from benchmarks.distillation.arms import LAST, MIDDLE, Arm, named_checkpoints, phases
from benchmarks.distillation.problems import Problem
from titan_attent.losses.cross_entropy import IGNORE_INDEX

BLOCK = 64
"""Steps whose rows are generated at once."""
WARMUP = 20
"""Steps over which the learning rate rises."""

Loss = Callable[[Tensor, Tensor, int], Tensor]
"""(logits, labels, 0-based step) -> scalar."""


def of_labels(logits: Tensor, labels: Tensor, step: int) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)


def measured(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(accuracy, mean loss) of logits [n, V] on labels [n]."""
    return (logits.argmax(-1) == labels).double().mean().item(), cross_entropy(logits, labels).item()


def evaluate(model: nn.Module, rows: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(accuracy, mean loss) on the labels of rows."""
    counts = rows[1] != IGNORE_INDEX
    with torch.no_grad():
        return measured(model(rows[0])[counts], rows[1][counts])


def warm_up(problem: Problem, optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = problem.learning_rate * min(1.0, (step + 1) / WARMUP)


def batches(
    problem: Problem, seed: int, *, steps: int, source: bool, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the 0-based steps ``first`` to ``steps`` - 1."""
    for step in range(first, steps, BLOCK):
        inputs, labels = problem.training_rows(seed, step=step, steps=min(BLOCK, steps - step), source=source)
        yield from zip(inputs.split(problem.batch), labels.split(problem.batch), strict=True)


def train(
    problem: Problem,
    model: nn.Module,
    loss: Loss,
    *,
    seed: int,
    steps: int,
    source: bool = False,
    target: float = math.inf,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[int, tuple[float, float]]:
    """Step -> (accuracy, loss) on the held-out rows. Ends early where the accuracy is ``target``.

    Args:
        after_step: called with every step, from 1, and its training loss.
    """
    optimizer, held_out, curve = problem.optimizer(model.parameters()), problem.held_out(seed), {}
    for step, (inputs, labels) in enumerate(batches(problem, seed, steps=steps, source=source)):
        warm_up(problem, optimizer, step)
        optimizer.zero_grad()
        value = loss(model(inputs), labels, step)
        value.backward()
        optimizer.step()
        after_step(step + 1, value.item())
        if (step + 1) % problem.every == 0:
            curve[step + 1] = evaluate(model, held_out)
            if curve[step + 1][0] >= target:
                break
    return curve


class Source:
    """A trained source: its checkpoints, the losses of its training, and its logits on the students' rows.

    Args:
        file: where its weights are kept, or will be.
    """

    def __init__(self, problem: Problem, seed: int, file: Path):
        self.problem, self.seed = problem, seed
        self._logits: dict[tuple[int, int, int], Tensor] = {}
        if not file.is_file():
            self._train(file)
        stored = torch.load(file, weights_only=True)
        if stored["identity"] != problem.identity():
            raise ValueError(f"{file} is the source of other sizes: name another --output, or remove {file}")
        self.losses: dict[int, float] = stored["losses"]
        self.curve: dict[int, tuple[float, float]] = stored["curve"]
        self.weights: dict[int, dict[str, Tensor]] = stored["weights"]
        self.seconds: float = stored["seconds"]
        self.named = named_checkpoints(self.losses, self.checkpoints)
        self.model = problem.model(source=True, seed=seed)
        self.forward_flops = problem.batch * problem.forward_flops(self.model)

    def _train(self, file: Path) -> None:
        problem, begin = self.problem, time.process_time()
        model = problem.model(source=True, seed=self.seed)
        losses: dict[int, float] = {}
        weights: dict[int, dict[str, Tensor]] = {}

        def after_step(step: int, loss: float) -> None:
            losses[step] = loss
            if step % problem.save_every == 0:
                weights[step] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

        curve = train(
            problem, model, of_labels, seed=self.seed, steps=problem.source_steps, source=True, after_step=after_step
        )
        stored = {
            "losses": losses,
            "curve": curve,
            "weights": weights,
            "identity": problem.identity(),
            "seconds": time.process_time() - begin,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(stored, partial)
        partial.rename(file)

    @property
    def checkpoints(self) -> list[int]:
        return sorted(self.weights)

    @property
    def training_flops(self) -> float:
        return 3 * self.forward_flops * self.problem.source_steps

    @property
    def target(self) -> float:
        """The accuracy that a student has to reach."""
        return self.problem.target * self.curve[max(self.curve)][0]

    def logits(self, checkpoint: int, first: int, stop: int) -> Tensor:
        """[steps, B, L, V] on the rows of a student's 0-based steps ``first`` to ``stop`` - 1."""
        key = checkpoint, first, stop
        if key not in self._logits:
            self.model.load_state_dict(self.weights[checkpoint])
            rows = batches(self.problem, self.seed, steps=stop, source=False, first=first)
            with torch.no_grad():
                self._logits[key] = torch.stack([self.model(inputs) for inputs, _ in rows])
        return self._logits[key]

    def entropy(self, checkpoint: int, temperature: float) -> float:
        """Mean entropy on the students' first rows, in nats."""
        log_p = (self.logits(checkpoint, 0, BLOCK).double() / temperature).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean().item()

    def softening(self) -> float:
        """The temperature at which the last checkpoint has the entropy of the one inside the fall; by bisection."""
        wanted, low, high = self.entropy(self.named[MIDDLE], 1.0), 1e-3, 1e6
        while high / low > 1.001:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if self.entropy(self.named[LAST], middle) > wanted else (middle, high)
        return low


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature); with temperature 0 all of it is on the largest logit."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits.double() / temperature).softmax(-1).float()


def targets_of(source: Source, arm: Arm) -> Tensor:
    """The probabilities that an arm with a source learns in each step, [steps, B, L, V]."""
    steps = source.problem.steps
    schedule = phases(arm, steps=steps, losses=source.losses, checkpoints=source.checkpoints)
    ends = [phase.first_step for phase in schedule[1:]] + [steps + 1]
    parts = []
    for phase, end in zip(schedule, ends, strict=True):
        is_softened = arm.softened and phase is not schedule[-1]
        temperature = source.softening() if is_softened else arm.temperature
        parts.append(probabilities(source.logits(phase.checkpoint, phase.first_step - 1, end - 1), temperature))
    return torch.cat(parts)


def distilled(source: Source, arm: Arm) -> Loss:
    """The divergence of a student from the source of each step, up to the source's entropy."""
    targets = targets_of(source, arm)

    def loss(logits: Tensor, labels: Tensor, step: int) -> Tensor:
        counts = labels != IGNORE_INDEX
        return cross_entropy(logits[counts], targets[step][counts])

    return loss


class Together(nn.Module):
    """Several models of one kind as one: logits [A x B, L, V]. Their gradients do not mix, and SGD and AdamW work
    number by number, so each model is trained as it would be alone."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        parameters, self._buffers_of_all = stack_module_state(list(models))
        self._names = list(parameters)
        self.stacked = nn.ParameterList(parameters.values())
        self._call = vmap(lambda own, buffers, rows: functional_call(models[0], (own, buffers), (rows,)), (0, 0, None))

    def forward(self, rows: Tensor) -> Tensor:
        return self._call(dict(zip(self._names, self.stacked, strict=True)), self._buffers_of_all, rows)


def run_together(source: Source, arms: Mapping[str, Arm]) -> dict[str, dict[str, Any]]:
    """As :func:`run` for several arms at once."""
    problem, begin = source.problem, time.process_time()
    model = Together([problem.model(source=False, seed=source.seed) for _ in arms])
    labels_of_all = torch.cat(
        [labels for _, labels in batches(problem, source.seed, steps=problem.steps, source=False)]
    )
    width = source.logits(source.named[LAST], 0, BLOCK).shape[-1]
    of_labels_alone = torch.nn.functional.one_hot(labels_of_all.clamp(min=0), width).float()
    of_labels_alone = of_labels_alone.view(problem.steps, problem.batch, -1, width)
    targets = torch.stack([targets_of(source, arm) if arm.first else of_labels_alone for arm in arms.values()])
    held_out, counts_of_held_out = problem.held_out(source.seed), problem.held_out(source.seed)[1] != IGNORE_INDEX
    curves: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in arms}
    optimizer = problem.optimizer(model.parameters())
    for step, (inputs, labels) in enumerate(batches(problem, source.seed, steps=problem.steps, source=False)):
        warm_up(problem, optimizer, step)
        counts = (labels != IGNORE_INDEX).expand(len(arms), *labels.shape)
        optimizer.zero_grad()
        # The mean over all arms, times their number: the sum of the arms' own losses.
        (len(arms) * cross_entropy(model(inputs)[counts], targets[:, step][counts])).backward()
        optimizer.step()
        if (step + 1) % problem.every == 0:
            with torch.no_grad():
                logits = model(held_out[0])
            for name, own in zip(arms, logits, strict=True):
                curves[name][step + 1] = measured(own[counts_of_held_out], held_out[1][counts_of_held_out])
    seconds = (time.process_time() - begin) / len(arms)
    return {
        name: numbers(source, arm, curves[name], steps=problem.steps, seconds=seconds) for name, arm in arms.items()
    }


def costs(source: Source) -> float:
    """FLOPs of a step of a student alone."""
    student = source.problem.model(source=False, seed=source.seed)
    return 3 * source.problem.batch * source.problem.forward_flops(student)


def numbers(
    source: Source, arm: Arm, curve: dict[int, tuple[float, float]], *, steps: int, seconds: float
) -> dict[str, Any]:
    return {
        "steps": steps,
        "accuracy": {step: accuracy for step, (accuracy, _) in curve.items()},
        "loss": {step: value for step, (_, value) in curve.items()},
        "target": source.target,
        "step_flops": costs(source),
        "source_step_flops": source.forward_flops if arm.first else 0.0,
        "source_training_flops": source.training_flops if arm.first else 0.0,
        "checkpoints": source.named,
        "softening": source.softening() if arm.softened else None,
        "source_accuracy": {step: accuracy for step, (accuracy, _) in source.curve.items()},
        "source_seconds": source.seconds,
        "seconds": seconds,
    }


def run(source: Source, arm: Arm) -> dict[str, Any]:
    """Train the student of an arm; the numbers of its result."""
    problem, begin = source.problem, time.process_time()
    steps, target = problem.steps, math.inf
    if arm.equal_flops:
        step_flops = costs(source)
        steps = int((steps * (step_flops + source.forward_flops) + source.training_flops) / step_flops)
        target = source.target
    loss = distilled(source, arm) if arm.first else of_labels
    student = problem.model(source=False, seed=source.seed)
    curve = train(problem, student, loss, seed=source.seed, steps=steps, target=target)
    return numbers(source, arm, curve, steps=steps, seconds=time.process_time() - begin)
