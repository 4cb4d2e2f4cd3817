"""The sizes of the flavors of ``hyla_attent``, without those that come from the data."""

from typing import Any

REFERENCE: dict[str, dict[str, Any]] = {
    "reference_fuzzy_logic": {"dim": 128, "n_layers": 2, "n_heads": 8, "head_dim": 2, "hidden_dim": 256},
    "reference_sraven": {"dim": 128, "n_layers": 4, "n_heads": 16, "head_dim": 4, "hidden_dim": 256},
}
"""The authors' transformers for their two synthetic tasks (configs/logic.py and configs/raven.py of their code)."""

LLAMA: dict[str, dict[str, Any]] = {
    # 0.9 M parameters, as llama3's: a few hundred steps take minutes on a CPU core.
    "bench": {"dim": 128, "n_layers": 3, "n_heads": 4, "vocab_size": 1024, "multiple_of": 64, "rope_theta": 10000},
    "tiny": {"dim": 192, "n_layers": 4, "n_heads": 6, "vocab_size": 4096, "multiple_of": 64, "rope_theta": 10000},
    "1B": {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.5,
        "multiple_of": 256,
        "rope_theta": 500000,
    },
    "8B": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
        "rope_theta": 500000,
    },
}
"""llama3's sizes beside those of its ladder, with the arguments of torchtitan's TransformerModelArgs."""
