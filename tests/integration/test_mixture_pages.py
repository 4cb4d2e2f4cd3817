"""The commands and TOMLs of docs/reference/mixtures.md and validation.md, as they stand; and what is refused."""

import logging
import re
import sysconfig
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from documented import ROOT, arguments_of, commands_of, module_of

from titan_attent.data.text.__main__ import main as write_text
from titan_attent.titan.launch import check

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PAGES = {
    name: (ROOT / "docs" / "reference" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("mixtures", "validation")
}
INPUTS = {"web": "asyncio", "code": "json", "books": "wsgiref", "forum": "venv"}


def toml_of(page: str, number: int = 0) -> str:
    return re.findall(r"```toml\n(.*?)```", PAGES[page], flags=re.S)[number]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the page, and its TOML with a validation set of the other page."""
    folder = tmp_path_factory.mktemp("pages")
    for name, package in INPUTS.items():
        (folder / "corpus" / name).mkdir(parents=True)
        for path in sorted((STDLIB / package).glob("*.py"))[:6]:
            (folder / "corpus" / name / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8"))
    (write, _) = commands_of(PAGES["mixtures"])
    assert module_of(write) == "titan_attent.data.text"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert write_text(arguments_of(write)) == 0
        for name in ("web", "code"):
            tokenizer = ["--tokenizer", "data/mixed/tokenizer.tiktoken"]
            assert write_text([f"corpus/{name}", "--output", f"data/validation/{name}", *tokenizer]) == 0
    return folder


def plan(
    folder: Path, toml: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, code: int = 0
) -> str:
    """What the page's command prints for this TOML."""
    monkeypatch.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    (folder / "mixed.toml").write_text(toml)
    (_, command) = commands_of(PAGES["mixtures"])
    assert module_of(command) == "titan_attent.train"
    first, world_size, *arguments = arguments_of(command)
    assert first == "--check"
    capsys.readouterr()
    assert check(arguments, world_size=int(world_size)) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def test_the_page_prints_tokens_and_epochs_of_each_source(
    written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = toml_of("validation") + "[validation]\nenable = true\nseq_len = 128\n"
    printed = plan(written, toml_of("mixtures") + sets, capsys, monkeypatch)
    lines = re.findall(r"(\w+): ([\d.]+%(?: to [\d.]+%)?), ([\d,]+) tokens, ([\d.]+) epochs of its ([\d,]+)", printed)
    assert [line[:2] for line in lines] == [
        ("web", "50.00% to 10.00%"), ("code", "30.00%"), ("books", "15.00% to 55.00%"), ("forum", "5.00%")
    ]  # fmt: skip
    tokens = {name: int(trained.replace(",", "")) for name, _, trained, _, _ in lines}
    total = 2 * 8 * 128 * 10_000
    # web: 8,000 steps of 0.5, then a line from 0.5 to 0.1 over 2,000 steps.
    web = 8000 * 0.5 + sum(0.5 - 0.4 * step / 2000 for step in range(1, 2001))
    assert tokens["web"] == pytest.approx(total * web / 10_000, abs=2)
    assert tokens["code"] == pytest.approx(total * 0.3, abs=2) and sum(tokens.values()) == pytest.approx(total, abs=4)
    for _, _, trained, epochs, size in lines:
        assert float(epochs) == pytest.approx(int(trained.replace(",", "")) / int(size.replace(",", "")), abs=0.01)


CASES: list[tuple[str, str, str]] = [
    ("forum = { proportion = 0.05 }", "", r"names no proportion of forum"),
    ("forum =", "forun =", r'"forun" is no source of \[data\] path = data/mixed; did you mean "forum"'),
    ("0.05", "0.5", r"the proportions have the sum 1.45 at step 0: make it 1"),
    (
        "[training]",
        '[teacher]\nstrategy = "hard"\nimportance = "loss"\npool_size = 64\n[training]',
        "pool_size = 64 with",
    ),
    ("[data.sources]", 'proportions_of = "all"\n[data.sources]', "proportions_of = 'all' is unknown"),
]


@pytest.mark.parametrize(("old", "new", "message"), CASES)
def test_refusals(
    written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    toml = toml_of("mixtures")
    assert old in toml
    error = plan(written, toml.replace(old, new, 1), capsys, monkeypatch, code=1)
    assert re.search(message, error), error


def test_the_other_toml_of_the_page(
    written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of: Any = toml_of("mixtures", 1).removeprefix("[data]\n")
    assert "epochs of its" in plan(
        written, toml_of("mixtures").replace("[data]\n", f"[data]\n{of}"), capsys, monkeypatch
    )
