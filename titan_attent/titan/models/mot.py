"""The mixture of transformers under torchtitan (``mot_attent``), and its modality.

The blocks are those of models/mot; embedding, rotary positions, norm and output are torchtitan's llama3's, whose names
of modules they keep. FSDP2, HSDP, DDP, activation checkpointing and torch.compile are therefore applied by torchtitan's
own functions for llama3. The gates stand beside the blocks, in FSDP2's root group: they run outside of compiled and
recomputed regions, and are no part of what ``[freezing]`` freezes.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra import parallelize as llama
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer, apply_rotary_emb
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from titan_attent.data.examples import Examples
from titan_attent.models.mot.block import RoutedBlock, hidden_width
from titan_attent.models.mot.config import MotConfig
from titan_attent.models.mot.examples import RoutedWindows
from titan_attent.models.mot.gate import decide, exploration
from titan_attent.models.mot.grouped import RoutedLinear
from titan_attent.scores.stored import CROSS_ENTROPY
from titan_attent.systems.system import System
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.models.flavors import FOLLOWS_DATA, LADDER
from titan_attent.titan.models.routing import Routing
from titan_attent.titan.models.text import Text

NAME = "mot"


@dataclass
class MotArgs(TransformerModelArgs):
    """The sizes of ``mot_attent``: those of llama3 for one expert, and values of ``[mot]`` (models/mot/config.py)."""

    num_experts: int = MotConfig.num_experts
    prefix: int = MotConfig.prefix
    noise: float = MotConfig.noise
    shared_attention: bool = MotConfig.shared_attention

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Set the sizes from the run's ``[mot]`` and the length of its examples."""
        super().update_from_config(job_config, **kwargs)
        section: MotConfig = getattr(job_config, NAME, MotConfig())
        for key in ("num_experts", "prefix", "noise", "shared_attention"):
            setattr(self, key, getattr(section, key))

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """(number of parameters, training FLOPs per token), the latter of the one expert that computes it."""
        total, flops = super().get_nparams_and_flops(model, seq_len)
        idle = sum(
            layer.weight.numel() * (1 - layer.visited_share)
            for layer in model.modules()
            if isinstance(layer, RoutedLinear)
        )
        return total, flops - int(6 * idle)


def _rotate(queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rotary_emb(queries, keys, freqs_cis=positions)


class MixtureOfTransformers(Transformer):
    """torchtitan's llama3 with routed blocks: token ids int64 [B, L] -> logits [B, L, V].

    Attributes:
        routes: int64 [N, B], the expert of each sequence in each layer in the last forward pass.
        probabilities: fp32 [N, B, E], of the same, with a graph.
    """

    routes: Tensor
    probabilities: Tensor

    def __init__(self, model_args: MotArgs):
        without_layers: Any = copy.copy(model_args)
        without_layers.n_layers = 0
        super().__init__(without_layers)
        args: Any = model_args
        self.model_args, self.n_layers = args, args.n_layers
        self.gates = nn.ModuleDict()
        for layer in range(args.n_layers):
            depth = layer + 1 if args.depth_init else args.n_layers
            self.layers[str(layer)] = RoutedBlock(
                args.dim,
                args.n_heads,
                args.n_kv_heads or args.n_heads,
                hidden_dim=hidden_width(args.dim, args.multiple_of, args.ffn_dim_multiplier),
                num_experts=args.num_experts,
                shared_attention=args.shared_attention,
                norm_eps=args.norm_eps,
                init_std=0.02 / (2 * depth) ** 0.5,
                rotate=_rotate,
            )
            self.gates[str(layer)] = nn.Linear(args.dim, args.num_experts, bias=False)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        for gate in self.gates.values():
            nn.init.trunc_normal_(cast(nn.Linear, gate).weight, std=0.02)

    def forward(self, tokens: Tensor, route_keys: Tensor | None = None) -> Tensor:
        """The logits; ``route_keys`` (models/mot/gate.py), int64 [B], add exploration noise in training mode."""
        args = cast(MotArgs, self.model_args)
        h, routings = cast(nn.Module, self.tok_embeddings)(tokens), []
        for i, (name, block) in enumerate(self.layers.items()):
            noise = None
            if route_keys is not None and self.training and args.noise > 0:
                noise = exploration(route_keys, layer=i, num_experts=args.num_experts, scale=args.noise)
            weight = cast(Tensor, self.gates[name].weight)
            routing = decide(h, weight, prefix=args.prefix, noise=noise)
            h = block(h, self.freqs_cis, routing.route, routing.probability)
            routings.append(routing)
        self.routes = torch.stack([routing.route for routing in routings])
        self.probabilities = torch.stack([routing.probabilities for routing in routings])
        return cast(nn.Module, self.output)(cast(nn.Module, self.norm)(h))


FLAVORS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "n_layers": 4, "n_heads": 6, "vocab_size": 4096, "multiple_of": 64, "rope_theta": 10000},
} | {
    name: {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "vocab_size": FOLLOWS_DATA,
        "multiple_of": 128,
        "rope_theta": 500000,
    }
    for name, (dim, layers, heads) in LADDER.items()
}
"""The sizes of one expert, those of llama3's flavors of the same names."""


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """torchtitan's ``parallelize_fn`` for llama3, whose module names the blocks have."""
    # Selective checkpointing saves the results of matrix products; those of experts are other ops.
    llama._op_sac_save_list |= {torch.ops.aten._grouped_mm.default, torch.ops.aten.bmm.default}
    return llama.parallelize_llama(model, parallel_dims, job_config)


