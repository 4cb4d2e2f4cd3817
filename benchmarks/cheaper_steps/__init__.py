"""What makes a step cheaper, [freezing] and [highway]: what it does to the validation loss, and what it saves.

    __main__.py    the command
    rules.py       the rules and the goals
    table.py       the table, and whether a goal was reached
    curves.py      validation loss against FLOPs and against seconds

The seconds of such steps on a GPU are speed/gpu_steps.py's.
"""
