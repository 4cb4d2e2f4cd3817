"""Image models under torchtitan (``vit_attent``, ``mae_attent``), and their modality.

The models (vision/) name their modules as torchtitan's llama3 does. FSDP2, HSDP, DDP, activation checkpointing and
torch.compile are therefore applied by torchtitan's own functions for llama3.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.components.loss import LossFunction, build_cross_entropy_loss
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra import parallelize as llama
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from titan_attent.data.examples import Examples
from titan_attent.data.images import ImageDataset
from titan_attent.losses.cross_entropy import WeightedLoss, build_weighted_loss
from titan_attent.losses.mixed import build_mixed_loss, mixed_cross_entropy_sum
from titan_attent.losses.patches import build_patch_loss, squared_error_sum
from titan_attent.models.vision.examples import ClassExamples, PatchExamples
from titan_attent.models.vision.flavors import DECODERS, PAPERS_DECODER, SIZES
from titan_attent.models.vision.mae import MAEArgs, MaskedAutoencoder
from titan_attent.models.vision.vit import VisionTransformer, ViTArgs
from titan_attent.scores.stored import CROSS_ENTROPY
from titan_attent.systems.settings import SUFFIX
from titan_attent.systems.system import System
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.models.initial_weights import NewHead

CLASSIFIER, AUTOENCODER = "vit", "mae"
TOP = 5
"""The k of the second metric, top-k accuracy."""


# -- models ---------------------------------------------------------------------------------------------------------


class _FromConfig(BaseModelArgs):
    """torchtitan's interface to a model's sizes, some of which depend on the run and its data."""

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Set the sizes from ``[vision]`` and the shape of the data; ValueError if the two do not fit each other."""
        args: Any = self
        images, vision = ImageDataset(job_config.data.path, size=job_config.vision.image_size), job_config.vision
        args.image_size, args.channels = images.size, images.channels
        args.num_classes = len(images.classes)
        args.patch_size = vision.patch_size or args.patch_size
        args.drop_path = vision.drop_path
        if hasattr(args, "mask_ratio"):
            args.mask_ratio = vision.mask_ratio
        args.check()

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """(number of parameters, training FLOPs per patch); a patch counts as a token."""
        args: Any = self
        return sum(p.numel() for p in model.parameters()), args.flops_per_image() // args.num_patches


@dataclass
class ViTModelArgs(ViTArgs, _FromConfig):
    """The sizes of ``vit_attent``."""


@dataclass
class MAEModelArgs(MAEArgs, _FromConfig):
    """The sizes of ``mae_attent``."""


FLAVORS: dict[str, dict[str, BaseModelArgs]] = {
    CLASSIFIER: {name: ViTModelArgs(**sizes) for name, sizes in SIZES.items()},
    AUTOENCODER: {name: MAEModelArgs(**sizes, **DECODERS.get(name, PAPERS_DECODER)) for name, sizes in SIZES.items()},
}
MODELS: dict[str, type[nn.Module]] = {CLASSIFIER: VisionTransformer, AUTOENCODER: MaskedAutoencoder}


def flavors(model: str) -> dict[str, BaseModelArgs]:
    """Copies of a model's flavors, because torchtitan writes the run's settings into the selected one."""
    return copy.deepcopy(FLAVORS[model])


def args_of(job_config: JobConfig) -> Any:
    """The sizes of a run's model; ValueError if the data and ``[vision]`` do not fit the flavor."""
    args = flavors(job_config.model.name.removesuffix(SUFFIX))[job_config.model.flavor]
    args.update_from_config(job_config)
    return args


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """torchtitan's ``parallelize_fn`` for llama3, whose module names the trunk has; shards decoder blocks first."""
    decoder: Any = getattr(model, "decoder_layers", None)
    if decoder is not None and parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        training = job_config.training
        policy = MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        )
        for block in decoder.values():
            fully_shard(block, mesh=parallel_dims.get_mesh(names), mp_policy=policy)
    # Selective checkpointing saves the results of matrix products; those with a bias are a separate op.
    llama._op_sac_save_list.add(torch.ops.aten.addmm.default)
    return llama.parallelize_llama(model, parallel_dims, job_config)


