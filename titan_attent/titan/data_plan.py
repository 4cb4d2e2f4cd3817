"""The plan of a run's data: how examples share rows, the mixture of sources, and the order where no system selects."""

from collections.abc import Mapping
from typing import Any

from torchtitan.train import Trainer

from titan_attent.data.plan.mixture import Mixture
from titan_attent.data.plan.packed import Packer
from titan_attent.data.plan.sampler import TeachingSampler
from titan_attent.data.plan.shuffled import Shuffled
from titan_attent.titan.loader import TeachingLoader, build_packer
from titan_attent.titan.mixtures import build_mixture, is_mixed, proportions_within


class DataPlan:
    """The plan of a trainer's data; its loader, meshes and ledger must exist. Making it is a collective.

    Attributes:
        packer: packs several examples into each row; None where a row is one example.
        mixture: which source's examples a batch has; None without ``[data.sources]``.
        proportions: source -> its mean share of the run, where a teacher selects within each source; else None.
    """

    packer: Packer | None
    mixture: Mixture | None
    proportions: Mapping[str, float] | None

    def __init__(self, trainer: Trainer, *, batch_size: int):
        self.trainer: Any = trainer
        self.loader: TeachingLoader = self.trainer.dataloader
        job_config: Any = trainer.job_config
        self.seed: int = job_config.data.seed
        self.group_size: int = job_config.data.group_size
        mesh, device = trainer.parallel_dims.get_optional_mesh("batch"), trainer.device
        self.packer = build_packer(
            self.loader,
            mesh=mesh,
            device=device,
            batch_size=batch_size,
            max_examples=job_config.data.max_examples_per_window,
            packing=job_config.data.packing,
            mixed=is_mixed(job_config),
            one_per_row=job_config.data.group_size > 1,
        )
        self.mixture = build_mixture(
            self.loader, self.packer, job_config, mesh=mesh, device=device, batch_size=batch_size
        )
        self.proportions = proportions_within(job_config, self.loader.dataset)

    def sampler_of_all(self) -> TeachingSampler:
        """A sampler of all examples, used if no system selects them."""
        loader = self.loader
        plan = Shuffled(
            len(loader.dataset),
            batch_size=self.trainer.batch_size,
            seed=self.seed,
            ledger=self.trainer.ledger,
            group_size=self.group_size,
            packer=self.packer if self.mixture is None else None,  # a mixture packs each source itself
        )
        place = {"rank": loader.dp_rank, "num_ranks": loader.dp_world_size, "microbatches": loader.microbatches}
        return TeachingSampler(plan, **place, mixture=self.mixture)

    def metrics(self) -> dict[str, float]:
        """The scalars of the mixture."""
        return {} if self.mixture is None else self.mixture.metrics()
