"""Highway backpropagation: the gradient reaches all blocks at once along the residual stream, and rounds correct it.

config.py       the section [highway]
checks.py       checks before the run
sweep.py        the arithmetic, without a trainer: from g and the blocks to weight gradients and the gradient below them
sums.py         the sums that a measured sweep makes on the device, and the values read from them
links.py        blocks cut out of the graph, in eager mode, compiled and under FSDP2
branches.py     cuts before attention and feed-forward, for zero rounds
account.py      the FLOPs that it saves
stagewise.py    a pipeline schedule in which all stages run their backward at the same time
stages.py       stagewise.py as a system of a run
system.py       the method as a system of a run: hooks, number of rounds, scalars, state
"""
