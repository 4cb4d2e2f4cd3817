"""The loss buffer: what is known of every example, sharded by example id over the ``batch`` mesh.

The hot path is ``record``: it keeps the step's ids and losses on the device, without a collective or a host sync.
At every multiple of ``flush_every`` steps one packed, asynchronous all-gather carries (id, step, loss) of all ranks; it
is waited for before the next one, and then every rank writes what belongs to its shard. Tensor, pipeline and context
parallel peers hold equal copies of a shard: before the exchange, along each such mesh dimension, the records of
one rank replace those of the others. This brings the losses of the last pipeline stage to all ranks, and no rounding
can make their decisions differ.

Cost: 20 bytes per example / ranks of state; 16 bytes per trained example on the wire, gathered by every rank; 4 and 8
more with functional gradients, 24 (or 36) and 8 more with shares. The write is two stable sorts of the gathered records
(not of the data set).

Several records of one example take effect in (time of the exchange, step, global row) order, so the result does not
depend on the number of ranks. Where examples are trained as shares of mixtures (``with_shares``), all records of one
in a window of ``flush_every`` steps count, by their shares (mixtures.py), and a visit takes a share of one half. A
non-finite loss never enters: its visit counts, its value is dropped and counted in ``num_nonfinite``.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_attent.foundations.agreement import Agreement, Decision
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.mixtures import HALF, Mixtures
from titan_attent.losses.records import NEVER, Records, bits_of, floats_of
from titan_attent.losses.window import FLUSH_EVERY, LossWindow


def _shard_of(name: str) -> property:
    return property(lambda buffer: buffer._state[name][:-1])


class LossBuffer:
    """Last and first loss with their steps, and the visit count, of every example.

    Args:
        num_examples: N.
        mesh: the one-dimensional mesh that shares the examples; None for one process.
        device: where the shard lives: the training device; by default the mesh's, or the CPU without a mesh.
        flush_every: steps between two exchanges.
        with_gradient: also keep the norm of the functional gradient.
        with_shares: records come with the share that the example has in what was trained.
        window: given every loss of training as it is exchanged, for weights that follow the loss.
        copies: (mesh, rank) of each further mesh dimension along which ranks record the same examples, one-dimensional,
            and the local rank on it whose records count: in a pipeline, the rank with the last stage.

    Attributes:
        agreement: whether all ranks follow the same decision; its hash rides on every exchange.
        loss, first_loss: fp32 [num_local], mean nats per token; meaningless where the step is ``NEVER``.
        step, first_step: int32 [num_local], training step of that loss, or ``NEVER``.
        visits: int32 [num_local], times trained, non-finite losses included.
        gradient: fp32 [num_local], the norm seen with ``loss``; only with ``with_gradient``.

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
        copies: Sequence[tuple[DeviceMesh, int]] = (),
    ):
        if flush_every < 1:
            raise ValueError(f"flush_every must be at least 1 step, not {flush_every}")
        assert window is None or window.flush_every == flush_every
        self.sharding = ExampleSharding(num_examples, mesh=mesh)
        self.device = torch.device(device or ("cpu" if mesh is None else mesh.device_type))
        self.flush_every = flush_every
        self.copies = tuple(copies)
        # One slot more than the shard: writes for other ranks' ids land there, so that no shape depends on the data.
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
        self._pending_kind = (0, True)  # last step, and whether trained: one exchange holds one kind
        self._in_flight: tuple[Tensor, dist.Work | None, tuple[int, bool], Decision | None] | None = None
        self.agreement = Agreement(self.device)

    def records(self) -> Records:
        """All of the attributes, sharing memory with the buffer; current after :meth:`sync`."""
        gradient = self.gradient if "gradient" in self._state else None
        return Records(
            self.sharding, self.loss, self.step, self.first_loss, self.first_step, self.visits, gradient=gradient
        )

    loss, first_loss, gradient = map(_shard_of, ("loss", "first_loss", "gradient"))
    step, first_step, visits = map(_shard_of, ("step", "first_step", "visits"))

    @property
    def num_nonfinite(self) -> int:
        """Non-finite losses dropped so far, of all ranks (a host sync: not for the hot path)."""
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
            example_ids: int64 [B], each in [0, N), or above for a row to leave out. Every rank records equally many
                in the steps between two flushes.
            losses: [B], mean nats per token; detached and kept as fp32.
            step: the training step, 0 to 2^31 - 1.
            gradients: [B] norms of the functional gradient; needed with ``with_gradient``.
            shares: [B], in [0, 1]; needed with ``with_shares``. Not read of a score, which is of a whole example.
            trained: whether this counts as a visit; False for a score from a forward pass. A collective where it
                differs from the record before, or with shares the window: what is pending is exchanged first.
        """
        if example_ids.shape != losses.shape or example_ids.ndim != 1:
            raise ValueError(
                f"example_ids {tuple(example_ids.shape)} and losses {tuple(losses.shape)} must be equal [B]: "
                "record one loss for each example of the batch"
            )
        ids = example_ids.to(self.device, torch.int64)
        # int64 rows: id, step | loss bits[, gradient bits][, share bits]. Floats keep their exact fp32 bits.
        rows = [ids, bits_of(losses, self.device) | (step << 32)]
        wanted = {"gradients": "gradient" in self._state, "shares": self.with_shares}
        for (name, is_wanted), values in zip(wanted.items(), (gradients, shares), strict=True):
            if is_wanted and values is None:
                raise ValueError(f"this buffer keeps {name}: record them with {name}=")
            rows += [bits_of(values, self.device)] if is_wanted and values is not None else []
        before, kind = self._pending_kind
        if self._pending and (kind != trained or (self.mixtures is not None and self.mixtures.parts(before, step))):
            self.flush()
        self._pending.append(torch.stack(rows))
        self._pending_kind = step, trained

    def step_done(self) -> None:
        """Call once after every training step, on all ranks: flushes when it is time."""
        if self._pending and self._pending_kind[0] % self.flush_every == 0:
            self.flush()

    def flush(self) -> None:
        """Start the exchange of everything recorded; a collective, on all ranks or none. Does not wait."""
        if not self._pending:
            return
        self._apply_in_flight()
        packed = torch.cat(self._pending + self.agreement.columns(len(self._pending[0])), dim=1)
        self._pending.clear()
        for mesh, rank in self.copies:
            dist.broadcast(packed, group=mesh.get_group(), group_src=rank)
        self._in_flight = *self.sharding.gather(packed, async_op=True), self._pending_kind, self.agreement.decision

    def sync(self) -> None:
        """Flush and wait: afterwards the shard holds every loss recorded so far. A collective."""
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
            self.window.write(floats_of(rows[1]), step=step)
        self._write(rows, step=step, trained=trained)

    def _write(self, rows: Tensor, *, step: int, trained: bool) -> None:
        """Apply gathered records, int64 [2 to 4, n], in the order of their steps; no shape depends on their values."""
        state, trash = self._state, self.sharding.num_local
        ids = rows[0]
        slot = self.sharding.local_index(ids, elsewhere=trash)
        finite = torch.isfinite(floats_of(rows[1:])).all(dim=0)
        self._num_nonfinite += (~finite & (ids < self.sharding.num_examples)).sum()
        if trained:
            visited = torch.ones_like(finite)
            if self.with_shares:
                visited, finite = floats_of(rows[-1]) >= HALF, finite & (floats_of(rows[-1]) > 0)
            state["visits"].index_add_(0, slot, visited.int())
        slot, order = torch.sort(torch.where(finite, slot, trash), stable=True)
        rows = rows[:, order]
        steps, losses = (rows[1] >> 32).to(torch.int32), floats_of(rows[1])
        # Equal slots are neighbours now: the first and the last of each run are the only writers, so no two writes
        # of one index_copy meet except in the trash slot.
        starts = torch.ones_like(finite)
        starts[1:] = slot[1:] != slot[:-1]
        ends = torch.ones_like(finite)
        ends[:-1] = slot[1:] != slot[:-1]
        unseen = state["first_step"][slot] == NEVER
        first = torch.where(starts & unseen, slot, trash)
        last = torch.where(ends, slot, trash)
        seen = {"loss": losses} | ({"gradient": floats_of(rows[2])} if "gradient" in state else {})
        if self.mixtures is not None:
            shares = floats_of(rows[-1]) if trained else None
            seen, first, last = self.mixtures.take(slot, seen, shares, first=first, last=last, step=step)
        state["first_loss"].index_copy_(0, first, seen["loss"])
        state["first_step"].index_copy_(0, first, steps)
        for name, values in seen.items():
            state[name].index_copy_(0, last, values)
        state["step"].index_copy_(0, last, steps)

    def state_dict(self) -> dict[str, Tensor]:
        """The shards as ``Shard(0)`` DTensors over N (plain tensors without a mesh), sharing memory with the buffer.

        A collective: what is pending is exchanged first. Waits for the device: a stager may copy the shards on another
        stream (torchtitan's async_with_pinned_mem), which knows nothing of writes that are still queued on this one.
        """
        self.sync()
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()
        state = {name: self.sharding.as_global(tensor[:-1]) for name, tensor in self._state.items()}
        return state | {"num_nonfinite": self._num_nonfinite}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state of the same N; DCP has resharded it when the number of ranks differs."""
        for name, tensor in self.state_dict().items():
            source = state[name]
            if source.shape != tensor.shape:
                raise ValueError(
                    f"the checkpoint's loss buffer holds {tuple(source.shape)} for {name!r}, this data set needs "
                    f"{tuple(tensor.shape)}: resume with the data and seq_len that the checkpoint was written with"
                )
            tensor.copy_(source)
