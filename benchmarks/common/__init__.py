"""What several benchmarks share.

rules.py            a rule of an experiment, and the teachers that several experiments have in common
tasks.py            a command with its configuration, and the configuration of a run on small text
runner.py           tasks side by side, each with a result.json once it has ended
torchrun.py         how runs on text are started and measured
tables.py           rules by corpora as Markdown; results.json and table.md
intervals.py        how far a mean of few seeds may be off
first_passage.py    when a run was first at a loss or an accuracy
measure.py          interleaved timing, peak memory, processes, the header of a result
"""
