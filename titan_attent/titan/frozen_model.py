"""A second, frozen model beside the learner, loaded from a checkpoint: of any family, sharded over the same ranks.

It is built as torchtitan builds the learner (meta device, tensor parallelism, FSDP2), without activation checkpointing.
A learner under DDP has an unwrapped frozen model, because DDP requires gradients. Under a pipeline only the ranks of
the last stage, which compute the loss, hold the model, and they hold all of its layers.

Cost: its parameters, sharded as the learner's, and a forward pass per microbatch, which keeps no activations.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import cp_shard
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools import utils

from titan_attent.systems.settings import SUFFIX
from titan_attent.titan.checkpoint_metadata import check_files, read_metadata
from titan_attent.titan.checks.hugging_face_checks import model_shapes
from titan_attent.titan.checks.load_sources import warn_of_pickles
from titan_attent.titan.checks.parallelism import check_family, check_split
from titan_attent.titan.checks.resume_checks import check_shapes
from titan_attent.titan.checks.value_checks import check_flavor
from titan_attent.titan.document_mask import check_document_mask, document_kwargs
from titan_attent.titan.health import all_finite
from titan_attent.titan.models.families import family_of
from titan_attent.titan.train_spec import attent_spec


class FrozenModel:
    """A callable: ``frozen(inputs)`` -> logits as the parallelism leaves them, without gradients.

    Args:
        model: the parallelised model with its weights.
        tokenizer: the tokenizer for the masks of flex attention, or None.
        precision: returns the autocast context of a forward pass.
        document_mask: whether examples of a row do not see each other (document_mask.py).
        tp_mesh, cp_mesh: the meshes of tensor and context parallelism, if they are used.
        load_balancer: ``parallelism.context_parallel_load_balancer``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any,
        precision: Callable[[], AbstractContextManager[Any]],
        document_mask: bool = False,
        tp_mesh: DeviceMesh | None = None,
        cp_mesh: DeviceMesh | None = None,
        load_balancer: str | None = None,
    ):
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        self.document_mask, self.tp_mesh = document_mask, tp_mesh
        self.cp_mesh, self.load_balancer = cp_mesh, load_balancer

    @torch.no_grad()
    def __call__(self, inputs: Tensor, example_index: Tensor | None = None) -> Tensor:
        """The logits of ``inputs``, int64 [B, L], in eval mode. A collective of the ranks that hold the model.

        Args:
            example_index: int64 [B, L], read if documents are masked; without it, each row is one example.
        """
        model: Any = self.model
        masks = self._positions(inputs)
        if self.document_mask:
            example_index = torch.zeros_like(inputs) if example_index is None else example_index
            masks |= document_kwargs(model, example_index, tp_mesh=self.tp_mesh)
        elif getattr(model.model_args, "attn_type", "sdpa") in ("flex", "varlen"):
            masks["attention_masks"] = model.get_attention_masks(
                input_batch=inputs, tokenizer=self.tokenizer, extra_inputs={}
            )
        with self.precision():
            return model(inputs, **masks)

    def _positions(self, inputs: Tensor) -> dict[str, Any]:
        """With context parallelism, the positions of this rank's tokens in the whole sequences, as torchtitan's own
        prepare_context_parallel_input; without, none are needed."""
        if self.cp_mesh is None:
            return {}
        seq_len = inputs.shape[1] * self.cp_mesh.size()
        whole = torch.arange(seq_len, dtype=torch.int32, device=inputs.device).expand(len(inputs), seq_len)
        (positions,), _ = cp_shard(self.cp_mesh, (whole,), None, self.load_balancer)
        return {"positions": positions}

    def load(self, checkpoint: str) -> None:
        """Replace the weights, in place, by those of ``checkpoint``. Each rank reads its own shards.

        ValueError if they cannot be read, or hold NaN or infinity, on the ranks that find it.
        """
        weights = get_model_state_dict(self.model)
        with warnings.catch_warnings():
            # Under a pipeline the other stages do not take part.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load(weights, checkpoint_id=checkpoint, no_dist=True)
            except (Exception, CheckpointException) as error:  # the files may be damaged in any way
                reason = str(error).strip().rpartition("\n")[2]
                raise ValueError(
                    f"the frozen model of {checkpoint} cannot be loaded ({type(error).__name__}: {reason}): the "
                    "checkpoint is missing or damaged. Restore it"
                ) from error
        set_model_state_dict(self.model, weights)
        device = next(self.model.parameters()).device
        if not all_finite(self.model.parameters(), device=device):
            raise ValueError(
                f"the frozen model of {checkpoint} has weights that are NaN or infinity: its training failed before "
                "that step. Take an earlier checkpoint"
            )


