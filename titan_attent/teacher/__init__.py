"""The teacher: buffer -> importance -> selection (ids, weights) -> passes, with a ledger of what it cost.

importance.py   buffer -> scores                        pure
schedule.py     progress -> ratio, interval             pure
strategies.py   scores -> chosen examples, weights      one function a strategy
selection.py    scores of all ranks -> exact top-k      collectives, no gather of N
weights.py      inclusion probabilities -> weights      pure
teacher.py      rounds and passes, state
ledger.py       what teaching cost, what it chose
trace.py        JSON lines: every decision; on request the ids of every step
"""
