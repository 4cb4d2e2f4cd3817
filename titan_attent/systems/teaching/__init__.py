"""The teacher: pool -> importance -> selection (places, weights) -> passes.

system.py       the teacher as a system of a run: what it checks, adds to the loss, logs and keeps
teacher.py      passes and weights for a loop of one's own; its state
rounds.py       which pass comes next
draws.py        a pool to the selection in force
candidates.py   what the owners know, brought to the places of a pool
importance.py   records -> scores                       one function an importance
statistics.py   what is known of a pool's scores        found once a draw
guards.py       quarantine of what never improves
schedule.py     progress -> ratio, interval             pure
ratios.py       the ratio where the scores decide it, and what bounds it
strategies.py   scores -> weights                       one function a strategy
selection.py    scores of all ranks -> exact top-k      collectives, no gather of N
radix.py        the k-th largest of all ranks' keys     several at once
weights.py      inclusion probabilities -> weights      pure
audit.py        what a selection looks like
config.py       the section [teacher]
config_checks.py    keys that do not go together
checks.py       what is refused before the run
forecast.py     what a run is about to train, said before it does
advice.py       plans that cannot teach, teaching that does not pay
panels.py       its panels in the report
trace.py        which examples every step trained
"""
