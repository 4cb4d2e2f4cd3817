"""The panels of freezing in the report: active modules, their eigenvalues, and the FLOPs saved."""

from titan_attent.systems.system import Panel

ACTIVE, EIGENVALUE = "freezing/active/", "freezing/eigenvalue/"

PANELS = (
    Panel("active modules", family=ACTIVE, map=True),
    Panel("eigenvalue / mean of its module type", family=EIGENVALUE, map=True),
    Panel(
        "shares of the backward pass's FLOPs",
        ("freezing/backward_share", "freezing/saved_of_backward"),
        labels=(("freezing/backward_share", "kept now"), ("freezing/saved_of_backward", "saved so far, net of probes")),
    ),
)
