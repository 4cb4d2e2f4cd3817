"""The values of a column of parquet or Arrow as Python objects, where texts need not be UTF-8."""

from typing import Any


def text_or_bytes(item: Any) -> Any:
    """The value of an Arrow scalar; the bytes of a text that is not UTF-8."""
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return item.as_buffer().to_pybytes() if hasattr(item, "as_buffer") else b"\xff"  # a list or struct


def decoded(value: Any) -> Any:
    """Text that an older writer stored as bytes is decoded; other bytes and values stay."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
