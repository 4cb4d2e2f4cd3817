"""Learning tasks: data sets of generated rows, each a question and an answer that is known to be right.

    task.py          the interface of a task; its rows, a table or of several lengths
    draws.py         random numbers that depend on (seed, task, split, row) alone
    parity.py        the parity of hidden bits, with or without its chain of thought
    sparse_parity.py the same for distillation: the support is fixed
    recall.py        associative recall with a random seed in the row
    graph_colouring.py  three colours on a cycle, with a random seed in the row
    fuzzy_logic.py   a fuzzy function learned in context; held-out combinations of its terms
    sraven.py        symbolic Raven's matrices; held-out combinations of rules
    pcfg.py          sentences of a context-free grammar
    task_list.py     the table of tasks
    checkers.py      for each task a plain function that says whether one row is right, independent of its generator
    vocabulary.py    words -> the tokenizer of a data set
    writer.py        a task -> data sets of titan_attent.data.text, with masks; __main__.py: its command

Only the answer's tokens count as labels. ``[data] exact_match`` logs the share of rows that are answered right.
docs/reference/tasks.md says what each task tests, and what of its paper is not reproduced.
"""
