"""The TOML section ``[freezing]``.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass, field

from titan_attent.foundations.checks import check_number, check_one_of

POLICIES = ("off", "all", "mat", "prefix", "truncated", "gradient_norm", "random", "stages")
PROBES = ("ntk", "loss")
PARTS = ("attention", "feed_forward", "both")
"""The parts of the layers that a stage may train."""

FORMER_NAME = "modules"
"""The name of the section in earlier versions."""


@dataclass(frozen=True)
class Stage:
    """A part of a schedule.

    Attributes:
        part: one of ``PARTS``.
        steps: how many steps it lasts; None for the last stage, which lasts until the end.
    """

    part: str
    steps: int | None


def parse_stages(stages: list[str]) -> list[Stage]:
    """The stages of a schedule; ValueError with the fix for a malformed one."""
    parsed: list[Stage] = []
    for i, text in enumerate(stages):
        part, colon, steps = str(text).partition(":")
        if part not in PARTS:
            raise ValueError(f'[freezing] stages: "{text}" begins with none of {", ".join(PARTS)}: write "part:steps"')
        is_last = i == len(stages) - 1
        if is_last and colon:
            raise ValueError(
                f'[freezing] stages: the last stage, "{text}", lasts until the end of the run: write "{part}"'
            )
        if not is_last and not (steps.isdecimal() and int(steps) > 0):
            raise ValueError(f'[freezing] stages: "{text}" needs a number of steps: write "{part}:100"')
        parsed.append(Stage(part, None if is_last else int(steps)))
    return parsed


@dataclass
class FreezingConfig:
    policy: str = "off"
    """
    Which modules a step updates.
    - "off": every module; nothing is measured, and the run is bit for bit the same as without this section.
    - "all": every module; eigenvalues are measured and logged, to show what another policy would do.
    - "mat": the modules with the largest eigenvalues among those of their type (MAT). Embedding and output, the only
      modules of their types, stay active.
    - "prefix": freezes the modules that lose the least eigenvalue per FLOP saved. Modules below the first active one
      save their input gradients as well, so it freezes from the embedding upwards where that pays.
    - "truncated": the top of the model. Every module below one cut is frozen, from the embedding upwards, however much
      it still learns. The control for "prefix", and from the first step for ``[highway] method = "highway"``.
    - "gradient_norm": modules drawn at random in proportion to the norm of the loss gradient (the idea of MISA).
    - "random": modules drawn at random. The control for "mat".
    - "stages": the parts of the layers that ``stages`` names for the step. Nothing is measured.
    """

    stages: list[str] = field(default_factory=list)
    """
    For policy = "stages": what is trained, one stage after the other, as "part:steps", with the part "attention",
    "feed_forward" (experts and their router included) or "both". The last stage is a part alone and lasts until the
    end. Stages follow the warm-up. Embedding, output and the gates of mot_attent are trained in all of them. Three
    stages of arXiv 2510.27004: ["feed_forward:500", "attention:500", "feed_forward"].
    """

    backward_share: float = 0.6
    """
    Target share of the backward pass's FLOPs to keep, in (0, 1]. Modules are frozen until it is matched most closely.
    Weight gradients are half of a backward pass, so only "prefix" and "truncated" get far below one half.
    """

    warmup_steps: int = 100
    """Number of first steps with every module active, at least 1: each module's optimizer state must exist."""

    interval: int = 50
    """Steps between two decisions. Each decision probes all modules, frozen ones included."""

    final_fraction: float = 0.0
    """Fraction of the steps, at the end of the run, in which every module is active again, in [0, 1]."""

    probe: str = "ntk"
    """
    The matrix whose eigenvalue is measured.
    - "ntk": the modular neural tangent kernel: gradients of the logits, projected on random signs.
    - "loss": the Gram matrix of the loss gradients, as in the empirical Fisher matrix. "gradient_norm" always uses it.
    """

    probe_groups: int = 4
    """
    Number of groups of probe examples, which are distributed over the ranks. An eigenvalue is the mean over the groups.
    The number of groups is fixed, so decisions do not depend on the number of ranks.
    """

    probe_examples: int = 4
    """Examples per group: the side of its Gram matrix, at least 2. A rank holds one group's activations at a time."""

    smoothing: float = 0.5
    """Weight of the earlier eigenvalues in the moving average that decides, in [0, 1)."""

    hysteresis: float = 0.1
    """Share by which a frozen module must exceed the threshold, or an active one fall below it, to switch; [0, 1)."""

    beta: float = 0.0
    """
    Bound of the temporal rule: a module has settled when |D_t - D_(t-1)| / D_1 is below it. D_t is the distance of the
    module's eigenvalue from its first one. Settled modules are frozen first. 0 for no rule; the paper's value is 1e-3.
    """

    rest: int = 4
    """Number of decisions for which a settled module counts as settled."""

    shuffle: bool = False
    """Permute the eigenvalues among the modules of each type before the decision, as a control."""

    heads: bool = False
    """
    Also write the eigenvalue of every attention head into freezing/decisions.jsonl. Heads are reported but never
    frozen: a head is a slice of its matrices, and masking its gradient would save no FLOPs.
    """

    seed: int = 0
    """Seed of the probe examples, the random signs and the random policies."""

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the fix if any value is out of range."""
        check_one_of("policy", self.policy, POLICIES, section="freezing")
        check_one_of("probe", self.probe, PROBES, section="freezing")
        for key, bounds in {
            "backward_share": {"above": 0, "at_most": 1},
            "final_fraction": {"at_least": 0, "at_most": 1},
            "smoothing": {"at_least": 0, "below": 1},
            "hysteresis": {"at_least": 0, "below": 1},
            "beta": {"at_least": 0},
        }.items():
            check_number(key, getattr(self, key), section="freezing", **bounds)  # type: ignore[arg-type]
        for key, min_value in {
            "warmup_steps": 1,
            "interval": 1,
            "probe_groups": 1,
            "probe_examples": 2,
            "rest": 1,
        }.items():
            check_number(key, getattr(self, key), at_least=min_value, whole=True, section="freezing")
        check_number("seed", self.seed, whole=True, section="freezing")
        parse_stages(self.stages)
        if bool(self.stages) != (self.policy == "stages"):
            raise ValueError(
                f'[freezing] policy = "{self.policy}" with stages = {self.stages}: '
                + ('set policy = "stages", or remove stages' if self.stages else "name the stages")
            )

    @property
    def probes(self) -> bool:
        """Whether modules are probed."""
        return self.policy not in ("off", "truncated", "random", "stages")
