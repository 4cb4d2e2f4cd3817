"""What several benchmarks share.

measure.py          interleaved timing, peak memory, processes, the header of a result
runner.py           tasks run side by side, each measured when it has ended
intervals.py        how far a mean of few seeds may be off
first_passage.py    when a run was first at a loss or an accuracy
"""
