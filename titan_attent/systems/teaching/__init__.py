"""The teacher: pool -> importance -> selection (slots, weights) -> passes.

system.py       the teacher as a system of a run: its checks, loss, logs and state
teacher.py      passes and weights for a custom training loop; the state
rounds.py       decides the next pass
draws.py        from a pool to the current selection
candidates.py   exchange between the owners of examples and the ranks that select from a pool
importance.py   records -> scores                       one function per importance
statistics.py   statistics of a pool's scores           computed once per draw
guards.py       quarantine of examples that never improve
schedule.py     progress -> ratio, interval             pure
ratios.py       the ratio of a schedule that reads the scores, and its bounds
strategies.py   scores -> weights                       one function per strategy
by_source.py    the same within each data source, under a mixture
selection.py    scores of all ranks -> exact top-k      collectives, no gather of N scores
radix.py        k-th largest keys over all ranks        several at once
tokens.py       what a share counts: tokens where examples differ in length, else examples
weights.py      inclusion probabilities -> weights      pure
audit.py        scalars that describe a selection
config.py       the section [teacher]
config_checks.py    values out of range, and keys that contradict each other
rule.py         the recommended rule, strategy = "difference"
checks.py       checks before the run
forecast.py     log: which examples the run will train, and how often
preview.py      the first selection of a run, made before the run
planned.py      the teacher's part of the plan of a run: phases, repeats, memory, files
shown.py        some rows of the first selection, as text
advice.py       warnings: plans that never select, risks of a rule, teaching that does not pay
panels.py       the teacher's panels in the report
spans.py        masks the labels of bad spans           pure
span_masks.py   level = "span" as a system of a run: its checks, cut and metrics
trace.py        which examples every step trained
"""
