"""Whether randomised algorithms appear when the worst inputs are trained: recall and graph colouring with a seed.

model.py      a memory that is too small for a row; nodes that see their neighbours alone
training.py   the q-norm over inputs by the package's weights; what a model does on new inputs
arms.py       a fixed or a random seed, each with q = 1 and with a large q; the two tasks
page.py       the table and the verdicts, from finished runs
__main__.py   the command
"""
