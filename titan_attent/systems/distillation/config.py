"""The TOML section ``[distillation]``.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass

from titan_attent.foundations.checks import check_number, check_one_of

SCHEDULES = ("off", "even", "at", "two_shot", "final")
SOFTENED = ("source", "both")
WEIGHTS = ("constant", "linear", "wsd")
READ_BY = {
    "at": ("schedule", "at"),
    "num_checkpoints": ("schedule", "even"),
    "switch": ("schedule", "two_shot"),
    "final_label_weight": ("label_weight_schedule", "linear"),
    "warmup": ("label_weight_schedule", "wsd"),
    "decay": ("label_weight_schedule", "wsd"),
}
"""Key -> another key, and the one value of that with which it is read."""
MIN_TEMPERATURE = 1e-30
"""Above 0; logits of 1e8 divided by it are still numbers in fp32."""


@dataclass
class DistillationConfig:
    schedule: str = "off"
    """
    Which of the source's checkpoints a step learns from.
    - "off": none; the run is bit for bit the same as without this section.
    - "even": ``num_checkpoints`` of them, one after the other, for equally many steps each.
    - "at": those that ``at`` names.
    - "two_shot": one inside the steepest fall of the source's own loss, found from its TensorBoard logs, and from
      ``switch`` on the last.
    - "final": the last one, always. The control for the others.
    """

    source: str = ""
    """
    The folder of the source's checkpoints, such as outputs/large/checkpoint, with a folder step-N for each. torchtitan
    wrote them (DCP), full or model-only, with the tokenizer of ``data.path``.
    """

    flavor: str = ""
    """The source's flavor; empty for ``model.flavor``."""

    family: str = ""
    """The source's family, such as "llama3"; empty for that of ``model.name``."""

    targets: str = ""
    """
    A folder that `titan_attent.score targets` wrote: the run reads a few target ids per token from it, and no source
    runs. With the folder ``source`` as well, the two are compared, and "two_shot" reads the logs there.
    """

    num_checkpoints: int = 0
    """Number of checkpoints for "even", evenly spaced among those of the folder, the last included; 0 for all."""

    at: str = ""
    """Pairs STEP:CHECKPOINT for "at": from that step on, learn from step-CHECKPOINT. "1:2000 501:8000"."""

    switch: float = 0.5
    """Share of the steps after which "two_shot" takes the last checkpoint, in (0, 1)."""

    temperature: float = 1.0
    """Divides the logits; above 1 the source's distribution is flatter. 0 is the limit: its largest logit (argmax)."""

    softened: str = "source"
    """
    Whose logits ``temperature`` divides.
    - "source": the source's. The student learns the softened distribution as it is.
    - "both": the student's, too, and the divergence is multiplied by the temperature squared (Hinton et al. 2015).
    """

    label_weight: float = 0.5
    """Weight a of the labels' cross-entropy, in [0, 1]; the divergence from the source has weight 1 - a."""

    label_weight_schedule: str = "constant"
    """
    How a changes.
    - "constant": not at all.
    - "linear": from ``label_weight`` in the first step to ``final_label_weight`` in the last.
    - "wsd": warm-up, stable, decay of the source's weight 1 - a: from 0 to 1 - ``label_weight`` over ``warmup`` of the
      steps, and back to 0 over the last ``decay`` of them.
    """

    final_label_weight: float = 1.0
    """The last weight a of "linear", in [0, 1]. With 1 the run ends on labels alone."""

    warmup: float = 0.1
    """Share of the steps over which "wsd" raises the source's weight, in [0, 1]."""

    decay: float = 0.1
    """Share of the steps over which "wsd" lowers it; at most 1 - ``warmup``."""

    students: int = 1
    """Number of students that share the source, for the ledger: its training cost is divided by it."""

    source_seconds: float = 0.0
    """
    Device-seconds that training the source took, for the ledger. 0: those that the ledger of the source's run says, if
    titan_attent trained it: its wall time up to the last checkpoint that is used, times its devices.
    """

    @property
    def student_temperature(self) -> float:
        """The temperature that divides the student's logits."""
        return self.temperature if self.softened == "both" else 1.0

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the fix if a value is out of range."""
        for key, choices in (
            ("schedule", SCHEDULES),
            ("softened", SOFTENED),
            ("label_weight_schedule", WEIGHTS),
        ):
            check_one_of(key, getattr(self, key), choices, section="distillation")
        for key in ("label_weight", "final_label_weight", "warmup", "decay"):
            check_number(key, getattr(self, key), at_least=0, at_most=1, section="distillation")
        check_number("switch", self.switch, above=0, below=1, section="distillation")
        check_number("temperature", self.temperature, at_least=0, section="distillation")
        check_number("source_seconds", self.source_seconds, at_least=0, section="distillation")
        for key, minimum in (("num_checkpoints", 0), ("students", 1)):
            check_number(key, getattr(self, key), at_least=minimum, whole=True, section="distillation")
        if self.warmup + self.decay > 1:
            raise ValueError(
                f"[distillation] warmup = {self.warmup} and decay = {self.decay} are more than all steps together: "
                "lower one of them"
            )
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"[distillation] temperature = {self.temperature}: logits divided by it overflow. For the largest "
                "logit set 0"
            )
        if self.temperature == 0 and self.softened == "both":
            raise ValueError(
                '[distillation] temperature = 0 with softened = "both": the limit has no gradient, as T^2 times the '
                'divergence vanishes. Set softened = "source", or a temperature above 0'
            )

    def check_used(self) -> None:
        """Raise a ValueError for a schedule that lacks its keys, or for keys that it does not read."""
        if not self.source and not self.targets:
            raise ValueError(
                f'[distillation] schedule = "{self.schedule}" without source: name the folder of the source\'s '
                'checkpoints, such as outputs/large/checkpoint, or one of targets, or set schedule = "off"'
            )
        if not self.source and self.schedule == "two_shot":
            raise ValueError(
                '[distillation] schedule = "two_shot" without source: it reads the logs of the source\'s training, '
                'beside its checkpoints. Give source, too, or name the checkpoints with schedule = "at"'
            )
        if self.schedule == "at" and not self.at:
            raise ValueError('[distillation] schedule = "at" without at: give pairs, such as at = "1:2000 501:8000"')
        for key, (choice, reader) in READ_BY.items():
            chosen = getattr(self, choice)
            if chosen != reader and getattr(self, key) != getattr(DistillationConfig, key):
                raise ValueError(
                    f'[distillation] {key} = {getattr(self, key)!r} with {choice} = "{chosen}": only "{reader}" reads '
                    f'it. Remove it, or set {choice} = "{reader}"'
                )
