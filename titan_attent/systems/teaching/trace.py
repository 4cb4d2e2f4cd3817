"""The trace: the examples that every step trained, for audits and for checks of resumption.

Cost: a line per step on the first rank, with the ids of a global batch.
"""

from titan_attent.foundations.json_lines import JsonLines
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.systems.system import DataFacts, Planned, System
from titan_attent.systems.teaching.config import TeacherConfig


class Trace(System):
    """``[teacher] trace``: writes teacher/trace.jsonl, also if the teacher does not decide the examples."""

    name = "teacher"

    @classmethod
    def is_on(cls, config: TeacherConfig) -> bool:
        return config.trace

    @classmethod
    def plan(cls, config: TeacherConfig, facts: DataFacts, *, num_ranks: int) -> Planned:
        return Planned(files=("teacher/trace.jsonl",))

    log: JsonLines | None = None

    def before_first_step(self) -> None:
        if is_first_rank():
            path = self.run.settings.dump_folder / "teacher" / "trace.jsonl"
            self.log = JsonLines(path, step=self.run.step())

    def after_step(self) -> None:
        if self.log is not None:
            current, batch = self.run.served()
            ids = current.ids(batch, batch + 1).flatten()
            ids = ids[ids < current.pool.num_examples].tolist()  # a packed window may hold fewer than it could
            self.log.write({"step": self.run.step(), "round": current.round, "strategy": current.strategy, "ids": ids})

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
