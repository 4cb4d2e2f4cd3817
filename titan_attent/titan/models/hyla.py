"""``hyla_attent`` under torchtitan: attention as a hypernetwork (models/hyla/) in llama3, or in the authors' blocks.

The model is torchtitan's llama3 with other attention modules, or with the authors' blocks, norm and head for the
``reference_*`` flavors. Names stay llama3's, so FSDP2, HSDP, DDP, pipelines, activation checkpointing and torch.compile
are applied by torchtitan's own functions. Context parallelism is layer.py's.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.llama3.infra import parallelize as llama
from torchtitan.models.llama3.model.model import Attention, Transformer, apply_rotary_emb
from torchtitan.models.utils import get_dense_model_nparams_and_flops
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.models.hyla.attention import Form
from titan_attent.models.hyla.flavors import LLAMA, REFERENCE
from titan_attent.models.hyla.layer import HyperAttention, Spread
from titan_attent.models.hyla.reference import NORM_EPS, ReferenceBlock
from titan_attent.titan.models.flavors import FOLLOWS_DATA, LADDER
from titan_attent.titan.models.text import Text

ATTENTION = "hyla"
"""The ``attn_type`` of its flavors: a forward pass takes the numbers of the documents as its mask."""
SAMPLE = 64
"""Examples whose labels are looked at, for models that see later tokens."""


@dataclass
class HylaModelArgs(TransformerModelArgs):
    """The sizes of a model: llama3's, and these.

    Attributes:
        is_reference: whether its blocks are the authors', with their ``head_dim`` and ``hidden_dim``.
        causal: whether a token sees no later one.
        normalization, value_network, output_norm: ``[hyla]``.
    """

    attn_type: str = ATTENTION
    is_reference: bool = False
    causal: bool = True
    head_dim: int = 0
    hidden_dim: int = 0
    normalization: str = "rms_head"
    value_network: str = "relu"
    output_norm: bool = False

    def __post_init__(self) -> None:
        self.head_dim = self.head_dim or self.dim // self.n_heads

    @property
    def head_widths(self) -> int:
        """The widths of the products of one head per query and key, summed: scores, hidden values, outputs."""
        return 3 * self.head_dim

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        super().update_from_config(job_config, **kwargs)
        hyla = getattr(job_config, "hyla", None)
        if hyla is not None:  # torchtitan's own JobConfig has no such section
            self.normalization, self.value_network = hyla.normalization, hyla.value_network
            self.output_norm = hyla.output_norm

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        return get_dense_model_nparams_and_flops(self, model, self.head_widths, seq_len)

    def inner_attention(self) -> HyperAttention:
        """The attention of one layer."""
        form = Form(self.normalization, self.value_network)
        return HyperAttention(form, causal=self.causal, output_norm=self.output_norm)


class HylaAttention(Attention):
    """llama3's attention layer with its weights, RoPE and grouped keys, around a :class:`HyperAttention`."""

    def __init__(self, model_args: HylaModelArgs):
        super().__init__(dataclasses.replace(model_args, attn_type="sdpa"))
        self.inner_attention = model_args.inner_attention()

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """[B, T, dim] -> [B, T, dim]. ``attention_masks``: int [B, T], the number of each token's document, or None."""
        q, k, v = (w(x).unflatten(2, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary_emb(q, k, freqs_cis=freqs_cis, positions=positions)
        return self.wo(self.inner_attention(q, k, v, segments=attention_masks).flatten(2))


class HylaTransformer(Transformer):
    """Token ids int64 [B, T] -> logits [B, T, vocabulary]."""

    def __init__(self, model_args: HylaModelArgs):
        super().__init__(dataclasses.replace(model_args, attn_type="sdpa"))
        self.model_args: HylaModelArgs = model_args
        for name, block in self.layers.items():
            if model_args.is_reference:
                self.layers[name] = ReferenceBlock(
                    model_args.dim,
                    n_heads=model_args.n_heads,
                    head_dim=model_args.head_dim,
                    hidden_dim=model_args.hidden_dim,
                    num_buckets=model_args.max_seq_len,
                    inner=model_args.inner_attention(),
                )
            else:
                cast(Any, block).attention = HylaAttention(model_args)
        if model_args.is_reference:
            self.norm = nn.LayerNorm(model_args.dim, eps=NORM_EPS)
            self.output = nn.Linear(model_args.dim, model_args.vocab_size)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        if self.model_args.is_reference:
            if self.tok_embeddings is not None:
                nn.init.normal_(self.tok_embeddings.weight, std=self.model_args.dim**-0.5)
            if self.output is not None:
                nn.init.zeros_(self.output.bias)


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """torchtitan's ``parallelize_fn`` for llama3, with this package's context parallelism in place of its own."""
    compiled = job_config.compile
    balanced = job_config.parallelism.context_parallel_load_balancer is not None
    for block in cast(Any, model).layers.values():
        # The operator is one node of a compiled block, so its tiles are compiled separately.
        is_compiled = compiled.enable and "model" in compiled.components
        block.attention.inner_attention.backend = compiled.backend if is_compiled else ""

    def spread(modules: list[HyperAttention], mesh: DeviceMesh, attention_type: str) -> None:
        for module in modules:
            module.spread = Spread(mesh, balanced)

    llama._op_sac_save_list.add(torch.ops.titan_attent.hyla_attention.default)
    llama._op_sac_save_list.add(torch.ops.aten.addmm.default)  # matrix products with a bias
    with patch.object(llama, "apply_cp_to_attention_module", spread):
        return llama.parallelize_llama(model, parallel_dims, job_config)


def flavors() -> dict[str, TransformerModelArgs]:
    """The flavors: the authors' two, llama3's ladder, and some of its other sizes."""
    ladder: dict[str, dict[str, Any]] = {
        name: {"dim": dim, "n_layers": layers, "n_heads": heads, "multiple_of": 128, "rope_theta": 500000}
        for name, (dim, layers, heads) in LADDER.items()
    }
    of_data: dict[str, Any] = {"vocab_size": FOLLOWS_DATA}
    return (
        {name: HylaModelArgs(**sizes, **of_data, is_reference=True, causal=False) for name, sizes in REFERENCE.items()}
        | {name: HylaModelArgs(**sizes, **of_data) for name, sizes in ladder.items()}
        | {name: HylaModelArgs(**sizes) for name, sizes in LLAMA.items()}
    )


def train_spec() -> TrainSpec:
    """torchtitan's llama3 TrainSpec with these models. Hugging Face has no format for them."""
    return dataclasses.replace(
        get_train_spec("llama3"),
        model_cls=HylaTransformer,
        model_args=flavors(),
        parallelize_fn=parallelize,
        state_dict_adapter=None,
    )


class HylaText(Text):
    """The modality of ``hyla_attent``: text, with ``[hyla]``."""

    def check(self, job_config: JobConfig) -> None:
        super().check(job_config)
        cast(Any, job_config).hyla.validate()
        if (balancer := job_config.parallelism.context_parallel_load_balancer) not in (None, "headtail"):
            raise ValueError(
                f'[parallelism] context_parallel_load_balancer = "{balancer}": hyla_attent has no block mask to '
                'balance. Use "headtail"'
            )

    def check_fit(self, examples: Any, model_args: Any, *, model: str, key: str) -> None:
        """As for text; refuse labels that a model that is not causal finds in its input."""
        super().check_fit(examples, model_args, model=model, key=key)
        if model_args.causal:
            return
        ids = torch.arange(min(SAMPLE, len(examples)))
        labels = examples.read(ids[:, None] if examples.columns else ids)[1]
        if (labels[:, :-1] != IGNORE_INDEX).any():
            raise ValueError(
                f"[data] {key} = {examples.shards.path}: {model} sees later tokens, so a row must have one label, at "
                'its end. Train on such a task (python -m titan_attent.tasks fuzzy_logic) with unit = "document" and '
                "the seq_len that it prints, or choose a causal flavor"
            )
