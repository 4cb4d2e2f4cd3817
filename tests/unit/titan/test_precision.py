"""The precision of a run on CPU: torch's report, the user's setting, and one result on all ranks."""

import platform

import pytest
import torch
import torch.distributed as dist

from titan_attent.titan.patches import cpu


def native(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_native_bfloat16() -> bool:
        return answer

    monkeypatch.setattr(cpu, "has_native_bfloat16", has_native_bfloat16)


@pytest.mark.parametrize(
    ("is_native", "value", "written", "expected", "level"),
    [
        (True, "bfloat16", False, "bfloat16", None),
        (True, "bfloat16", True, "bfloat16", None),
        (True, "float32", True, "float32", None),
        (False, "bfloat16", False, "float32", "INFO"),
        (False, "bfloat16", True, "bfloat16", "WARNING"),
        (False, "float32", True, "float32", None),
    ],
)
def test_fp32_unless_native_or_written(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_native: bool,
    value: str,
    written: bool,
    expected: str,
    level: str | None,
) -> None:
    native(is_native, monkeypatch)
    caplog.set_level("INFO")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cpu.default_precision(value, written=written) == expected
    assert [record.levelname for record in caplog.records] == ([level] if level else []), "rank 0 alone logs it, once"
    assert all("training.mixed_precision_param" in record.getMessage() for record in caplog.records)


def test_the_first_rank_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes may have different CPUs, but ranks cannot exchange tensors of two precisions."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }.items():
        monkeypatch.setenv(name, value)
    for first, expected in ((True, "bfloat16"), (False, "float32")):
        for rank, answer in ((0, first), (1, not first)):
            native(answer, monkeypatch)
            monkeypatch.setenv("RANK", str(rank))
            assert cpu.default_precision("bfloat16", written=False) == expected


def test_native_means_instructions_and_not_their_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports support on any CPU with AVX-512."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for has_instructions in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=has_instructions: answer)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
        assert cpu.has_native_bfloat16() is has_instructions
    for hidden in ("AVX2", "avx512_core"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", hidden)
        assert not cpu.has_native_bfloat16()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert cpu.has_native_bfloat16()
