"""The panels of the report on modules: which were active, how much each learned, and what that saved."""

from titan_attent.systems.system import Panel

ACTIVE, EIGENVALUE = "modules/active/", "modules/eigenvalue/"

PANELS = (
    Panel("modules that are active", family=ACTIVE, map=True),
    Panel("eigenvalue / mean of its kind", family=EIGENVALUE, map=True),
    Panel(
        "backward pass, shares of its FLOPs",
        ("modules/backward_share", "modules/saved_of_backward"),
        labels=(("modules/backward_share", "kept now"), ("modules/saved_of_backward", "saved so far, probes paid")),
    ),
)
