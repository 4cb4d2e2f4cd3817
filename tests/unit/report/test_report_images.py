"""The sheets of images against the data set that was written, and counts against brute force."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import losses, write

from titan_attent.data.images.writer import write_images
from titan_attent.report import images, main, sheets
from titan_attent.report.images import HINT, count_visits, open_images, read_quarantined
from titan_attent.report.sheets import BOX, COLUMNS, GAP, MARGIN, Cell, draw_sheet, scaled

CLASSES = ("cat", "dog", "a class of a very long name, longer than its image is wide")
NUM, SIDE = 130, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, NUM)
FILES = {"tb", "teacher", "curves.png"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    np.savez(folder / "all.npz", images=PIXELS, labels=LABELS, classes=np.array(CLASSES))
    write_images([folder / "all.npz"], output=folder / "data", shard_images=50)
    return folder / "data"


@pytest.fixture
def run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on those images, whose curves are not drawn."""
    monkeypatch.setattr("titan_attent.report.draw", lambda runs, path: path.touch())
    write(tmp_path / "run", losses(1, 4))
    (tmp_path / "run" / "teacher").mkdir()
    record_data(tmp_path / "run", data)
    return tmp_path / "run"


def record_data(run: Path, data: Path) -> None:
    (run / "teacher" / "data.json").write_text(json.dumps({"path": str(data), "validation_path": ""}))


def trace(run: Path, steps: Sequence[Sequence[int]], *, cut: str = "") -> Path:
    """trace.jsonl of the ids of each step, and a last line that a kill ``cut`` short."""
    records = [{"step": i, "round": 0, "strategy": "soft", "ids": list(ids)} for i, ids in enumerate(steps, 1)]
    return lines(run / "teacher" / "trace.jsonl", records, cut=cut)


def set_aside(run: Path, steps: Sequence[tuple[int, int]], *, cut: str = "") -> Path:
    """quarantine.jsonl of (id, step)."""
    location = {"shard": "shard-00000.bin", "image": 0, "label": "cat"}
    records = [{"step": step, "round": 1, "example_id": i, "loss": 4.5} | location for i, step in steps]
    return lines(run / "teacher" / "quarantine.jsonl", records, cut=cut)


def lines(path: Path, records: Sequence[dict[str, Any]], *, cut: str) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + cut)
    return path


