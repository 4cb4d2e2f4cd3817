"""The order of the examples: which example is trained when. It is the same on any number of ranks.

order.py     a pass and its pool, as pure functions from positions to example ids
shuffled.py  all examples, pass after pass: the plan of a run without selection
proportions.py  [data.sources] -> the proportions of the sources at every step, and the rows of a batch
source.py    a pass over the examples of one source
mixture.py   above the plan: which source's examples each batch has
sampler.py   (selection, seed, pass, consumed batches) -> ids and weights of this rank
fixed.py     a fixed list of examples in batches, for validation and scoring
packed.py    a pass over examples of different lengths, packed into windows
packing.py   which examples share a window of tokens, as pure functions of their lengths
forward_rows.py  the rows in which forward passes read documents
"""
