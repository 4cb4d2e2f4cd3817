"""A step of a pipeline by highway backpropagation against the stock schedules.

__main__.py     the command
pipeline.py     the schedules on CPU processes, timed
simulator.py    how long a step takes by the order of its operations
"""
