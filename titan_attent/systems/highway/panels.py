"""The panels of Highway backpropagation in the report: how far the gradient is from the exact one, and at what cost."""

from titan_attent.systems.system import Panel

PANELS = (
    Panel(
        "backward: rounds, and input gradients a microbatch",
        ("backward/iterations", "backward/vjps"),
        labels=(("backward/vjps", "input gradients (right axis)"),),
        right="backward/vjps",
        from_zero=True,
        counts=True,
    ),
    Panel(
        "highway gradient: cosine with the exact one, last change",
        ("backward/cosine", "backward/step_norm"),
        labels=(("backward/step_norm", "last change (right axis)"),),
        right="backward/step_norm",
    ),
    Panel(
        "highway: FLOPs saved so far, shares",
        ("backward/saved_of_backward", "backward/saved_of_step"),
        labels=(("backward/saved_of_backward", "of the backward pass"), ("backward/saved_of_step", "of a step")),
    ),
    Panel("cosine with the exact gradient, by block", family="backward/cosine/"),
)
