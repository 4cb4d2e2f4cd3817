"""The report of titan_attent.score pair: a folder resumes only with the request that it was begun with."""

import json
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest

from titan_attent.titan.scoring.pair_plan import report_of

ASKED = {"flavor": "bigram", "data_fingerprint": "f"}
REPORT: dict[str, Any] = {"asked": ASKED, "seconds": {"a": 1.5}, "device_seconds": {"a": 3}, "cost": {}}


def test_a_folder_resumes_with_the_same_request(tmp_path: Path) -> None:
    empty = {"seconds": {}, "device_seconds": {}}
    assert report_of(tmp_path, requested=ASKED) == report_of(tmp_path / "none", requested=ASKED) == empty
    (tmp_path / "scorers.json").write_text(json.dumps(REPORT))
    assert report_of(tmp_path, requested=ASKED) == REPORT
    with pytest.raises(ValueError, match="holds other scorers: data_fingerprint was 'f' and is 'g'. Name another"):
        report_of(tmp_path, requested=ASKED | {"data_fingerprint": "g"})


@pytest.mark.parametrize("name", ["trusted", "models", "amateur", "expert"])
def test_work_that_does_not_say_of_which_data_it_is(tmp_path: Path, name: str) -> None:
    """Finished losses would be taken for those of this run's data."""
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"holds {name}, but no scorers.json, .* Name another --output, or delete"):
        report_of(tmp_path, requested=ASKED)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "[" * 200_000,
        json.dumps(REPORT | {"asked": 3}),
        json.dumps(REPORT | {"seconds": {"a": float("nan")}}),
        json.dumps(REPORT | {"device_seconds": {"a": "1"}}),
        json.dumps({"asked": ASKED}),
        json.dumps(REPORT | {"under_way": {"stage": "x", "since": float("inf"), "ranks": 1}}),
        json.dumps(REPORT | {"under_way": {"stage": "x", "since": 1.0}}),
        json.dumps(REPORT | {"under_way": []}),
    ],
)
def test_a_report_that_cannot_be(tmp_path: Path, content: str) -> None:
    (tmp_path / "scorers.json").write_text(content)
    with pytest.raises(ValueError, match="scorers.json: malformed .* Name another --output, or delete the folder"):
        report_of(tmp_path, requested=ASKED)