def build_loss(job_config: JobConfig, **kwargs: Any) -> LossFunction:
    """torchtitan's ``build_loss_fn``: the stock loss, extended to mixed images, label smoothing and padded patches.

    Labels are smoothed in training only. For logits without a gradient, as in validation, the loss is the stock loss of
    the label, so that validation losses are comparable across runs.
    """
    vision, compiled = job_config.vision, job_config.compile

    def build(loss: LossFunction) -> LossFunction:
        is_compiled = compiled.enable and "loss" in compiled.components
        return torch.compile(loss, backend=compiled.backend) if is_compiled else loss

    if job_config.model.name != CLASSIFIER + SUFFIX:
        return build(squared_error_sum)
    plain = build_cross_entropy_loss(job_config, **kwargs)
    if not (vision.mixes or vision.label_smoothing):
        return plain
    training_loss = build(partial(mixed_cross_entropy_sum, label_smoothing=vision.label_smoothing))

    def loss(pred: Tensor, labels: Tensor, *mixing: Tensor) -> Tensor:
        return training_loss(pred, labels, *mixing) if pred.requires_grad or mixing else plain(pred, labels)

    return loss


def train_spec(model: str) -> TrainSpec:
    """torchtitan's llama3 TrainSpec with an image model and its loss."""
    return replace(
        get_train_spec("llama3"),
        model_cls=MODELS[model],
        model_args=flavors(model),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
        state_dict_adapter=None,
    )


# -- modalities ----------------------------------------------------------------------------------------------------


class Images:
    """The modality of ``vit_attent``: images (titan_attent.data.images) and their classes."""

    learner = "classifier"
    metrics: tuple[str, ...] = ("accuracy", f"accuracy_top{TOP}")
    is_of_images = True
    writer = "python -m titan_attent.data.images"
    systems: tuple[type[System], ...] = (NewHead,)

    def check(self, job_config: JobConfig) -> None:
        """Refuse values of ``[vision]``, and settings that image models do not support; ValueError."""
        name = job_config.model.name
        job_config.vision.validate()
        checkpoint = job_config.checkpoint
        has_weights = checkpoint.enable and checkpoint.initial_load_path and checkpoint.initial_load_model_only
        if job_config.vision.new_head and not has_weights:
            raise ValueError(
                "[vision] new_head = true needs a checkpoint for the trunk: set checkpoint.enable and "
                "checkpoint.initial_load_model_only = true, and checkpoint.initial_load_path to a step folder written "
                "by torchtitan; or set new_head = false"
            )
        if job_config.vision.mixes and job_config.teacher.weighting == "loss":
            raise ValueError(
                '[teacher] weighting = "loss" with [vision] mixup or cutmix: a mixed image has no loss of a single '
                'image. Set weighting = "inverse_probability", or both alphas to 0'
            )
        if job_config.data.exact_match:
            raise ValueError(f"[data] exact_match = true: {name} has no answers of tokens. Set it to false")
        if (chunks := job_config.teacher.loss_chunks) > 1:
            raise ValueError(f"[teacher] loss_chunks = {chunks}: {name} has no vocabulary to split. Set it to 1")

    def _images(self, datasets: DataSets, job_config: JobConfig, *, size: int, validation: bool) -> ImageDataset:
        data, vision = job_config.data, job_config.vision
        images = datasets.images(
            data.validation_path if validation else data.path,
            size=size,
            augment=vision.augmentation,
            seed=data.seed,
        )
        if not validation:
            return images
        training_set = datasets.images(data.path, size=images.size)
        if self.metrics and images.classes != training_set.classes:
            raise ValueError(
                f"{data.validation_path} has the classes {', '.join(images.classes)}, but data.path has "
                f"{', '.join(training_set.classes)}: write it with --classes and the list of the training set"
            )
        return images.normalized_as(training_set)

    def open(self, datasets: DataSets, job_config: JobConfig, *, validation: bool = False) -> Examples:
        args, vision = args_of(job_config), job_config.vision
        images = self._images(datasets, job_config, size=args.image_size, validation=validation)
        mixing = {"mixup": vision.mixup, "cutmix": vision.cutmix}
        return ClassExamples(images, args, seed=job_config.data.seed, **mixing)

    def check_fit(self, examples: Any, model_args: Any, *, model: str, key: str) -> None:
        """Refuse nothing: the model's sizes are taken from the data."""

    def example_loss(self, job_config: JobConfig, *, validation: bool = False) -> Callable[..., WeightedLoss]:
        build: Callable[..., WeightedLoss] = build_weighted_loss
        if not validation:
            build = build_mixed_loss if job_config.vision.mixes else build_weighted_loss
            build = partial(build, label_smoothing=job_config.vision.label_smoothing)
        return lambda vocab_parallel=False, num_chunks=1, **options: build(**options)

    def loss(self, job_config: JobConfig) -> str:
        smoothing = job_config.vision.label_smoothing
        return CROSS_ENTROPY + (f", label_smoothing {smoothing}" if smoothing else "")

    def validated(self, job_config: JobConfig) -> str:
        return CROSS_ENTROPY

    def measured(self, job_config: JobConfig, examples: Examples) -> dict[str, Any]:
        return {"image size": examples.seq_len}

    def count_correct(self, pred: Tensor, labels: Tensor) -> Tensor:
        """The numbers of images whose class is the first guess, and among the first five guesses."""
        hits = pred[:, 0].topk(min(TOP, pred.shape[-1]), dim=-1).indices == labels
        return torch.stack((hits[:, 0].sum(), hits.any(dim=-1).sum())).double()


