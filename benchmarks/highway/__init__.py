"""The step time of a pipeline with highway backpropagation against the stock schedules.

__main__.py     the command
pipeline.py     the schedules on CPU processes, timed
simulator.py    simulates the step time from the order of operations
"""
