"""A look at data before training: its rows, and what a teacher would select by scores. It trains nothing.

    python -m titan_attent.look DATA                                                # lengths, sources, random rows
    python -m titan_attent.look DATA --scores DIR --steps 1000 --batch 64 --html look.html

    subject.py      DATA -> its examples as people see them: text or thumbnails, lengths, sources
    decision.py     DATA and scores -> what a run with the recommended rule would keep
    groups.py       scores and what is kept -> the rows to show, by source
    tables.py       the numbers: sources, histogram of scores, other cuts
    contents.py     everything that is shown, computed once
    terminal.py     all of it as text of 100 columns
    page.py         all of it as one HTML page, without files beside it
    command.py      the command

The decision is the teacher's own (systems/teaching), in one process, so it is that of a run on any number of ranks.

Cost: some seconds to start. Memory: about 60 bytes per example with scores, 8 without. Reads the scores, the index of
the data set and, where documents are the unit, 4 bytes per document; and the rows that it shows.
"""
