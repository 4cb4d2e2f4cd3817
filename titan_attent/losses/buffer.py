"""The loss buffer: the statistics of every example, sharded by example id over the ``batch`` mesh.

The hot path is ``record``: it keeps the ids and losses of the step on the device, without a collective or a host sync.
At every multiple of ``flush_every`` steps, one packed, asynchronous all-gather exchanges (id, step, loss) of all ranks.
The buffer waits for it before the next exchange; then every rank writes the records of its own shard. Tensor, pipeline
and context parallel peers hold equal copies of a shard. Before the exchange, the records of one rank are broadcast
along each such mesh dimension. So all ranks receive the losses of the last pipeline stage, and no rounding can make
their decisions differ.

Cost: the state takes 20 bytes per example, divided over the ranks. Every rank receives 16 bytes per trained example.
Functional gradients add 4 bytes of state and 8 received bytes; shares add 24 (36 with gradients) and 8. The write sorts
the gathered records twice (not the data set).

Several records of one example are applied in (exchange, step, global row) order, so the result does not depend on the
number of ranks. Where examples are trained as shares of mixtures (``with_shares``), all records of an example in a
window of ``flush_every`` steps count by their shares (mixtures.py). Then only a share of at least one half counts as a
visit. A non-finite loss is dropped and counted in ``num_nonfinite``; its visit counts.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_attent.foundations.agreement import Agreement, Decision
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.mixtures import MIN_SHARE, Mixtures
from titan_attent.losses.records import NEVER, Records, bits_of, floats_of
from titan_attent.losses.window import FLUSH_EVERY, LossWindow


def _shard_of(name: str) -> property:
    return property(lambda buffer: buffer._state[name][:-1])


class LossBuffer:
    """Last and first loss with their steps, and the visit count, of every example.

    Args:
        num_examples: N.
        mesh: the one-dimensional mesh over which the examples are sharded; None for one process.
        device: the device of the shard, which is the training device; by default the mesh's, or the CPU without a mesh.
        flush_every: steps between two exchanges.
        with_gradient: also keep the norm of the functional gradient.
        with_shares: every record holds the share of the example in the trained mixture.
        window: receives every training loss when it is exchanged, for weights computed from the loss.
        replica_sources: (mesh, rank) of each further one-dimensional mesh whose ranks record the same examples. The
            records of that local rank count; under a pipeline, the rank of the last stage.

    Attributes:
        agreement: checks that all ranks follow the same decision; every exchange carries a hash of it.
        loss, first_loss: fp32 [num_local], mean nats per token; undefined where the step is ``NEVER``.
        step, first_step: int32 [num_local], training step of that loss, or ``NEVER``.
        visits: int32 [num_local], how often the example was trained, also with a non-finite loss.
        gradient: fp32 [num_local], the norm recorded with ``loss``; only with ``with_gradient``.

    The attributes are current after :meth:`sync`.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        flush_every: int = FLUSH_EVERY,
        with_gradient: bool = False,
        with_shares: bool = False,
        window: LossWindow | None = None,
        replica_sources: Sequence[tuple[DeviceMesh, int]] = (),
    ):
        if flush_every < 1:
            raise ValueError(f"flush_every must be at least 1 step, not {flush_every}")
        assert window is None or window.flush_every == flush_every
        self.sharding = ExampleSharding(num_examples, mesh=mesh)
        self.device = torch.device(device or ("cpu" if mesh is None else mesh.device_type))
        self.flush_every = flush_every
        self.replica_sources = tuple(replica_sources)
        # One slot more than the shard: it takes the writes of other ranks' ids, so no shape depends on the data.
        slots = self.sharding.num_local + 1
        self._state = {
            "loss": torch.zeros(slots, dtype=torch.float32, device=self.device),
            "step": torch.full((slots,), NEVER, dtype=torch.int32, device=self.device),
            "first_loss": torch.zeros(slots, dtype=torch.float32, device=self.device),
            "first_step": torch.full((slots,), NEVER, dtype=torch.int32, device=self.device),
            "visits": torch.zeros(slots, dtype=torch.int32, device=self.device),
        }
        if with_gradient:
            self._state["gradient"] = torch.zeros(slots, dtype=torch.float32, device=self.device)
        self._num_nonfinite = torch.zeros((), dtype=torch.int64, device=self.device)
        self.window, self.with_shares = window, with_shares
        self.mixtures: Mixtures | None = None
        if with_shares:
            names = ("loss", "gradient")[: 1 + with_gradient]
            self.mixtures = Mixtures(names, slots=slots, steps=flush_every, device=self.device)
            self._state |= self.mixtures.state
        self._pending: list[Tensor] = []
        self._pending_step, self._pending_trained = 0, True  # an exchange holds training losses or scores, not both
        self._in_flight: tuple[Tensor, dist.Work | None, tuple[int, bool], Decision | None] | None = None
        self.agreement = Agreement(self.device)

    def records(self) -> Records:
        """The statistics of this rank's examples, sharing memory with the buffer; current after :meth:`sync`."""
        gradient = self.gradient if "gradient" in self._state else None
        return Records(
            self.sharding, self.loss, self.step, self.first_loss, self.first_step, self.visits, gradient=gradient
        )

    loss, first_loss, gradient = map(_shard_of, ("loss", "first_loss", "gradient"))
    step, first_step, visits = map(_shard_of, ("step", "first_step", "visits"))

    @property
    def num_nonfinite(self) -> int:
        """Non-finite losses dropped so far on all ranks. A host sync: not for the hot path."""
        return int(self._num_nonfinite)

    def record(
        self,
        example_ids: Tensor,
        losses: Tensor,
        *,
        step: int,
        gradients: Tensor | None = None,
        shares: Tensor | None = None,
        trained: bool = True,
    ) -> None:
        """Keep the losses of one batch until the next flush.

        Args:
            example_ids: int64 [B], each in [0, N); rows with larger ids are ignored. Between two flushes every rank
                must record the same number of rows.
            losses: [B], mean nats per token; detached and kept as fp32.
            step: the training step, 0 to 2^31 - 1.
            gradients: [B] norms of the functional gradient; required with ``with_gradient``.
            shares: [B], in [0, 1]; required with ``with_shares``. Not used for scores, which are of whole examples.
            trained: True counts as a visit; False is a score from a forward pass. If it differs from that of the
                pending records, those are exchanged first, which is a collective. With shares, the same happens if
                ``step`` is in another window.
        """
        if example_ids.shape != losses.shape or example_ids.ndim != 1:
            raise ValueError(
                f"example_ids {tuple(example_ids.shape)} and losses {tuple(losses.shape)} must have one shape [B]: "
                "record one loss for each example of the batch"
            )
        ids = example_ids.to(self.device, torch.int64)
        # int64 rows: id, step | loss bits[, gradient bits][, share bits]. Floats keep their exact fp32 bits.
        rows = [ids, bits_of(losses, self.device) | (step << 32)]
        required = {"gradients": "gradient" in self._state, "shares": self.with_shares}
        for (name, is_required), values in zip(required.items(), (gradients, shares), strict=True):
            if is_required and values is None:
                raise ValueError(f"this buffer keeps {name}: record them with {name}=")
            rows += [bits_of(values, self.device)] if is_required and values is not None else []
        is_new_window = self.mixtures is not None and not self.mixtures.same_window(self._pending_step, step)
        if self._pending and (self._pending_trained != trained or is_new_window):
            self.flush()
        self._pending.append(torch.stack(rows))
        self._pending_step, self._pending_trained = step, trained

    def step_done(self) -> None:
        """Flush at multiples of ``flush_every`` steps; call it once after every training step, on all ranks."""
        if self._pending and self._pending_step % self.flush_every == 0:
            self.flush()

    def flush(self) -> None:
        """Start the exchange of all pending records, without waiting for it. A collective."""
        if not self._pending:
            return
        self._apply_in_flight()
        packed = torch.cat(self._pending + self.agreement.columns(len(self._pending[0])), dim=1)
        self._pending.clear()
        for mesh, rank in self.replica_sources:
            dist.broadcast(packed, group=mesh.get_group(), group_src=rank)
        kind = self._pending_step, self._pending_trained
        self._in_flight = *self.sharding.gather(packed, async_op=True), kind, self.agreement.decision

    def sync(self) -> None:
        """Flush and wait; afterwards the shard holds every loss recorded so far. A collective."""
        self.flush()
        self._apply_in_flight()

    def _apply_in_flight(self) -> None:
        if self._in_flight is None:
            return
        gathered, work, (step, trained), decision = self._in_flight
        self._in_flight = None
        if work is not None:
            work.wait()
        rows = self.agreement.compare(gathered, decision).transpose(0, 1).flatten(1)
        rows = rows[:, torch.argsort(rows[1] >> 32, stable=True)]  # (rank, time) -> (step, rank, row)
        if trained and self.window is not None:
            is_example = rows[0] < self.sharding.num_examples  # else a slot of a packed row without an example
            self.window.write(torch.where(is_example, floats_of(rows[1]), float("nan")), step=step)
        self._write(rows, step=step, trained=trained)

    def _write(self, rows: Tensor, *, step: int, trained: bool) -> None:
        """Apply gathered records, int64 [2 to 4, n], in order of steps; no shape depends on their values."""
        state, trash = self._state, self.sharding.num_local
        ids = rows[0]
        slot = self.sharding.local_index(ids, elsewhere=trash)
        finite = torch.isfinite(floats_of(rows[1:])).all(dim=0)
        self._num_nonfinite += (~finite & (ids < self.sharding.num_examples)).sum()
        if trained:
            visited = torch.ones_like(finite)
            if self.with_shares:
                visited, finite = floats_of(rows[-1]) >= MIN_SHARE, finite & (floats_of(rows[-1]) > 0)
            state["visits"].index_add_(0, slot, visited.int())
        slot, order = torch.sort(torch.where(finite, slot, trash), stable=True)
        rows = rows[:, order]
        steps, losses = (rows[1] >> 32).to(torch.int32), floats_of(rows[1])
        # Equal slots are adjacent now. Only the first and the last record of each slot write, so no two writes of one
        # index_copy share a slot, except the trash slot.
        starts = torch.ones_like(finite)
        starts[1:] = slot[1:] != slot[:-1]
        ends = torch.ones_like(finite)
        ends[:-1] = slot[1:] != slot[:-1]
        unseen = state["first_step"][slot] == NEVER
        first = torch.where(starts & unseen, slot, trash)
        last = torch.where(ends, slot, trash)
        new = {"loss": losses} | ({"gradient": floats_of(rows[2])} if "gradient" in state else {})
        if self.mixtures is not None:
            shares = floats_of(rows[-1]) if trained else None
            new, first, last = self.mixtures.update(slot, new, shares, first=first, last=last, step=step)
        state["first_loss"].index_copy_(0, first, new["loss"])
        state["first_step"].index_copy_(0, first, steps)
        for name, values in new.items():
            state[name].index_copy_(0, last, values)
        state["step"].index_copy_(0, last, steps)

    def state_dict(self) -> dict[str, Tensor]:
        """The shards as ``Shard(0)`` DTensors over N (plain tensors without a mesh), sharing memory with the buffer.

        A collective: pending records are exchanged first. It waits for the device: torchtitan's async_with_pinned_mem
        copies the shards on another stream, which does not wait for writes that are queued on this stream.
        """
        self.sync()
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()
        state = {name: self.sharding.as_global(tensor[:-1]) for name, tensor in self._state.items()}
        return state | {"num_nonfinite": self._num_nonfinite}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a state of the same N; if the number of ranks differs, DCP has resharded it. A collective."""
        for name, tensor in self.state_dict().items():
            source = state[name]
            if source.shape != tensor.shape:
                raise ValueError(
                    f"the checkpoint's loss buffer holds {tuple(source.shape)} for {name!r}, this data set needs "
                    f"{tuple(tensor.shape)}: resume with the data and seq_len that the checkpoint was written with"
                )
            tensor.copy_(source)
