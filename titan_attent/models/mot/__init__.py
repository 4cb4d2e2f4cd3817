"""A mixture of transformers: every block has several experts, each of them attention and a feed-forward, and a gate
sends each sequence to one of them. After "Mixture of transformers in three stages" (arXiv 2510.27004).

config.py    the section [mot]
gate.py      the gate: from the first tokens of a sequence to its expert, exploration noise, balance
grouped.py   linear layers of several experts, computed for the sequences of each in one product
block.py     the block: attention and feed-forward of the expert of each sequence
examples.py  windows of tokens whose first labels, which the gate has seen, do not count

The model and its training in torchtitan: titan/models/mot.py. What is the paper's and what is ours:
docs/reference/mot.md.
"""
