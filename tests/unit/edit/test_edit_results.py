"""What edits write, against the same arithmetic on whole models in memory; refusals; kills; numbers of processes."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.edit.made import SHAPES, files_of, load, save, weights

from titan_attent.edit import boxes as boxes_module
from titan_attent.edit import search, writer
from titan_attent.edit.averages import decay_weights
from titan_attent.edit.checkpoint import DcpCheckpoint
from titan_attent.edit.command import main
from titan_attent.edit.output import temporary_folder
from titan_attent.titan.checkpoint_folder import steps_in

NAMES = list(SHAPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints a, b, c; the first one full, with the state of an optimizer."""
    folder = tmp_path_factory.mktemp("edit")
    for number, name in enumerate("abc", 1):
        states = {"optimizer": {"state.norm.weight.exp_avg": torch.ones(8)}, "train_state": {"step": 3}}
        save(folder / name, weights(number) | (states if name == "a" else {}))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Boxes of 30 elements, a weight per file: as many of both as a large model has."""
    monkeypatch.setattr(boxes_module, "ELEMENTS", 30)
    monkeypatch.setattr(writer, "MIN_FILE_BYTES", 1)
    monkeypatch.chdir(folder)


def edit(text: str) -> int:
    return main(text.split())


def result(text: str, tmp_path: Path) -> dict[str, Tensor]:
    """The weights that an edit writes."""
    assert edit(f"{text} --output {tmp_path / 'out'}") == 0
    return load(tmp_path / "out")


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == {*NAMES, "tokens_per_expert"}
    for name in NAMES:
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(actual["tokens_per_expert"], weights(1)["tokens_per_expert"]), "a counter is the base's"


def wide(seed: int) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights(seed).items() if name in SHAPES}


A, B, C = wide(1), wide(2), wide(3)
EXPRESSIONS = {
    "a + b": lambda a, b, c: a + (b - a),
    "a + 0.4 b - 0.6 c": lambda a, b, c: a + 0.4 * (b - a) - 0.6 * (c - a),
    "a - b": lambda a, b, c: a - (b - a),
    "a + c from b": lambda a, b, c: a + c - b,
    "a + 0.5 b + 0.25 b from c": lambda a, b, c: a + 0.5 * (b - a) + 0.25 * (b - c),
    "a": lambda a, b, c: a,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_the_result_is_the_arithmetic_on_whole_models(text: str, tmp_path: Path) -> None:
    close(result(text, tmp_path), {name: EXPRESSIONS[text](A[name], B[name], C[name]) for name in NAMES})


def test_factors_of_layers(tmp_path: Path) -> None:
    actual = result("a + 0.5 b - c --scale attention=0.5 --scale 2:layers.1=0 --scale norm=0", tmp_path)
    factors = dict.fromkeys(NAMES, (1.0, 1.0)) | {
        "layers.0.attention.wq.weight": (0.5, 0.5),
        "layers.1.attention.wq.weight": (0.5, 0.0),
        "layers.1.moe.experts.w1": (1.0, 0.0),
        "norm.weight": (0.0, 0.0),
    }
    expected = {n: A[n] + 0.5 * factors[n][0] * (B[n] - A[n]) - factors[n][1] * (C[n] - A[n]) for n in NAMES}
    close(actual, expected)
    assert torch.equal(actual["norm.weight"], weights(1)["norm.weight"]), "where no vector counts the bits are kept"


def truncated(matrix: Tensor, keep: Any) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    if isinstance(keep, float):
        energy = s.square().cumsum(-1) / s.square().sum(-1, keepdim=True)
        s = s * torch.cat([torch.ones_like(energy[..., :1]), energy[..., :-1] < keep], dim=-1)
    else:
        s = s * (torch.arange(s.shape[-1]) < keep)
    return u @ (s[..., None] * v)


@pytest.mark.parametrize("option", ["--rank 2", "--energy 0.6", "--rank 100"])
def test_low_rank_is_the_truncated_svd(option: str, tmp_path: Path) -> None:
    """Of high, wide and stacked matrices, each in several boxes; norms stay."""
    number = option.split()[1]
    keep = float(number) if "." in number else int(number)
    vector = {n: truncated(B[n] - A[n], keep) if A[n].ndim > 1 else B[n] - A[n] for n in NAMES}
    close(result(f"a + 0.5 b {option}", tmp_path), {n: A[n] + 0.5 * vector[n] for n in NAMES})


@pytest.mark.parametrize("option", ["--rank 2", "--energy 0.6", "--keep 0.3"])
def test_every_vector_is_changed_by_itself(option: str, tmp_path: Path) -> None:
    """The result of two vectors is the sum of the results of each."""
    both = result(f"a + 0.5 b - 0.7 c {option}", tmp_path / "both")
    one, other = result(f"a + 0.5 b {option}", tmp_path / "one"), result(f"a - 0.7 c {option}", tmp_path / "other")
    close(both, {n: one[n].double() + other[n].double() - A[n] for n in NAMES})


def test_pruning_keeps_the_largest_entries_of_every_tensor(tmp_path: Path) -> None:
    expected = {}
    for name in NAMES:
        vector = (weights(2)[name] - weights(1)[name]).flatten()
        kept = vector.abs().topk(max(round(0.3 * len(vector)), 1)).indices
        expected[name] = A[name] + torch.zeros_like(vector).scatter(0, kept, vector[kept]).view(A[name].shape).double()
    close(result("a + b --keep 0.3", tmp_path), expected)


@pytest.mark.parametrize("decay", ["", "--decay cosine", "--weights 1 2 5"])
def test_a_mean_is_the_loop(decay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [10, 20, 30]
    for step, seed in zip([5, *steps], [4, 1, 2, 3], strict=True):
        save(tmp_path / "run" / f"step-{step}", weights(seed))
    (tmp_path / "run" / "step-40").mkdir()  # never finished
    actual = result(f"mean {tmp_path / 'run'} --last 3 {decay}", tmp_path)
    shares = [1 / 8, 2 / 8, 5 / 8] if "weights" in decay else decay_weights(steps, decay[8:] or "linear")
    expected = {name: torch.zeros_like(A[name]) for name in NAMES}
    for share, model in zip(shares, (A, B, C), strict=True):
        for name in NAMES:
            expected[name] += share * model[name]
    close(actual, expected)
    said = capsys.readouterr().out
    assert "decay of the learning rate over steps 5 to 35: the updates" in said
    assert json.loads((tmp_path / "out" / "edit.json").read_text())["note"].splitlines()[0] in said


def test_the_mean_of_equal_checkpoints_is_that_checkpoint(tmp_path: Path) -> None:
    for name in "xyz":
        save(tmp_path / name, weights(1))
    actual = result(f"mean {tmp_path}/x {tmp_path}/y {tmp_path}/z", tmp_path)
    assert all(torch.equal(actual[name], tensor) for name, tensor in weights(1).items())


@pytest.mark.parametrize("names", [("x", "y"), ("step-20", "step-10")])
def test_without_rising_steps_a_mean_stands_for_no_decay(
    names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(names):
        save(tmp_path / name, weights(number))
    result(f"mean {tmp_path / names[0]} {tmp_path / names[1]}", tmp_path)
    said = capsys.readouterr().out
    assert "are unknown or do not rise: the mean stands for no decay" in said and "over steps" not in said


def test_bfloat16_is_accumulated_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    for number, name in enumerate("xyz", 1):
        save(tmp_path / name, weights(number, torch.bfloat16))
    actual = result(f"{tmp_path}/x + 0.3 {tmp_path}/y + 0.3 {tmp_path}/z", tmp_path)
    for name in NAMES:
        x, y, z = (weights(seed, torch.bfloat16)[name].float() for seed in (1, 2, 3))
        assert torch.equal(actual[name], (x + 0.3 * (y - x) + 0.3 * (z - x)).bfloat16()), name


def test_a_named_dtype_converts(tmp_path: Path) -> None:
    save(tmp_path / "half", weights(2, torch.bfloat16))
    with_half = f"a + {tmp_path}/half"
    assert edit(f"{with_half} --output {tmp_path / 'refused'}") == 2
    actual = result(f"{with_half} --dtype float32", tmp_path)
    expected = {name: weights(2, torch.bfloat16)[name].float() for name in NAMES}
    assert all(actual[name].dtype == torch.float32 for name in NAMES)
    close(actual, {name: tensor.double() for name, tensor in expected.items()})


def test_the_output_is_the_same_from_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte: all files, .metadata included, low rank included; two matrices have two boxes each."""
    monkeypatch.undo()  # other processes have boxes of the usual size
    monkeypatch.setattr(writer, "MIN_FILE_BYTES", 1)
    for seed, name in ((1, "x"), (2, "y")):
        large = {f"{one}.weight": torch.randn(1100, 2000) * seed for one in ("output", "tok_embeddings")}
        save(tmp_path / name, weights(seed) | large)
    written = []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        words = f"{tmp_path}/x + 0.4 {tmp_path}/y --energy 0.7 --processes {processes} --output {out}"
        assert edit(words) == 0
        written.append(files_of(out))
    assert len(written[0]) == 5, "three files of weights, .metadata and edit.json"
    assert written[0] == written[1] == written[2]


