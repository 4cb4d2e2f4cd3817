"""What the user says of the files to adopt, checked before any of them is read."""

import os
from dataclasses import dataclass
from pathlib import Path

from titan_attent.data.formats.table import FORMATS
from titan_attent.data.formats.token_file import BOUNDARIES, TOKEN_DTYPES
from titan_attent.data.text.document_files import LENGTHS_FILE
from titan_attent.data.text.tokenizer import TOKENIZER_FILES

STEM = "adopted-"
"""The names of shards begin with it, and so do those of the files beside the index."""
RECORD_FILE = "adopting.jsonl"
"""The finished shards of an interrupted command."""
OWN_FILES = (STEM, RECORD_FILE, LENGTHS_FILE, *TOKENIZER_FILES)
"""What the names of the files that adopting writes begin with, beside index.json."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to adopt.

    Attributes:
        format: a name in ``FORMATS``; empty to recognise each file.
        dtype: dtype of tokens without a header; empty if not given.
        boundaries: one of ``BOUNDARIES``; empty for the way of the format.
        eos, bos: id, or text of a special token of the tokenizer; empty for the tokenizer's eos and the format's bos.
        column: the column of tokens, where there are columns.
        include: a pattern of the paths below an input that are read; empty for all.
        label_masks: a file, folder or pattern of masks, one per token file, in the same order; empty for none.
        decompress: folder for decompressed copies; empty to refuse compressed files.
        shard_tokens: a shard ends after the document that reaches this number of tokens.
        num_threads: files that are hashed at a time.
    """

    format: str = ""
    dtype: str = ""
    boundaries: str = ""
    eos: str = ""
    bos: str = ""
    column: str = "tokens"
    include: str = ""
    label_masks: str = ""
    decompress: str = ""
    shard_tokens: int = 2**27
    num_threads: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--format", self.format, FORMATS),
            ("--dtype", self.dtype, TOKEN_DTYPES),
            ("--boundaries", self.boundaries, BOUNDARIES),
        ):
            if value and value not in known:
                raise ValueError(f"{name} {value}: is unknown; use one of {', '.join(known)}")
        if self.shard_tokens < 1 or self.num_threads < 1:
            raise ValueError("--shard-tokens and --threads must be 1 or more")

    def identity(self) -> str:
        """What decides about the tokens and documents, as options of the command; kept in the index."""
        names = ("format", "dtype", "boundaries", "eos", "bos", "column", "include", "shard_tokens")
        values = {name: getattr(self, name) for name in names}
        default = Options()
        return " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value != getattr(default, name)
        )


@dataclass(frozen=True)
class Places:
    """Where the data set is.

    Attributes:
        folder: of index.json.
        root: the folder to which paths of token files are relative.
        stored_root: ``root`` as the index names it: absolute, or relative to ``folder``.
    """

    folder: Path
    root: Path
    stored_root: str


def places(inputs: list[Path], *, output: str, root: str) -> Places:
    """Decide where the index is written. ValueError if options contradict each other, or an input is outside root."""
    if bool(output) != bool(root):
        raise ValueError("give both --output and --root, or neither: paths in the index are relative to --root")
    if not output:
        if len(inputs) == 1 and not inputs[0].exists() and not set("*?[") & set(str(inputs[0])):
            raise ValueError(f"{inputs[0]}: no such folder; correct the path")
        if len(inputs) != 1 or not inputs[0].is_dir():
            raise ValueError(
                "several inputs, or a file: give --output DIR for the index, and --root for their common folder"
            )
        return Places(inputs[0], inputs[0], ".")
    folder, base = Path(output), Path(root)
    if not base.is_dir():
        raise ValueError(f"--root {root}: no such folder")
    for path in inputs:
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(base)):
            raise ValueError(f"{path}: is not below --root {root}; name a folder that holds all inputs")
    stored = root if os.path.isabs(root) else os.path.relpath(os.path.abspath(root), os.path.abspath(output))
    return Places(folder, base, stored)