def some_steps(seed: int, *, batch: int = 24) -> list[list[int]]:
    """The ids of 20 steps: some images more often than others, with repetition, and some not at all."""
    rng = np.random.default_rng(seed)
    shares = rng.exponential(size=NUM) ** 3 * (rng.random(NUM) < 0.9)
    return [rng.choice(NUM, batch, p=shares / shares.sum()).tolist() for _ in range(20)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    """The titles and blocks of the sheets that would have been drawn."""
    kept: list[Any] = []

    def keep(title: str, blocks: Any) -> Image.Image:
        kept.append((title, blocks))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(images, "draw_sheet", keep)
    return kept


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_visits_are_counted(tmp_path: Path, seed: int) -> None:
    (tmp_path / "teacher").mkdir()
    steps = some_steps(seed)
    file = trace(tmp_path, steps, cut='{"step": 21, "ids": [0, 0')
    visits, num_steps = count_visits(file, NUM)
    counted = Counter(i for ids in steps for i in ids)
    assert visits.tolist() == [counted[i] for i in range(NUM)] and num_steps == len(steps)


@pytest.mark.parametrize("seed", range(3))
def test_trained_most_and_least_often(run: Path, drawn: list[Any], seed: int) -> None:
    """Ties are ordered by id, and images never trained count as trained least often."""
    steps = some_steps(seed)
    trace(run, steps)
    assert main([str(run)]) == 0
    counted = Counter(i for ids in steps for i in ids)
    most = sorted(range(NUM), key=lambda i: (-counted[i], i))[:48]
    least = sorted(range(NUM), key=lambda i: (counted[i], i))[:48]
    ((title, blocks),) = drawn
    average = f"{20 * 24 / NUM:.3g} visits per image on average"
    assert title == f"trained most and least often of 130 images in 20 steps, {average}: {run}"
    for (_, cells), ids in zip(blocks, (most, least), strict=True):
        visits = [f"{counted[i]} visit{'s' if counted[i] != 1 else ''}" for i in ids]
        expected = [[CLASSES[LABELS[i]], seen, f"id {i}"] for i, seen in zip(ids, visits, strict=True)]
        assert [cell.lines for cell in cells] == expected
        assert all(np.array_equal(np.asarray(cell.image), PIXELS[i]) for cell, i in zip(cells, ids, strict=True))
    never = NUM - len(counted)
    high, low = (counted[i] for i in (most[0], most[-1]))
    assert blocks[0][0] == f"trained most often: 48 images with {low} to {high} visits"
    assert blocks[1][0].endswith(f"; {never} images never trained")


def test_ties_go_by_id(run: Path, drawn: list[Any]) -> None:
    trace(run, [range(NUM)])
    main([str(run)])
    ids = [[cell.lines[-1] for cell in cells] for _, cells in drawn[0][1]]
    assert ids == [[f"id {i}" for i in range(48)]] * 2
    headings = [f"trained {name} often: 48 images with 1 visit" for name in ("most", "least")]
    assert [heading for heading, _ in drawn[0][1]] == headings


def test_a_trace_without_a_line(run: Path, drawn: list[Any]) -> None:
    trace(run, [], cut='{"step": 1')
    assert main([str(run)]) == 0
    assert drawn[0][1][0][0] == "trained most often: 48 images with 0 visits"


def test_the_quarantine(run: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The first ones in the order of the file; the last line of an id counts."""
    order = np.random.default_rng(3).permutation(NUM).tolist()
    steps = [(i, 100 + line) for line, i in enumerate(order)]
    file = set_aside(run, [*steps, (order[2], 2000)], cut='{"step": 2001, "exam')
    assert read_quarantined(file, NUM) == dict(steps) | {order[2]: 2000}
    assert main([str(run)]) == 0
    ((title, [(heading, cells)]),) = drawn
    assert title == f"the first 96 of 130 quarantined images: {run}" and heading == ""
    expected = [[CLASSES[LABELS[i]], f"id {i}", f"step {step:,}"] for i, step in steps[:96]]
    expected[2][2] = "step 2,000"
    assert [cell.lines for cell in cells] == expected
    assert all(np.array_equal(np.asarray(cell.image), PIXELS[i]) for cell, i in zip(cells, order, strict=False))
    assert capsys.readouterr().out.split("\n")[-3:] == [
        f"{run}: {HINT}",
        f"pictures: {run / 'curves.png'}, {run / 'quarantine.png'}",
        "",
    ]


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_command_writes_both_and_names_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace(run, some_steps(0))
    set_aside(run, [(7, 30)])
    assert main([str(run)]) == 0
    assert names(run) == FILES | {"images.png", "quarantine.png"}
    out = capsys.readouterr().out
    files = ", ".join(str(run / name) for name in ("curves.png", "images.png", "quarantine.png"))
    assert out.endswith(f"\npictures: {files}\n") and HINT not in out
    quarantine, both = (np.asarray(Image.open(run / name)) for name in ("quarantine.png", "images.png"))
    assert quarantine.shape[1] == both.shape[1] == 2 * MARGIN + COLUMNS * (BOX + GAP) - GAP
    assert np.array_equal(quarantine[64 : 64 + BOX, MARGIN : MARGIN + BOX], large(PIXELS[7]))
    # The first image of the first block, below its heading.
    visits = np.bincount(np.ravel(some_steps(0)), minlength=NUM)
    assert np.array_equal(both[108 : 108 + BOX, MARGIN : MARGIN + BOX], large(PIXELS[visits.argmax()]))
    words = both[108 + BOX : 108 + BOX + 60, MARGIN : MARGIN + BOX]
    assert 20 < (words.min(axis=2) < 128).sum() < 2000  # and white else


def large(pixels: np.ndarray) -> np.ndarray:
    """Every pixel as a square."""
    return pixels.repeat(BOX // SIDE, axis=0).repeat(BOX // SIDE, axis=1)


def test_several_runs_have_their_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.with_name("other")
    write(other, losses(1, 4))
    trace(run, some_steps(0))
    assert main([str(other), str(run)]) == 0
    assert names(run) == {"tb", "teacher", "images.png"} and names(other) == {"tb", "curves.png"}
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last == f"pictures: {other / 'curves.png'}, {run / 'images.png'}"


@pytest.mark.parametrize("what", ["no data.json", "text", "gone", "not json", "no path", "a list"])
def test_without_a_data_set_of_images_nothing_changes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    trace(run, [[10**9]])
    record, text = run / "teacher" / "data.json", tmp_path / "text"
    text.mkdir()
    (text / "index.json").write_text('{"format": "titan_attent.tokens", "height": 8, "width": 8}')
    if what == "no data.json":
        record.unlink()
    elif what in ("text", "gone"):
        record_data(run, text if what == "text" else tmp_path / "gone")
    else:
        record.write_text({"not json": "{", "no path": "{}", "a list": "[]"}[what])
    assert main([str(run)]) == 0
    assert names(run) == FILES
    out = capsys.readouterr().out
    assert out.endswith(f"\npicture: {run / 'curves.png'}\n") and HINT not in out


def test_an_empty_quarantine_is_no_sheet(run: Path) -> None:
    trace(run, some_steps(0))
    set_aside(run, [], cut='{"step": 1')
    assert main([str(run)]) == 0 and "quarantine.png" not in names(run)


def test_a_failed_sheet_leaves_the_old_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace(run, some_steps(0))
    (run / "images.png").write_text("old")

    def fail(self: Image.Image, path: Path, **kw: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert main([str(run)]) == 2
    message = f"titan_attent.report: {run / 'images.png'} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == message
    assert (run / "images.png").read_text() == "old" and names(run) == FILES | {"images.png"}


@pytest.mark.parametrize("line", ["[]", "{", '{"step": 1}', '{"step": 1, "ids": ["much"]}', '{"ids": [1]}', "\0\0"])
def test_a_bad_line_is_named_and_left_out(run: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    file = trace(run, [[1]], cut=f"{line}\n")
    assert main([str(run)]) == 0 and "images.png" in names(run)
    error = capsys.readouterr().err
    assert (
        error.startswith(f"titan_attent.report: {file}, line 2 is not a record of the teacher: ")
        and error.count("\n") == 1
    )


@pytest.mark.parametrize("stranger", [NUM, -1])
def test_another_data_set_is_refused(run: Path, capsys: pytest.CaptureFixture[str], stranger: int) -> None:
    file = set_aside(run, [(1, 5), (stranger, 6)])
    assert main([str(run)]) == 0 and names(run) == FILES
    assert f"{file}, step 6 names an image beyond the 130 of the data set" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", ["the same", "another", None])
def test_images_of_a_data_set_that_changed_are_left_out(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], recorded: str | None
) -> None:
    trace(run, [[1]])
    fingerprint = json.loads((data / "index.json").read_text())["fingerprint"] if recorded == "the same" else recorded
    content = {"path": str(data), "validation_path": ""} | ({"fingerprint": fingerprint} if fingerprint else {})
    (run / "teacher" / "data.json").write_text(json.dumps(content))
    assert main([str(run)]) == 0
    assert ("images.png" in names(run)) == (recorded != "another")  # earlier versions recorded the folder alone
    error = capsys.readouterr().err
    assert (error == "") == (recorded != "another")
    assert recorded != "another" or (f"{data} has changed since" in error and error.count("\n") == 1)


# -- sheets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "to"),
    [((8, 8), (128, 128)), ((28, 28), (112, 112)), ((32, 8), (128, 32)), ((3, 10), (36, 120)), ((1, 1), (128, 128))],
)
def test_small_images_are_shown_in_whole_pixels(size: tuple[int, int], to: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    shown = np.asarray(scaled(Image.fromarray(pixels)))
    factor = to[1] // size[1]
    assert shown.shape == (to[1], to[0], 3)
    assert np.array_equal(shown, np.repeat(pixels.repeat(factor, 0).repeat(factor, 1)[..., None], 3, axis=2))


@pytest.mark.parametrize(("size", "to"), [((96, 48), (128, 64)), ((1000, 500), (128, 64)), ((1, 900), (1, 128))])
def test_large_images_fit_and_keep_their_aspect(size: tuple[int, int], to: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    shown = scaled(Image.fromarray(noise))
    assert shown.size == to
    if size[0] == 1000:  # averaged over the pixels that it replaces
        assert np.asarray(shown).std() < 0.3 * noise.std()


def test_cells_stand_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 images of one color each: where they are, and that their text is centered below."""
    written: list[tuple[tuple[int, int], str]] = []

    def keep(draw: object, position: tuple[int, int], text: str, **kw: object) -> None:
        written.append((position, text))

    monkeypatch.setattr(sheets, "_write", keep)
    colors = [(10 * i, 200, 0) for i in range(COLUMNS + 2)]
    sizes = [(4, 2) if i % 2 else (2, 4) for i in range(len(colors))]
    cells = [Cell(Image.new("RGB", sizes[i], color), [f"{i}", "below"]) for i, color in enumerate(colors)]
    sheet = np.asarray(draw_sheet("title", [("heading", cells[:-1]), ("", cells[-1:])]))
    for i, color in enumerate(colors):
        rows, columns = np.nonzero((sheet == color).all(axis=2))
        assert len(rows) == BOX * BOX // 2  # one side is half of the other
        bottom, middle = int(rows.max()) + 1, (int(columns.min()) + int(columns.max()) + 1) // 2
        assert middle == MARGIN + (BOX + GAP) * (i if i < COLUMNS else 0) + BOX // 2
        ((position, _),) = (item for item in written if item[1] == f"{i}")
        assert position[0] == middle and bottom <= position[1] < bottom + 10
    tops = [int(np.nonzero((sheet == color).all(axis=2))[0].min()) for color in (colors[0], colors[-2], colors[-1])]
    assert tops[0] < tops[1] < tops[2]
    assert sheet.shape[0] > written[-1][0][1] + 17  # the last line is on the page


def test_long_words_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, position, text, **kw: texts.append(text))
    draw_sheet("title", [("", [Cell(Image.new("RGB", (4, 4)), [CLASSES[2], "two\nlines"])])])
    assert texts[0] == "title" and texts[2] == "two lines"
    assert texts[1].endswith("…") and CLASSES[2].startswith(texts[1][:-1]) and 10 < len(texts[1]) < 24


@pytest.mark.parametrize("encoding", ["raw", "file"])
@pytest.mark.parametrize("size", [(20, 20), (200, 200), (30, 20)])
def test_images_of_any_size(tmp_path: Path, run: Path, encoding: str, size: tuple[int, int]) -> None:
    """Small squares as they are, others as thumbnails."""
    (tmp_path / "in" / "cat").mkdir(parents=True)
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "in" / "cat" / "red.png")
    write_images([tmp_path / "in"], output=tmp_path / "out", encoding=encoding)
    record_data(run, tmp_path / "out")
    found = open_images(run)
    assert found is not None
    assert found.thumbnail(0).size == ((20, 20) if (encoding, size) == ("raw", (20, 20)) else (BOX, BOX))
    trace(run, [[0, 0]])
    assert main([str(run)]) == 0
    red = (np.asarray(Image.open(run / "images.png")) == (255, 0, 0)).all(axis=2).sum()
    assert red == 2 * (120 if found.size == 20 else BOX) ** 2  # the one image is both