def train_spec() -> TrainSpec:
    """torchtitan's llama3 TrainSpec with the mixture's model."""
    return replace(
        get_train_spec("llama3"),
        model_cls=MixtureOfTransformers,
        model_args={name: MotArgs(**sizes) for name, sizes in FLAVORS.items()},
        parallelize_fn=parallelize,
        pipelining_fn=None,
        state_dict_adapter=None,
    )


class RoutedText(Text):
    """The modality of ``mot_attent``: windows of tokens whose first labels, which the gates have seen, do not count."""

    systems: tuple[type[System], ...] = (Routing,)

    def check(self, job_config: JobConfig) -> None:
        super().check(job_config)
        section, data = job_config.mot, job_config.data
        section.validate()
        for key in ("unit", "validation_unit"):
            if getattr(data, key) not in ("", "window"):
                raise ValueError(
                    f'[data] {key} = "{getattr(data, key)}": mot_attent routes a window by its first tokens, so the '
                    "documents behind the first would be computed by an expert that was chosen for another one. Set "
                    'unit = "window"'
                )
        sections = ("training", "validation") if job_config.validation.enable else ("training",)
        for name in sections:
            if section.prefix > getattr(job_config, name).seq_len:
                raise ValueError(
                    f"[mot] prefix = {section.prefix} is more than [{name}] seq_len = "
                    f"{getattr(job_config, name).seq_len}: the route would have seen every label. Lower it"
                )

    def open(self, datasets: DataSets, job_config: JobConfig, *, validation: bool = False) -> Examples:
        windows: Any = super().open(datasets, job_config, validation=validation)
        return RoutedWindows(windows.shards, seq_len=windows.seq_len, prefix=job_config.mot.prefix)

    def loss(self, job_config: JobConfig) -> str:
        prefix = job_config.mot.prefix
        return CROSS_ENTROPY + (f", of tokens behind the first {prefix} of a window" if prefix > 1 else "")

    def validated(self, job_config: JobConfig) -> str:
        return self.loss(job_config)

    def measured(self, job_config: JobConfig, examples: Any) -> dict[str, Any]:
        return super().measured(job_config, examples) | {"mot.prefix": job_config.mot.prefix}


def lacks() -> dict[str, str]:
    """What ``mot_attent`` does not support, for its entry in families.py."""
    return {
        "tensor_parallel": "the experts' matrices are one grouped product, which torchtitan's plan for llama3 cannot "
        "shard. Set it to 1",
        "context_parallel": "the gate reads the first tokens of a window, which one rank alone would hold. Set it to 1",
        "pipeline_parallel": "the balance loss needs the gates of all stages in one loss. Set it to 1",
        "expert_parallel": "sequences stay on their ranks: all experts are on every rank, sharded by FSDP2. Set it to "
        "1",
        "residual blocks": "a block of mot_attent is multiplied by its gate's probability, which depends on its input",
    }
