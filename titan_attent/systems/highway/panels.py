"""The panels of Highway backpropagation in the report: rounds, distance from the exact gradient, and FLOPs saved."""

from titan_attent.systems.system import Panel

PANELS = (
    Panel(
        "backward: rounds, and input gradients per microbatch",
        ("highway/iterations", "highway/vjps"),
        labels=(("highway/vjps", "input gradients (right axis)"),),
        right="highway/vjps",
        from_zero=True,
        counts=True,
    ),
    Panel(
        "highway gradient: cosine with the exact one, last change",
        ("highway/cosine", "highway/step_norm"),
        labels=(("highway/step_norm", "last change (right axis)"),),
        right="highway/step_norm",
    ),
    Panel(
        "highway: shares of FLOPs saved so far",
        ("highway/saved_of_backward", "highway/saved_of_step"),
        labels=(("highway/saved_of_backward", "of the backward pass"), ("highway/saved_of_step", "of a step")),
    ),
    Panel("cosine with the exact gradient, by block", family="highway/cosine/"),
)
