"""Code that several benchmarks share.

rules.py            a rule of an experiment, and the teachers that several experiments use
tasks.py            a command with its configuration, and the configuration of a run on small text
runner.py           runs tasks in parallel; each has a result.json once it has finished
torchrun.py         how runs on text are started and measured
evaluate.py         the loss and the accuracy of saved weights on documents
forks.py            starts short tasks as forks of a process that has imported the product
tables.py           rules by corpora as Markdown; results.json and table.md
intervals.py        the confidence interval of a mean over few seeds
first_passage.py    the step at which a run first reached a loss or an accuracy
measure.py          interleaved timing, peak memory, processes, the header of a result
"""
