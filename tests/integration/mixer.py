"""An external test family: a causal MLP-Mixer (after Tolstikhin et al. 2021, arXiv 2105.01601), in one module.

Shapes: B rows, L tokens, D channels, V token ids.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtitan.config import JobConfig as TorchtitanConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from titan_attent.job_config import JobConfig  # noqa: F401
from titan_attent.titan.models.family import Family
from titan_attent.titan.models.text import Text


@dataclass
class MixerArgs(BaseModelArgs):
    dim: int = 32
    n_layers: int = 2
    vocab_size: int = 4096
    max_seq_len: int = 64

    def update_from_config(self, job_config: TorchtitanConfig, **kwargs: Any) -> None:
        self.max_seq_len = job_config.training.seq_len

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        return num_parameters, 6 * num_parameters


class TokenMixing(nn.Module):
    """y_t = the sum over s <= t of W_ts x_s, projected: [B, L, D] -> [B, L, D]."""

    def __init__(self, args: MixerArgs):
        super().__init__()
        self.mix = nn.Linear(args.max_seq_len, args.max_seq_len, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.mix.weight.tril()[: x.shape[1], : x.shape[1]]
        return self.wo(torch.einsum("ts,bsd->btd", weights, x))


class FeedForward(nn.Module):
    def __init__(self, args: MixerArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, 4 * args.dim, bias=False)
        self.w2 = nn.Linear(4 * args.dim, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))


class Block(nn.Module):
    def __init__(self, args: MixerArgs):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(args.dim), nn.RMSNorm(args.dim)
        self.attention, self.feed_forward = TokenMixing(args), FeedForward(args)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Mixer(nn.Module):
    """Token ids int64 [B, L] -> logits [B, L, V]. The modules have the names of torchtitan's llama3, whose
    ``parallelize_fn`` shards them."""

    def __init__(self, args: MixerArgs):
        super().__init__()
        self.model_args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): Block(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x)
        return self.output(self.norm(x))


def train_spec() -> TrainSpec:
    stock = get_train_spec("llama3")
    sizes = {"small": MixerArgs()}
    return replace(stock, model_cls=Mixer, model_args=sizes, pipelining_fn=None, state_dict_adapter=None)


DIMENSIONS = ("tensor_parallel", "context_parallel", "pipeline_parallel", "expert_parallel")
LACKS = dict.fromkeys(DIMENSIONS, "the mixer runs under FSDP2, HSDP and DDP. Set it to 1")
FAMILIES = (Family(name="mixer", modality=Text(), train_spec=train_spec, lacks=LACKS),)
