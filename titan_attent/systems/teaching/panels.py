"""The teacher's panels in the report: its selections, and whether they pay."""

from titan_attent.systems.system import Panel

UNITS = {
    "teacher/ratio": "share",
    "teacher/effective_sample_size": "share",
    "teacher/never_selected": "share",
    "teacher/overlap": "share",
    "teacher/loss_age": "steps",
    "teacher/repeats": "times",
}

PANELS = (
    Panel(
        "share of the pool trained per pass, and round",
        ("teacher/ratio", "teacher/round"),
        labels=(("teacher/ratio", "share"), ("teacher/round", "round (right axis)")),
        right="teacher/round",
        shares=True,
    ),
    Panel("importance", ("teacher/importance_mean", "teacher/importance_p99")),
    Panel(
        "selection, shares",
        ("teacher/effective_sample_size", "teacher/never_selected", "teacher/overlap"),
        shares=True,
    ),
    Panel("selected share of each data source", family="teacher/inclusion/", shares=True),
    Panel(
        "examples skipped, and break-even share",
        ("ledger/skipped_share", "ledger/break_even_share"),
        labels=(("ledger/break_even_share", "share to break even"),),
        from_zero=True,
    ),
    # If no guard was ever active, the table says so instead of this panel.
    Panel(
        "guards",
        ("teacher/quarantined", "teacher/nonfinite", "teacher/fallback"),
        from_zero=True,
        counts=True,
        when_not_zero=True,
    ),
    Panel("times that a selected example is trained in the run", ("teacher/repeats",), from_zero=True),
)
