"""The TOML section ``[hyla]``: the form of the attention of ``hyla_attent``, and its ablations.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass

from titan_attent.foundations.checks import check_one_of

NORMALIZATIONS = ("rms_head", "softmax", "none")
VALUE_NETWORKS = ("relu", "linear")


@dataclass
class HylaConfig:
    normalization: str = "rms_head"
    """
    Normalisation of the attention scores:
    - "rms_head": over the heads, as in the paper
    - "softmax": over the keys; an ablation
    - "none": an ablation
    """

    value_network: str = "relu"
    """Activation of the value network that the scores of a query and a key choose: "relu", or "linear", an ablation."""

    output_norm: bool = False
    """
    Whether each head's output is divided by its root mean square. Without it, the output grows with the number of keys:
    docs/reference/hyla.md.
    """

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the fix if any value is unknown."""
        check_one_of("normalization", self.normalization, NORMALIZATIONS, section="hyla")
        check_one_of("value_network", self.value_network, VALUE_NETWORKS, section="hyla")
