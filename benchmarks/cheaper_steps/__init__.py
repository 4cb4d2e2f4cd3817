"""Cheaper steps by [freezing] and [highway]: their effect on the validation loss, and their savings.

    __main__.py    the command
    rules.py       the rules and the goals
    table.py       the table, and whether a goal was reached
    curves.py      validation loss against FLOPs and against seconds
    ends.py        where every rule ended, drawn from the results alone

speed/gpu_steps.py measures the seconds of such steps on a GPU.
"""
