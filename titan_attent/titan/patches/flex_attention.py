"""Patches for flex attention in torchtitan 0.2.2; registry.py applies them when a TrainSpec of the family is built.

1. llama4 chooses the mask of a layer's type, and then passes the dictionary of all masks to the attention, which fails.
   Here the attention looks its mask up. Remove when torchtitan passes the mask.
2. qwen3 under tensor parallelism passes DTensors to the attention, which flex attention does not take; torchtitan has
   no flavor of qwen3 with flex attention. Here each rank attends with its local heads. Remove when torchtitan has such
   flavors.
"""

from typing import Any

from titan_attent.titan.patches.cpu_attention import on_local_heads


def fix_llama4_masks() -> None:
    """Let llama4's flex attention look up the mask of its layer; call before a model is built."""
    from torchtitan.models.attention import FlexAttentionWrapper
    from torchtitan.models.llama4.model.model import Attention

    class LayerMask(FlexAttentionWrapper):
        """Flex attention that takes all masks of the model."""

        def __init__(self, key: str):
            super().__init__()
            self.key = key

        def forward(self, *args: Any, block_mask: Any, **kwargs: Any) -> Any:
            return super().forward(*args, block_mask=block_mask[self.key], **kwargs)

    stock: Any = Attention.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if self.attn_type == "flex":
            self.inner_attention = LayerMask("rope" if self.use_rope else "nope")

    Attention.__init__ = init


def fix_qwen3_heads() -> None:
    """Let qwen3's flex attention run on local heads under tensor parallelism; call before a model is built."""
    import torchtitan.models.qwen3.model.model as qwen3

    class LocalHeads(qwen3.FlexAttentionWrapper):
        """Flex attention of plain tensors and of DTensors that are sharded along the heads."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return on_local_heads(super().forward)(*args, **kwargs)

    qwen3.FlexAttentionWrapper = LocalHeads
