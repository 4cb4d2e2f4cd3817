"""Maps: rows in the order of a model, values from the step at which they were logged to the next one."""

from pathlib import Path

import numpy as np
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from titan_attent.report.maps import draw_map, members_of
from titan_attent.report.runs import RunScalars
from titan_attent.systems.system import Panel

FAMILY = "freezing/active/"
NAMES = ["tok_embeddings", "layers.0.attention", "layers.2.feed_forward", "layers.10.attention", "output"]


def a_run(values: dict[str, dict[int, float]]) -> RunScalars:
    scalars = {FAMILY + name: series for name, series in values.items()}
    return RunScalars(path=Path("run"), scalars=scalars | {"loss": {40: 1.0}})


def test_rows_are_in_the_order_of_the_model() -> None:
    assert members_of(a_run({name: {1: 1.0} for name in sorted(NAMES)}), FAMILY) == NAMES


def test_a_value_holds_until_the_next_is_logged() -> None:
    run = a_run({"layers.0.attention": {10: 1.0, 20: 0.0}, "output": {10: 1.0, 20: 1.0}})
    axes = Figure().add_subplot()
    draw_map(axes, Panel("active", family=FAMILY, map=True), [run], ["run"])
    (mesh,) = (item for item in axes.collections if isinstance(item, QuadMesh))
    assert np.array_equal(np.asarray(mesh.get_array()).reshape(2, 2), [[1.0, 0.0], [1.0, 1.0]])
    corners = mesh.get_coordinates()
    assert corners[0, :, 0].tolist() == [10, 20, 40]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layers.0.attention", "output"]


def test_of_several_runs_the_last_that_has_logged_it() -> None:
    runs = [a_run({"output": {10: 1.0}}), a_run({"output": {10: 0.0}}), a_run({})]
    axes = Figure().add_subplot()
    draw_map(axes, Panel("active", family=FAMILY, map=True), runs, ["first", "second", "third"])
    assert axes.get_title() == "active: second"
