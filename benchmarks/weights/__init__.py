"""What the weights of a soft draw leave of its bias.

__main__.py    the command
"""
