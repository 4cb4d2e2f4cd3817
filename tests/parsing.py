"""Command lines parsed in half of the time, for tests that parse many of them."""

import functools
from collections.abc import Callable
from typing import Any

import tyro._docstrings


def skip_missing_sources() -> None:
    """Let tyro not look for the source of the class into which torchtitan merges a custom configuration.

    tyro documents fields by the comments in their source. That class was made at run time, in Python's module
    ``types``: for each of its 24 fields tyro parses that module, finds no class, and goes on without a comment.
    """
    stock: Callable[..., Any] = tyro._docstrings.get_class_tokenization_with_field

    @functools.wraps(stock)
    def of_field(cls: type, field_name: str) -> Any:
        return None if cls.__module__ == "types" else stock(cls, field_name)

    tyro._docstrings.get_class_tokenization_with_field = of_field  # type: ignore[assignment]