def test_an_edit_of_an_edit_and_its_record(tmp_path: Path) -> None:
    assert edit(f"a + 0.5 b --keep 0.5 --scale norm=0 --output {tmp_path / 'step-7'}") == 0
    record = json.loads((tmp_path / "step-7" / "edit.json").read_text())
    assert record["expression"] == "a + 0.5 (b - a)"
    assert [one["path"] for one in record["operands"]] == ["a", "b"]
    assert record["operands"][0]["sha256"] == DcpCheckpoint("a").sha256
    assert record["vectors"][0]["transform"] == "Pruned(keep=0.5)"
    assert record["layers"] == [{"vector": 0, "pattern": "norm", "factor": 0.0}]
    assert set(record["xxh3_128"]) == {*files_of(tmp_path / "step-7")} - {"edit.json"}
    assert steps_in(tmp_path) == {7: True}
    assert edit(f"{tmp_path}/step-7 - b --output {tmp_path / 'again'}") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the expression is missing"),
        ("--output out", "the expression is missing"),
        ("--output out a + b", "the expression is missing: give it before the options"),
        ("a + b", "--output is missing"),
        ("a + b --output a", "--output a: exists"),
        ("a + b --output out --rank 0", "--rank 0: it must be at least 1"),
        ("a + b --output out --keep 1.5", "--keep 1.5: it must be above 0 and at most 1"),
        ("a + b --output out --rank 2 --keep 0.5", "not allowed with argument"),
        ("a --output out --rank 2", "change vectors, and the expression has none"),
        ("a + b --output out --scale x=1", "--scale x=1: it fits none of the 7 weights"),
        ("a + b --output out --family llama3", "--family and --flavor are for folders of"),
        ("a + b --output out --processes 0", "--processes 0: it must be at least 1"),
        ("a + b --output out --last 2", "--last: it is for means"),
        ("a + none --output out", "none does not exist: check the path"),
        ("mean a b a/ --output out", "mean: a checkpoint is named twice"),
        ("mean a b --rank 2 --output out", "--rank: it changes vectors"),
        ("mean a b --decay linear --output out", "the steps must be known and rise"),
        ("mean a b --weights 1 --output out", "--weights: give 2 numbers"),
        ("mean . --last 2 --output out", "--last 2: . holds 0 finished checkpoints"),
        ("mean --output out", "mean: name a folder"),
        ("a + b --output out --sale x=1", "unrecognized arguments: --sale"),
    ],
)
def test_mistakes_are_one_error_before_any_work(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert edit(text) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_what_is_to_be_copied_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a", "--output", str(tmp_path / "a b")]) == 0
    assert f"--checkpoint.initial_load_path '{tmp_path}/a b'" in capsys.readouterr().out


def test_the_folder_of_a_run_is_told_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoint" / "step-5", weights(1))
    assert edit(f"mean {tmp_path} --last 1 --output out") == 2
    assert f"holds 0 finished checkpoints of its run; give {tmp_path / 'checkpoint'}" in capsys.readouterr().err
    assert edit(f"mean {tmp_path / 'checkpoint'} --last 2 --output out") == 2
    assert "holds 1 finished checkpoints of its run; give at most --last 1" in capsys.readouterr().err


def test_a_search_does_not_overwrite_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "search.json").write_text("{}")
    assert edit(f"search a + b --target x --control y --output {tmp_path}") == 2
    assert f"--output {tmp_path} holds a search: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--output a/.metadata/x", "--output a/.metadata/x: cannot be written, because"),
        ("--output x --grid 0", "--grid: give different finite numbers, one of them not 0"),
    ],
)
def test_a_search_without_a_result_is_refused(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(f"search a + b --target t --control c {options}") == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_search_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_search", interrupted)
    assert edit("search a + b") == 130
    assert "interrupted" in capsys.readouterr().err


OTHER_MODELS: dict[str, tuple[Any, str]] = {
    "a name": (lambda w: w | {"extra.weight": torch.ones(2)}, "extra.weight is absent in a and float32 [2] in {x}"),
    "a shape": (lambda w: w | {"norm.weight": torch.ones(9)}, "norm.weight is float32 [8] in a and float32 [9] in {x}"),
    "a dtype": (
        lambda w: w | {"norm.weight": torch.ones(8).half()},
        "norm.weight is float32 [8] in a and float16 [8] in {x}. Name the dtype of the result, such as --dtype float32",
    ),
}


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_another_model_is_refused_by_name(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = OTHER_MODELS[what]
    other = save(tmp_path / "x", change(weights(2)))
    assert edit(f"a + {other} --output {tmp_path / 'out'}") == 2
    assert message.format(x=other) in capsys.readouterr().err


def test_another_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, tokenizer in (("one", "bpe, 512 ids, aaaa0000"), ("two", "bpe, 512 ids, bbbb0000"), ("three", "bpe")):
        save(tmp_path / name / "checkpoint" / "step-1", weights(1))
        (tmp_path / name / "teacher").mkdir()
        (tmp_path / name / "teacher" / "data.json").write_text(json.dumps({"measured": {"tokenizer": tokenizer}}))
    steps = [str(tmp_path / name / "checkpoint" / "step-1") for name in ("one", "two", "three")]
    assert edit(f"{steps[0]} + {steps[1]} --output {tmp_path / 'out'}") == 2
    assert "with the tokenizer 512 ids, aaaa0000, and" in capsys.readouterr().err
    assert edit(f"{steps[0]} + a --output {tmp_path / 'out'}") == 0, "one that recorded none is combined, and named"
    assert "tokenizers are not compared: a recorded none" in capsys.readouterr().err
    assert edit(f"{tmp_path / 'out'} + {steps[1]} --output {tmp_path / 'out2'}") == 2, "an edit keeps its tokenizer"


def test_a_result_that_is_not_finite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = weights(2)
    broken["layers.1.moe.experts.w1"][2, 4, 6] = float("nan")
    save(tmp_path / "x", broken)
    assert edit(f"a + 0.1 {tmp_path / 'x'} --output {tmp_path / 'out'}") == 2
    assert "layers.1.moe.experts.w1 has numbers that are not finite" in capsys.readouterr().err
    assert edit(f"a + 1e6 b --dtype float16 --output {tmp_path / 'out'}") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"], "nothing is left"


def test_what_is_read_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that changes a byte."""
    stock = writer._hash

    def after_damage(folder: Any, file: str) -> str:
        path = Path(folder.join(file))
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        return stock(folder, file)

    monkeypatch.setattr(writer, "_hash", after_damage)
    assert edit(f"a + b --output {tmp_path / 'out'}") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError("no room"), 2)], ids=["^C", "disk"])
@pytest.mark.parametrize("writes", [1, 10, 26, 40])
def test_what_ends_a_write_is_what_is_said(
    error: BaseException, code: int, writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save calls Python from C++ and, when that raises, fails at the end of its archive."""
    stock, done = writer._Hashing.write, []

    def write(self: Any, data: Any) -> int:
        done.append(1)
        if len(done) == writes:
            raise error
        return stock(self, data)

    monkeypatch.setattr(writer._Hashing, "write", write)
    assert edit(f"a + b --output {tmp_path / 'out'}") == code
    assert list(tmp_path.iterdir()) == []


def slow_edit(folder: str, target: str) -> None:
    """An edit that takes forever at its third weight."""
    os.chdir(folder)
    boxes_module.ELEMENTS, writer.MIN_FILE_BYTES = 30, 1
    stock, written = writer._write_file, []

    def stop_at_the_third(*args: Any) -> Any:
        written.append(1)
        time.sleep(1000 if len(written) == 3 else 0)
        return stock(*args)

    writer._write_file = stop_at_the_third  # type: ignore[assignment]
    edit(f"a + b --output {target}")


def test_a_killed_edit_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path: Path, folder: Path) -> None:
    target = tmp_path / "run" / "step-5"
    process = multiprocessing.get_context("forkserver").Process(target=slow_edit, args=(str(folder), str(target)))
    process.start()
    temporary = temporary_folder(target)
    deadline = time.monotonic() + 120
    while not (temporary / "__1_0.distcp").exists():
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert [path.name for path in target.parent.iterdir()] == [temporary.name]
    assert not target.exists() and "step-" not in temporary.name and not (temporary / ".metadata").exists()
    assert steps_in(target.parent) == {}
    (temporary / "left_behind").write_text("x")
    assert edit(f"a + b --output {target}") == 0, "the same edit starts again"
    assert not temporary.exists() and "left_behind" not in files_of(target)
    close(load(target), B)


def test_a_second_edit_of_the_same_output_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from titan_attent.data.io.folder import locked

    temporary = temporary_folder(tmp_path / "out")
    temporary.mkdir()
    with locked(temporary):
        assert edit(f"a + b --output {tmp_path / 'out'}") == 2
    assert "another writer is writing" in capsys.readouterr().err


def test_remote_paths_go_through_fsspec(tmp_path: Path) -> None:
    """Inputs and the output; .metadata is written last."""
    for name, seed in (("x", 1), ("y", 2)):
        save(tmp_path / name, weights(seed))
    out = f"file://{tmp_path}/out"
    assert edit(f"file://{tmp_path}/x + 0.5 file://{tmp_path}/y --output {out}") == 0
    close(load(tmp_path / "out"), {name: A[name] + 0.5 * (B[name] - A[name]) for name in NAMES})
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert max(times, key=times.__getitem__) == ".metadata"
    assert edit(f"file://{tmp_path}/x --output {out}") == 2, "a checkpoint is not overwritten"
    assert edit(f"nosuch://{tmp_path}/x --output {tmp_path / 'new'}") == 2
