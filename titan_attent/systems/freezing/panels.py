"""The panels of the report on modules: which were active, how much each learned, and what that saved."""

from titan_attent.systems.system import Panel

ACTIVE, EIGENVALUE = "freezing/active/", "freezing/eigenvalue/"

PANELS = (
    Panel("modules that are active", family=ACTIVE, map=True),
    Panel("eigenvalue / mean of its kind", family=EIGENVALUE, map=True),
    Panel(
        "backward pass, shares of its FLOPs",
        ("freezing/backward_share", "freezing/saved_of_backward"),
        labels=(("freezing/backward_share", "kept now"), ("freezing/saved_of_backward", "saved so far, probes paid")),
    ),
)
