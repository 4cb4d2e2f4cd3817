"""Which modules of the model a step updates: Modular Adaptive Training (NeurIPS 2023, arXiv 2405.07527).

config.py    the section [freezing]
units.py     the modules (attention, feed-forward, embedding, output) and their cost in FLOPs
gram.py      Gram matrices of per-example gradients, without computing those gradients
capture.py   inputs and output gradients of every layer of a module, from one forward and backward pass
probe.py     the principal eigenvalue of every module, on probe examples
policy.py    from eigenvalues to the modules that stay active
freezing.py  freezing and unfreezing under FSDP2 and torch.compile
account.py   the FLOPs, bytes and seconds that freezing saves, and the FLOPs that probing costs
system.py    the system that combines them in a run
"""
