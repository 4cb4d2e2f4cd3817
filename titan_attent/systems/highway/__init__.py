"""Highway backpropagation: the gradient takes the residual stream at once, and the blocks in a few rounds.

sweep.py        g, blocks -> weight gradients, the gradient below the blocks    the arithmetic; no trainer
sums.py         what is summed on the device in a watched sweep, and read from it
links.py        a block cut out of the graph, in eager, compiled and under FSDP2
branches.py     cuts at attention and feed-forward, for no rounds
account.py      what it saves, in FLOPs
stagewise.py    a pipeline schedule in which all stages run their backward at once; stages.py: as a system of a run
system.py       the method as a system of a run: hooks, the number of rounds, scalars, state
config.py       the section [highway]
checks.py       what is refused before the run
"""
