"""The bias that remains with the weights of a soft draw.

__main__.py    the command
"""
