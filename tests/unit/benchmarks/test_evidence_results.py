"""The single-pass experiment's result files, those of other calls, and its pictures."""

import json
import struct
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic_results import result

from benchmarks.single_pass import corpora, numbers, pictures, results, rules

FINGERPRINTS = {
    name: f"of {name}"
    for name in (
        *corpora.CORPORA,
        *(f"{name}-dedup" for name in corpora.CORPORA),
        *(f"{part}-{c.name}" for c in corpora.CORPORA.values() for part in ("validation", "trusted")),
    )
}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def finished(output: Path, rule: str, corpus: str, seed: int, **more: Any) -> Path:
    """The files of a finished run."""
    task = rules.rule_task(corpus, rule, seed)
    made = result(rule, corpus, seed, 3.0, config=task.config) | more
    for key in ("kinds", "scorer_share", "scorer_seconds", "scorer_steps"):
        del made[key]
    return write(output / task.folder / "result.json", made)


def known(rule: str, corpus: str, seed: int, **more: Any) -> dict[str, Any]:
    """A result of another call, with the same configuration and data."""
    fingerprint = results.data_fingerprint(FINGERPRINTS, corpus, rule, seed)
    return result(rule, corpus, seed, 3.0, config=rules.rule_task(corpus, rule, seed).config) | {
        "data_fingerprint": fingerprint,
        **more,
    }


def read(output: Path, *files: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    paths = [write(output / f"known-{i}.json", {"results": made}) for i, made in enumerate(files)]
    return results.read_known(paths, output=output, fingerprints=FINGERPRINTS)


# -- below the folder -------------------------------------------------------------------------------------------------


def test_a_result_comes_with_its_scorers_its_kinds_and_its_data(tmp_path: Path) -> None:
    finished(tmp_path, "uniform", "minority", 2)
    finished(tmp_path, "difference", "junk", 0)
    finished(tmp_path, "difference", "junk", 1)  # its scorers have been removed
    finished(tmp_path, "perplexity", "web", 0)
    write(tmp_path / "runs" / "junk" / "uniform_charged" / "seed-0" / "result.json", {"rule": "uniform_charged"})
    for corpus in ("junk", "web"):
        scorers = {"cost": {"share": 0.01}, "seconds": {"count": 1.0, "score": 0.5}}
        write(tmp_path / "scorers" / corpus / "seed-0" / "scorers.json", scorers)
    losses = tmp_path / "runs" / "minority" / "uniform" / "seed-2" / "validation" / "losses"
    losses.mkdir(parents=True)
    np.array([1.0, 5.0, 2.0, 3.0], "<f4").tofile(losses / "losses.bin")
    (tmp_path / "corpora" / "validation-minority").mkdir(parents=True)
    kinds = [corpora.KINDS.index(kind) for kind in ("code", "russian", "russian", "code")]
    np.save(tmp_path / "corpora" / "validation-minority" / "row_kinds.npy", np.array(kinds, np.uint8))

    junk, minority, web = results.gather(tmp_path, fingerprints=FINGERPRINTS)
    assert (junk["scorer_share"], junk["scorer_seconds"], junk["kinds"]) == (0.01, 1.5, {})
    assert junk["data_fingerprint"] == {name: f"of {name}" for name in ("junk", "validation-code", "trusted-code")}
    assert minority["kinds"] == {"code": 2.0, "russian": 3.5} and "scorer_share" not in minority
    assert list(minority["data_fingerprint"]) == ["minority", "validation-minority"]
    assert list(web["data_fingerprint"]) == ["web", "validation-prose", "trusted-prose"]
    dedup = results.data_fingerprint(FINGERPRINTS, "web", "dedup", 0)
    assert list(dedup.values()) == ["of web-dedup", "of validation-prose"]


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = rules.rule_task("junk", "uniform", 0).config
    finished(tmp_path, "uniform", "junk", 0, config=config | {"optimizer": {"lr": 0.5}})
    with pytest.raises(ValueError, match="'optimizer.lr': 0.5}, but this call needs {'optimizer.lr': 0.01}"):
        results.gather(tmp_path, fingerprints=FINGERPRINTS)


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    """The run has recorded its data; the corpora have been built again since."""
    own = results.data_fingerprint(FINGERPRINTS, "junk", "uniform", 0)
    finished(tmp_path, "uniform", "junk", 0, data_fingerprint=own)
    assert len(results.gather(tmp_path, fingerprints=FINGERPRINTS)) == 1
    with pytest.raises(ValueError, match="junk/uniform/seed-0 was measured on other data than .*corpora has now"):
        results.gather(tmp_path, fingerprints=FINGERPRINTS | {"validation-code": "of other rows"})


# -- of other calls ---------------------------------------------------------------------------------------------------


def test_known_results_stand_beside_those_below_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path, "uniform", "junk", 0, final_validation_loss=2.0)
    first = [known("uniform", "junk", 0), known("difference", "junk", 0, kinds={"code": 1.0}, scorer_seconds=9.0)]
    second = [known("difference", "junk", 0, scorer_seconds=5.0), known("perplexity", "minority", 1)]
    found = read(tmp_path, first, second)
    assert list(found) == ["runs/junk/difference/seed-0", "runs/minority/perplexity/seed-1"]
    assert found["runs/junk/difference/seed-0"]["scorer_seconds"] == 9.0  # the first that was named
    assert capsys.readouterr().err == ""
    gathered = results.gather(tmp_path, fingerprints=FINGERPRINTS, known=found)
    assert [(r["corpus"], r["rule"], r["final_validation_loss"]) for r in gathered] == [
        ("junk", "difference", 3.0),
        ("junk", "uniform", 2.0),
        ("minority", "perplexity", 3.0),
    ]
    assert numbers.charge(gathered)[0]["scorer_steps"] == 9.0  # uniform takes one second per step


