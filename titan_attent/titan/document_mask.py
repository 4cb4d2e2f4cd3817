"""``[data] document_mask``: the examples of a packed row do not see each other.

A packed row holds several examples, one after the other (data/text/document_examples.py). ``example_index`` numbers
them. With the mask, a token attends to the earlier tokens of its own example only, and RoPE's positions restart at each
example. So the logits of an example are those that it has alone in a row. torchtitan's own masks separate documents at
the eos ids of the input, of which a packed row has none, and do not restart positions.

Cost: per microbatch one binary search per token for the positions. Flex attention: one block mask per type of layer, as
in torchtitan, without a host sync. Varlen attention: two host syncs, where torchtitan has one per row and one more.

Shapes: B rows, L tokens.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention.flex_attention import BlockMask, _mask_mod_signature, and_masks
from torchtitan.config import JobConfig
from torchtitan.models.attention import (
    VarlenMetadata,
    create_attention_mask,
    get_causal_mask_mod,
    get_sliding_window_mask_mod,
)
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.data.text.document_examples import DOCUMENT
from titan_attent.systems.settings import SUFFIX
from titan_attent.titan.models.families import family_of
from titan_attent.titan.patches import compat

EXAMPLE_INDEX = "example_index"
"""The column of a batch that numbers the examples of a row: int64 [B, L], rising along the row."""


def positions_of(example_index: Tensor) -> Tensor:
    """The distance of each token to the first token of its example.

    Args:
        example_index: int64 [B, L], rising along each row, with or without gaps.

    Returns:
        int64 [B, L].
    """
    example_index = example_index.contiguous()
    firsts = torch.searchsorted(example_index, example_index)
    return torch.arange(example_index.shape[1], device=example_index.device) - firsts


def same_example(example_index: Tensor) -> _mask_mod_signature:
    """Flex attention's mask function that lets a token attend to its own example, in both directions."""
    index = example_index.int()  # half the memory traffic of int64

    def in_same_example(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return index[b, q_idx] == index[b, kv_idx]

    return in_same_example


def same_fixed_block(example_index: Tensor, size: int) -> _mask_mod_signature:
    """llama4's mask function of fixed blocks of ``size`` tokens, which are counted from the start of each example."""
    blocks = (positions_of(example_index) // size).int()

    def in_same_block(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return blocks[b, q_idx] == blocks[b, kv_idx]

    return in_same_block


def flex_masks(model_args: Any, example_index: Tensor) -> BlockMask | dict[str, BlockMask]:
    """The masks of a model with flex attention, in the form of its ``get_attention_masks``.

    llama4 and gpt_oss have layers with a narrower mask, and take a mask by the type of layer.

    Args:
        model_args: the arguments of the model.
        example_index: int64 [B, L].
    """
    batch_size, seq_len = example_index.shape
    documents = and_masks(get_causal_mask_mod(), same_example(example_index))

    def mask(*narrower: _mask_mod_signature) -> BlockMask:
        return create_attention_mask(and_masks(documents, *narrower), batch_size, None, seq_len, seq_len)

    if hasattr(model_args, "fixed_attn_block_size"):
        return {"rope": mask(same_fixed_block(example_index, model_args.fixed_attn_block_size)), "nope": mask()}
    if hasattr(model_args, "sliding_window_size"):
        window = get_sliding_window_mask_mod(model_args.sliding_window_size)
        return {"basic_mask": mask(), "sliding_window_mask": mask(window)}
    return mask()


def varlen_metadata(example_index: Tensor) -> VarlenMetadata:
    """The metadata of varlen attention: each example of each row is a sequence; the batch is one row of B x L tokens.

    Args:
        example_index: int64 [B, L].
    """
    starts = (positions_of(example_index) == 0).flatten().nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([example_index.numel()]))).int()
    longest = int(bounds.diff().max())
    return VarlenMetadata(cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest)


def document_kwargs(model: nn.Module, example_index: Tensor, *, tp_mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The keyword arguments of a forward pass in which examples do not see each other.

    Args:
        model: a model of torchtitan, or a stage of it, with flex or varlen attention.
        example_index: int64 [B, L].
        tp_mesh: the mesh of tensor parallelism, if it is used.

    Returns:
        ``attention_masks`` and, if the model takes them, ``positions``. gpt_oss takes none. RoPE depends on distances
        only, so its logits differ by rounding.
    """
    args: Any = model.model_args
    if args.attn_type == "hyla":
        masks: Any = example_index.int()
    else:
        masks = varlen_metadata(example_index) if args.attn_type == "varlen" else flex_masks(args, example_index)
    kwargs: dict[str, Any] = {"attention_masks": masks}
    if "positions" in inspect.signature(type(model).forward).parameters:
        positions = positions_of(example_index)
        if tp_mesh is not None and _rotates_by_dtensor(args):
            positions = DTensor.from_local(positions, tp_mesh, [Replicate()], run_check=False)
        kwargs["positions"] = positions
    return kwargs


def _rotates_by_dtensor(model_args: Any) -> bool:
    """Whether tensor parallelism turns RoPE's table into a DTensor, which plain positions cannot index.

    torchtitan converts the positions of qwen3 and deepseek_v3 itself, but under context parallelism only.
    """
    return type(model_args).__name__ in ("Qwen3ModelArgs", "DeepSeekV3ModelArgs")


def document_batch(
    model: nn.Module, input_dict: dict[str, Tensor], labels: Tensor, *, tp_mesh: DeviceMesh | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
    """torchtitan's ``post_dataloading_process``, with :func:`document_kwargs`.

    Args:
        input_dict: "input", int64 [B, L], and ``EXAMPLE_INDEX``; without it, each row is one example.
    """
    others = {name: tensor for name, tensor in input_dict.items() if name not in ("input", EXAMPLE_INDEX)}
    inputs = input_dict["input"]
    example_index = input_dict.get(EXAMPLE_INDEX)
    if example_index is None:
        example_index = torch.zeros_like(inputs)
    return inputs, labels, others, document_kwargs(model, example_index, tp_mesh=tp_mesh)


def check_document_mask(job_config: JobConfig, spec: TrainSpec) -> None:
    """Refuse ``[data] document_mask`` where it cannot be applied; ValueError."""
    data, model, parallelism = job_config.data, job_config.model, job_config.parallelism
    if not data.document_mask:
        return
    family = family_of(job_config)
    if family.modality.is_of_images:
        raise ValueError(
            f"[data] document_mask = true: {family.name}{SUFFIX} trains on images, which have no documents. Set it to "
            "false"
        )
    if data.unit != DOCUMENT:
        raise ValueError(
            '[data] document_mask = true with unit = "window": a window is one example, whatever documents it holds. '
            'Set unit = "document", or document_mask = false'
        )
    attention = _attention_of(spec.model_args[model.flavor])
    if attention == "sdpa":
        allowed = ("flex",) if compat.IS_CPU else ("flex", "varlen")
        flavors = [name for name, args in spec.model_args.items() if _attention_of(args) in allowed]
        kinds = f"a flavor with {' or '.join(allowed)} attention"
        fix = f"Choose {kinds}: {', '.join(flavors)}" if flavors else f"{model.name} lacks {kinds}. Set it to false"
        raise ValueError(
            f'[data] document_mask = true: the attention (sdpa) of [model] flavor = "{model.flavor}" takes no mask. '
            f"{fix}"
        )
    if (degree := parallelism.context_parallel_degree) > 1:
        raise ValueError(
            f"[parallelism] context_parallel_degree = {degree} with [data] document_mask = true: torchtitan 0.2.2 "
            "numbers positions from the start of the row under context parallelism. Set it to 1, or document_mask = "
            "false"
        )
    if (degree := parallelism.pipeline_parallel_degree) > 1 and attention == "varlen":
        raise ValueError(
            f"[parallelism] pipeline_parallel_degree = {degree} with [data] document_mask = true: a pipeline cannot "
            "split the sequence lengths of varlen attention into microbatches. Choose a flavor with flex attention, or "
            "set it to 1"
        )


def _attention_of(model_args: Any) -> str:
    return getattr(model_args, "attn_type", "sdpa")