class Patches(Images):
    """The modality of ``mae_attent``: images, and the pixels of their masked patches."""

    learner = "autoencoder"
    metrics: tuple[str, ...] = ()

    def check(self, job_config: JobConfig) -> None:
        super().check(job_config)
        for key in ("mixup", "cutmix", "label_smoothing"):
            if value := getattr(job_config.vision, key):
                raise ValueError(f"[vision] {key} = {value}: mae_attent has no classes. Set it to 0")

    def open(self, datasets: DataSets, job_config: JobConfig, *, validation: bool = False) -> Examples:
        args, normalize = args_of(job_config), job_config.vision.normalize_patches
        images = self._images(datasets, job_config, size=args.image_size, validation=validation)
        return PatchExamples(images, args, seed=job_config.data.seed, normalize=normalize)

    def example_loss(self, job_config: JobConfig, *, validation: bool = False) -> Callable[..., WeightedLoss]:
        return lambda vocab_parallel=False, num_chunks=1, **options: build_patch_loss(**options)

    def loss(self, job_config: JobConfig) -> str:
        vision = job_config.vision
        side = vision.patch_size or SIZES[job_config.model.flavor]["patch_size"]
        pixels = "normalised patches" if vision.normalize_patches else "patches"
        return f"squared error of {pixels} of {side} pixels, mask_ratio {vision.mask_ratio}"

    def measured(self, job_config: JobConfig, examples: Examples) -> dict[str, Any]:
        vision = job_config.vision
        measured = super().measured(job_config, examples) | {
            "vision.mask_ratio": vision.mask_ratio,
            "vision.normalize_patches": vision.normalize_patches,
            "patches": examples.tokens_per_example,
        }
        if not vision.normalize_patches:  # pixels are in units of the std of the training images
            measured["training data"] = examples.stored.fingerprint
        return measured

    def validated(self, job_config: JobConfig) -> str:
        units = "" if job_config.vision.normalize_patches else ", in variances of the training images"
        return self.loss(job_config) + units
