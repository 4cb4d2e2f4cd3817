"""The teacher: pool -> importance -> selection (places, weights) -> passes, with a ledger of what it cost.

teacher.py      rounds and passes, state
draws.py        a pool to the selection in force
candidates.py   what the owners know, brought to the places of a pool
importance.py   records -> scores
scores.py       what is known of a pool's scores        found once a draw
guards.py       quarantine of what never improves
advice.py       what a user is told: sizes that do not fit, plans that cannot teach
schedule.py     progress -> ratio, interval             pure
strategies.py   scores -> weights                       one function a strategy
selection.py    scores of all ranks -> exact top-k      collectives, no gather of N
radix.py        the k-th largest of all ranks' keys     several at once
weights.py      inclusion probabilities -> weights      pure
audit.py        what a selection looks like
ledger.py       where the time went, what was trained and skipped
trace.py        JSON lines: decisions, quarantine; on request the ids of every step
"""
