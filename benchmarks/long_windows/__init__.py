"""The recommended rule where it could harm: long windows, and trusted text of another kind.

__main__.py    the command: data, scorers, runs, the table
"""