def check_frozen(
    job_config: JobConfig, checkpoint: str, *, family: str = "", flavor: str = "", num_ids: int = 0
) -> tuple[JobConfig, TrainSpec]:
    """Refuse, before anything is built, a checkpoint that does not hold the expected model; ValueError.

    Args:
        checkpoint: a step folder written by torchtitan.
        family, flavor: the model's family and flavor; the learner's by default.
        num_ids: token ids of the learner, where a model with another number is to be refused, too; else 0.

    Returns:
        The run's configuration with that model in it, and the model's TrainSpec.
    """
    family, flavor = family or family_of(job_config).name, flavor or job_config.model.flavor
    try:
        config, spec = _configured(job_config, family, flavor)
        # Not the pipeline: its last stage holds the whole model.
        dimensions = ("tensor_parallel", "context_parallel", "expert_parallel")
        check_family(family_of(config), {name: getattr(config.parallelism, f"{name}_degree") for name in dimensions})
        fix = "Name the family and flavor that it was trained with"
        shapes, metadata = model_shapes(config, spec), read_metadata(Path(checkpoint))
        check_shapes(shapes, metadata, checkpoint, fix=fix)
        check_files(checkpoint, metadata, names=shapes)
        check_split(config, spec.model_args[config.model.flavor])
        check_document_mask(config, spec)
        if num_ids:
            _check_ids(job_config, cast(Any, spec.model_args[config.model.flavor]).vocab_size, expected=num_ids)
    except ValueError as error:
        raise ValueError(f"the frozen model of {checkpoint} (family {family}, flavor {flavor}): {error}") from None
    if job_config.parallelism.context_parallel_degree > 1 and _uses_attention_masks(config, spec):
        raise ValueError(
            f"[parallelism] context_parallel_degree = {job_config.parallelism.context_parallel_degree} with a frozen "
            f"{family} model, whose attention masks need whole sequences. Set it to 1"
        )
    return config, spec


def build_frozen(
    job_config: JobConfig,
    checkpoint: str,
    *,
    family: str,
    flavor: str,
    dims: ParallelDims,
    device: torch.device,
    tokenizer: Any,
    precision: Callable[[], AbstractContextManager[Any]],
) -> FrozenModel:
    """Build the model, to :meth:`~FrozenModel.load` ``checkpoint``; ValueError as :func:`check_frozen`. A collective.

    The random state is left unchanged, so a run draws the same random numbers with and without a frozen model.
    """
    config, spec = check_frozen(job_config, checkpoint, family=family, flavor=flavor)
    warn_of_pickles(checkpoint, what="the frozen model of")
    args = copy.deepcopy(spec.model_args[config.model.flavor])
    args.update_from_config(config)
    with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = cast(nn.Module, spec.model_cls(args))
    model.requires_grad_(False)
    is_ddp = dims.dp_replicate_enabled and not dims.fsdp_enabled
    if not is_ddp and dims.world_size > 1:
        model = spec.parallelize_fn(model, dims, config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.to_empty(device=device)
        with torch.no_grad():
            cast(Any, model).init_weights(buffer_device=None)  # checkpoints do not contain its buffers
    return FrozenModel(
        model.eval(),
        tokenizer=tokenizer,
        precision=precision,
        document_mask=job_config.data.document_mask,
        tp_mesh=dims.get_optional_mesh("tp"),
        cp_mesh=dims.get_optional_mesh("cp"),
        load_balancer=job_config.parallelism.context_parallel_load_balancer,
    )


def _configured(job_config: JobConfig, family: str, flavor: str) -> tuple[JobConfig, TrainSpec]:
    """The run's configuration with another model in it, and that model's TrainSpec."""
    config = copy.deepcopy(job_config)
    config.model.name, config.model.flavor = family + SUFFIX, flavor
    config.activation_checkpoint.mode = "none"
    spec = attent_spec(config.model.name, data=config.data.path)
    check_flavor(spec, model=config.model.name, flavor=flavor, key="its flavor")
    return config, spec


def _check_ids(job_config: JobConfig, num_ids: int, *, expected: int) -> None:
    if num_ids != expected:
        raise ValueError(
            f"it has {num_ids:,} token ids, and the run's model, {job_config.model.name} {job_config.model.flavor}, "
            f"has {expected:,}: their distributions cannot be compared, and nothing is padded. Take two flavors with "
            "the same vocabulary, such as those that follow the data"
        )


def _uses_attention_masks(config: JobConfig, spec: TrainSpec) -> bool:
    return getattr(spec.model_args[config.model.flavor], "attn_type", "sdpa") in ("flex", "varlen")
