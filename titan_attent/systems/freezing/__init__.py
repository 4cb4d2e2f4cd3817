"""Which parts of the model a step updates: Modular Adaptive Training (NeurIPS 2023, arXiv 2405.07527).

config.py    the section [freezing]
units.py     the modules: attention, feed-forward, embedding, output; what each costs
gram.py      Gram matrices of per-example gradients without those gradients
capture.py   what a forward and backward pass leaves of every layer of a module
probe.py     the principal eigenvalue of every module, on probe examples
policy.py    eigenvalues -> which modules stay active
freezing.py  off and on again, under FSDP2 and torch.compile
account.py   what freezing saves and what probing costs
system.py    all of it in a run
"""
