"""k-parity by the one-layer transformer of Kim and Suzuki: what intermediate steps change. Their twelve cells.

__main__.py    the command
model.py       the model, and its four ways of training
page.py        docs/results/parity.md from the results
"""
