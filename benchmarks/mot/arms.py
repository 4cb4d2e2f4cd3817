"""What is compared: three stages, and the controls that the paper's reviewers asked for."""

from benchmarks.mot.model import Arm, Data

END_TO_END = ("both", "both", "both")
STAGES = "three stages"
ARMS = {
    STAGES: Arm(),
    "end to end": Arm(END_TO_END),
    "permuted: attention, feed-forward, attention": Arm(("attention", "feed_forward", "attention")),
    "permuted: feed-forward, feed-forward, attention": Arm(("feed_forward", "feed_forward", "attention")),
    "shared attention, three stages": Arm(attention="shared"),
    "frozen gate, three stages": Arm(gate="frozen"),
    "random gate, three stages": Arm(gate="random"),
    "gate told the class, three stages": Arm(gate="class"),
    "gate told the class, end to end": Arm(END_TO_END, gate="class"),
    "no attention": Arm(("feed_forward", "feed_forward", "feed_forward"), attention="none"),
    "dense, equal active parameters": Arm(END_TO_END, experts=1, gate="all"),
    "dense, equal total parameters": Arm(END_TO_END, gate="all"),
}
DATA = {"clusters": Data(), "one signal": Data(plain=True)}
ON_PLAIN = (STAGES, "end to end", "no attention", "dense, equal active parameters")
"""The arms that are run on unmodified data, "one signal", too."""


def cells() -> list[tuple[str, str]]:
    """(data, arm) of every run of a seed."""
    return [("clusters", arm) for arm in ARMS] + [("one signal", arm) for arm in ON_PLAIN]
