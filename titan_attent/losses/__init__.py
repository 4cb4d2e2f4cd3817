"""From logits and labels to one loss per example, and what is kept of it.

build.py            which of these a run takes
folding.py          from losses of tokens to losses of examples and the weighted scalar: the tail of all losses here
cross_entropy.py    the losses of tokens in one pass over the logits
chunked.py          the same without a second copy of the logits
vocab_parallel.py   the same where tensor parallelism cuts the vocabulary, or context parallelism the sequence
patches.py          the same contract for predicted patches of images: squared error
mixed.py            the same contract for images made of two: cross-entropy against two labels
records.py          what is known of an example
buffer.py           the records of all examples, sharded over the ranks; exchanged every few steps
mixtures.py         the records of examples that are trained as shares of mixtures
window.py           the last losses of all, for weights that follow the loss within the step
"""
