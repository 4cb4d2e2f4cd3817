"""The TOML section ``[freezing]``.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass

from titan_attent.foundations.checks import check_number, check_one_of

POLICIES = ("off", "all", "mat", "prefix", "truncated", "gradient_norm", "random")
PROBES = ("ntk", "loss")


@dataclass
class FreezingConfig:
    policy: str = "off"
    """
    Which modules a step updates.
    - "off": all; nothing is measured, and the run is bit for bit one without this section.
    - "all": all; eigenvalues are measured and logged, to see what another policy would do.
    - "mat": those of the largest eigenvalues among the modules of their type (MAT). Embedding and output, which have
      no others of their type, stay.
    - "prefix": what loses the least eigenvalue per FLOP saved. Modules below the first active one save their input
      gradients, too, so that it freezes from the embedding upwards where that pays.
    - "truncated": the top of the model: all below one cut is frozen, from the embedding upwards, whatever it still
      learns. The control for "prefix", and from the first step on for ``[highway] method = "highway"``.
    - "gradient_norm": drawn at random in proportion to the norm of the loss gradient (the idea of MISA).
    - "random": drawn at random. The control for "mat".
    """

    backward_share: float = 0.6
    """
    Share of the FLOPs of the backward pass that is kept, in (0, 1]. As many modules are frozen as bring it closest.
    Weight gradients are half of a backward pass, so that only "prefix" and "truncated" get far below a half.
    """

    warmup_steps: int = 100
    """Steps in which every module is active, at least 1: the optimizer's state of each has to exist."""

    interval: int = 50
    """Steps between two decisions, each with a probe of all modules, frozen ones included."""

    final_fraction: float = 0.0
    """The last part of the steps, in which every module is active again, in [0, 1]."""

    probe: str = "ntk"
    """
    What an eigenvalue is of.
    - "ntk": the modular neural tangent kernel: gradients of the logits, projected on random signs.
    - "loss": the Gram matrix of loss gradients (the empirical Fisher matrix's). "gradient_norm" always takes this one.
    """

    probe_groups: int = 4
    """
    Groups of probe examples; an eigenvalue is the mean over the groups, which the ranks share out. Fixed, so that the
    number of ranks does not change a decision.
    """

    probe_examples: int = 4
    """Examples of a group: the side of its Gram matrix, at least 2. A rank holds one group's activations at a time."""

    smoothing: float = 0.5
    """Weight of the eigenvalues before in the moving average that decides, in [0, 1)."""

    hysteresis: float = 0.1
    """By this share a frozen module has to be better, or an active one worse, than the threshold; in [0, 1)."""

    beta: float = 0.0
    """
    The temporal rule: a module has settled when |D_t - D_(t-1)| / D_1 is below this, with D_t the distance of its
    eigenvalue from the first one. Settled modules are frozen before others. 0 for none; the paper's is 1e-3.
    """

    rest: int = 4
    """Decisions for which a settled module counts as settled."""

    shuffle: bool = False
    """A control: eigenvalues change places among the modules of a type before the decision."""

    heads: bool = False
    """
    Also write the eigenvalue of every attention head into freezing/decisions.jsonl. A head is a part of matrices, so it
    is reported and never frozen: a mask would save nothing.
    """

    seed: int = 0
    """Of the probe examples, the random signs and the random policies."""

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the mend if any value is out of its range."""
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
        for key, least in {
            "warmup_steps": 1,
            "interval": 1,
            "probe_groups": 1,
            "probe_examples": 2,
            "rest": 1,
        }.items():
            check_number(key, getattr(self, key), at_least=least, whole=True, section="freezing")
        check_number("seed", self.seed, whole=True, section="freezing")

    @property
    def probes(self) -> bool:
        """Whether modules are probed."""
        return self.policy not in ("off", "truncated", "random")
