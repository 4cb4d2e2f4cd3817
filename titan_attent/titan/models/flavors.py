"""The flavors of text models that this package adds to torchtitan's, and the size of a model's vocabulary.

A flavor with ``vocab_size = FOLLOWS_DATA`` has no vocabulary of its own: the model gets as many ids as the data's
tokenizer, rounded up to a multiple of 64. A flavor with a number keeps it, as torchtitan's "8B" keeps the 128,256 ids
of its published weights, unless the tokenizer has more; then the model's vocabulary follows the data, too. Ids beyond
the tokenizer's are never a label.

The vocabulary depends on the flavor and the tokenizer alone, so training, scoring, frozen models and resumes agree.

Cost: none; the index of the data is open already.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols import BaseModelArgs

from titan_attent.data.text.shards import TokenShards

FOLLOWS_DATA = 0
"""The ``vocab_size`` of a flavor whose models have the vocabulary of their data."""
VOCABULARY_MULTIPLE = 64
"""A model's vocabulary that follows the data is a multiple of it, so that tensor parallelism shards it evenly."""

LADDER = {
    "10M": (384, 6, 6),
    "30M": (512, 10, 8),
    "60M": (640, 12, 10),
    "125M": (768, 18, 12),
    "350M": (1024, 28, 16),
}
"""Flavors of llama3 and qwen3 to begin with: (width, layers, heads of 64). Their names count the parameters without the
embeddings and the output, which depend on the data."""

SCORER_FLAVORS = {"scorer_xs": (32, 1, 2), "scorer_s": (64, 2, 2), "scorer_m": (256, 4, 4), "scorer_l": (512, 8, 8)}
"""The flavors of scorers (scoring/pair.py): (width, layers, heads) of a llama3 with exactly the vocabulary of its
data."""

EXTRA_FLAVORS: dict[str, dict[str, BaseModelArgs]] = {
    "llama3": {
        # About 2.6 M parameters: a few hundred steps take several minutes on two CPU cores.
        "tiny": TransformerModelArgs(dim=192, n_layers=4, n_heads=6, vocab_size=4096, multiple_of=64, rope_theta=10000),
        # About 0.9 M parameters, for benchmarks/convergence.
        "bench": TransformerModelArgs(
            dim=128, n_layers=3, n_heads=4, vocab_size=1024, multiple_of=64, rope_theta=10000
        ),
        # About 5.4 M parameters, the source of "bench" for benchmarks/distillation_text.
        "bench_source": TransformerModelArgs(
            dim=256, n_layers=6, n_heads=8, vocab_size=1024, multiple_of=64, rope_theta=10000
        ),
        # About 126 M parameters, for benchmarks/long_windows/gpu.py.
        "bench_125m": TransformerModelArgs(
            dim=768, n_layers=16, n_heads=12, vocab_size=8192, multiple_of=256, rope_theta=10000
        ),
        # About 160 M parameters, for benchmarks/speed/gpu_steps.py.
        "bench_gpu": TransformerModelArgs(
            dim=1024, n_layers=12, n_heads=16, vocab_size=4096, multiple_of=256, rope_theta=10000
        ),
    }
    | {
        name: TransformerModelArgs(
            dim=dim, n_layers=layers, n_heads=heads, vocab_size=FOLLOWS_DATA, multiple_of=128, rope_theta=500000
        )
        for name, (dim, layers, heads) in LADDER.items()
    }
}

FAMILIES_WITH_TWINS = ("llama3", "qwen3")
"""The families in which each flavor with sdpa attention gets a twin with flex attention (:func:`flex_twins`)."""


def _qwen3_ladder() -> dict[str, BaseModelArgs]:
    """The :data:`LADDER` of qwen3, with its own proportions: half as many keys as queries, and a tied output."""
    from torchtitan.models.qwen3 import Qwen3ModelArgs  # only where it is used: it imports the experts

    return {
        name: Qwen3ModelArgs(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=heads // 2,
            head_dim=dim // heads,
            hidden_dim=3 * dim,
            vocab_size=FOLLOWS_DATA,
            enable_weight_tying=True,
        )
        for name, (dim, layers, heads) in LADDER.items()
    }


def flex_twins(flavors: Mapping[str, BaseModelArgs]) -> dict[str, BaseModelArgs]:
    """A flavor "<name>_flex" for each of ``flavors`` with sdpa attention that has no such flavor yet.

    Its weights and its causal mask are those of "<name>"; ``[data] document_mask`` needs flex attention.
    """
    twins: dict[str, BaseModelArgs] = {}
    for name, args in flavors.items():
        if vars(args)["attn_type"] == "sdpa" and not {f"{name}_flex", f"{name}_flex_attn"} & flavors.keys():
            twin = copy.deepcopy(args)
            vars(twin)["attn_type"] = "flex"
            twins[f"{name}_flex"] = twin
    return twins


def flavors_of(family: str, stock: Mapping[str, BaseModelArgs]) -> dict[str, BaseModelArgs]:
    """The flavors of a text family: copies of torchtitan's ``stock``, those of this package, and the flex twins.

    They are copies, because torchtitan writes the run's settings into the selected flavor.
    """
    extra = _qwen3_ladder() if family == "qwen3" else EXTRA_FLAVORS.get(family, {})
    flavors = copy.deepcopy(dict(stock)) | copy.deepcopy(extra)
    if family in FAMILIES_WITH_TWINS:
        flavors |= flex_twins(flavors)
    return flavors


def scorers(shards: TokenShards) -> dict[str, BaseModelArgs]:
    """The flavors of scorers for the data ``shards``."""
    return {
        name: TransformerModelArgs(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            vocab_size=shards.tokenizer_info["vocab_size"],
            multiple_of=dim,
            rope_theta=10000,
        )
        for name, (dim, n_layers, n_heads) in SCORER_FLAVORS.items()
    }


def vocabulary(own: int, *, num_ids: int) -> int:
    """The number of ids of a model.

    Args:
        own: the ``vocab_size`` of its flavor, or ``FOLLOWS_DATA``.
        num_ids: the number of ids of the data's tokenizer.
    """
    return own if own >= num_ids else -(-num_ids // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def follow_data(flavors: Mapping[str, BaseModelArgs], shards: TokenShards) -> None:
    """Set ``vocab_size`` of every flavor for the data ``shards``, in place."""
    for args in flavors.values():
        sizes: Any = args
        sizes.vocab_size = vocabulary(sizes.vocab_size, num_ids=shards.tokenizer_info["vocab_size"])