def test_known_results_of_other_settings_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = rules.rule_task("junk", "difference", 0)
    of_trained = task.config | {"job": {k: v for k, v in task.config["job"].items() if k != "description"}}
    validated = {name: f"of {name}" for name in ("web", "trusted-prose")} | {"validation-prose": "another"}
    found = read(
        tmp_path,
        [
            known("uniform", "junk", 0),
            known("difference", "junk", 0, config=of_trained),
            known("uniform", "web", 0, config=task.config),
            known("attainment", "web", 0, data_fingerprint=validated),
            {key: value for key, value in known("dedup", "web", 0).items() if key != "data_fingerprint"},
            known("uniform", "clean", 0) | {"rule": "uniform_charged"},
        ],
    )
    assert list(found) == ["runs/junk/uniform/seed-0"]
    (line,) = capsys.readouterr().err.splitlines()
    names = "junk/difference/seed-0, web/uniform/seed-0, web/attainment/seed-0, web/dedup/seed-0, clean/uniform_charged"
    assert line.startswith(f"evidence: {tmp_path / 'known-0.json'}: 5 of 6 results left out")
    assert line.endswith(f": {names}/seed-0")


@pytest.mark.parametrize("content", ["", "[]", '{"results": [{}]}', '{"runs": []}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"--known .*other.json: not a results.json of this command .* name the one that an earlier"
    ):
        results.read_known([path], output=tmp_path, fingerprints=FINGERPRINTS)
    with pytest.raises(ValueError, match="FileNotFoundError"):
        results.read_known([tmp_path / "nothing.json"], output=tmp_path, fingerprints=FINGERPRINTS)


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The panels of the pictures that a test draws."""
    panels: list[Axes] = []
    savefig = Figure.savefig

    def save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        panels.extend(figure.axes)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return panels


def width(path: Path) -> int:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">I", content[16:20])[0]


def test_a_curve_is_the_mean_of_its_seeds(drawn: list[Axes], tmp_path: Path) -> None:
    made = [result("uniform", corpus, seed, 3.0 + seed) for corpus in ("web", "junk") for seed in (0, 1)]
    made += [result(rule, c, 0, 2.0) for c in ("web", "junk") for rule in ("difference_87", "difference_67", "dedup")]
    pictures.draw_curves(made, tmp_path / "curves.png")
    assert width(tmp_path / "curves.png") == 1400
    assert [axes.get_title() for axes in drawn] == ["junk", "web"]
    for axes, shorter in zip(drawn, ("difference_67", "difference_87"), strict=True):
        thick = {line.get_label(): line for line in axes.lines if line.get_linewidth() == 2}
        thin = [line for line in axes.lines if line.get_linewidth() < 1]
        assert list(thick) == ["uniform", shorter] and len(thin) == 3
        assert list(thick["uniform"].get_xdata()) == [200, 400] and list(thick["uniform"].get_ydata()) == [4.5, 3.5]
        assert [list(line.get_ydata()) for line in thin] == [[4.0, 3.0], [5.0, 4.0], [3.0, 2.0]]


def test_a_marker_stands_at_the_difference_between_the_ends_of_its_interval(drawn: list[Axes], tmp_path: Path) -> None:
    made = [result("uniform", "minority", seed, 3.0, kinds={"code": 2.0, "russian": 4.0}) for seed in range(3)]
    differences = (-0.1, -0.2, -0.6)
    made += [
        result("difference", "minority", seed, 3.0 + d, kinds={"code": 2.0 + d, "russian": 4.0})
        for seed, d in enumerate(differences)
    ]
    made += [result("attainment", "minority", 0, 3.2), result("dedup", "web", 0, 3.0)]
    pictures.draw_differences(made, tmp_path / "differences.png")
    assert width(tmp_path / "differences.png") == 1400
    assert [axes.get_title() for axes in drawn] == ["minority", "minority: code", "minority: russian"]
    names = [label.get_text() for label in drawn[0].get_yticklabels()]
    assert names == ["difference", "attainment", "dedup"]
    half = 4.302653 * np.std(differences, ddof=1) / 3**0.5
    for axes, rule, at, ends in (
        (drawn[0], "difference", -0.3, (-0.3 - half, -0.3 + half)),
        (drawn[0], "attainment", 0.2, None),
        (drawn[1], "difference", -0.3, (-0.3 - half, -0.3 + half)),
    ):
        color = pictures.LOOKS[rule][0]
        (marker,) = [
            line for line in axes.lines if line.get_color() == color and line.get_marker() not in ("|", "None")
        ]
        assert marker.get_xdata() == pytest.approx([at]) and marker.get_ydata() == [names.index(rule)]
        bars = [
            bar.get_segments()[0][:, 0] for bar in axes.collections if bar.get_segments()[0][0, 1] == names.index(rule)
        ]
        assert bars == ([pytest.approx(ends)] if ends else [])
        low, high = axes.get_xlim()
        assert low < at < high


def test_every_rule_has_looks_of_its_own() -> None:
    assert pictures.LOOKS.keys() == rules.RULES.keys()
    assert len({(matplotlib.colors.to_hex(color), marker) for color, marker in pictures.LOOKS.values()}) == len(
        rules.RULES
    )
