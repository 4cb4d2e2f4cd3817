"""One loss per example from logits and labels, and the statistics of every example that are kept.

build.py            selects the loss that a run uses
folding.py          sums token losses per example, and weights them: the last stage of all losses here
cross_entropy.py    token losses in one pass over the logits
chunked.py          the same without a second copy of the logits
vocab_parallel.py   the same where tensor parallelism shards the vocabulary, or context parallelism the sequence
divergence.py       token losses of distillation: KL with a source's logits, cross-entropy with its ids
target_draws.py     a few target ids per token in place of a source's distribution
patches.py          the same interface for predicted patches of images: squared error
mixed.py            the same interface for images mixed from two: cross-entropy against two labels
exact_match.py      the share of examples whose every label is the most likely token
votes.py            the vote over rows with one input and several random seeds, and the worst inputs
worst_case.py       weights from the losses of a step: the gradient of a q-norm over its inputs
records.py          the statistics of an example
buffer.py           the statistics of all examples, sharded over the ranks, exchanged every few steps
mixtures.py         the statistics of examples that are trained as shares of mixtures
window.py           recent losses of the whole run, for weights computed from the loss within the step
"""
