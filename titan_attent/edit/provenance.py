"""``edit.json`` in the folder of a result: what it was made of, how, and the hashes of both.

{"format": "titan_attent.edit", "version": 1,
 "expression": "base + 0.4 (tuned - base)",
 "operands": [{"path": .., "sha256": ..}, ..],          of .metadata, or of the headers of safetensors files
 "base": "base", "vectors": [{"coefficient": 0.4, "checkpoint": .., "origin": .., "transform": ".."}],
 "layers": [{"vector": 0, "pattern": "attention", "factor": 0.5}],
 "note": "the mean replaces a linear decay ..",          of means; else empty
 "tokenizer": "512 ids, 1a2b3c4d", "dtype": "float32",
 "xxh3_128": {"__0_0.distcp": "..", ".metadata": ".."},
 "torch": "2.13.0", "titan_attent": ".."}
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import xxhash

from titan_attent import __version__
from titan_attent.edit.combine import Combination
from titan_attent.edit.writer import WrittenFile
from titan_attent.foundations.versioned_json import encode_versioned
from titan_attent.titan.checkpoint_metadata import METADATA_FILE

FORMAT, VERSION = "titan_attent.edit", 1


def record_of(
    combination: Combination, files: Sequence[WrittenFile], *, expression: str, note: str, metadata: bytes
) -> bytes:
    """The bytes of ``edit.json``."""
    operands = list(combination.operands.values())
    fields: dict[str, Any] = {
        "expression": expression,
        "operands": [{"path": one.path, "sha256": one.sha256} for one in operands],
        "base": combination.base,
        "vectors": [
            {
                "coefficient": term.coefficient,
                "checkpoint": term.checkpoint,
                "origin": term.origin,
                "transform": str(term.transform),
            }
            for term in combination.terms
        ],
        "layers": [asdict(factor) for factor in combination.factors],
        "note": note,
        "tokenizer": next((one.tokenizer for one in operands if one.tokenizer), ""),
        "dtype": str(combination.dtype or "").removeprefix("torch.") or "as the base",
        "xxh3_128": {file.name: file.xxh3 for file in files} | {METADATA_FILE: xxhash.xxh3_128(metadata).hexdigest()},
        "torch": torch.__version__,
        "titan_attent": __version__,
    }
    return encode_versioned(fields, format=FORMAT, version=VERSION)
