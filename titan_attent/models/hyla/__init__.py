"""Attention as a hypernetwork (HYLA), in two groups of flavors: the authors' layer, and llama3 with that attention.

config.py      the TOML section [hyla]
flavors.py     sizes of the models
attention.py   the definition, written out
tiles.py       one tile of it, and its gradients
tiled.py       all tiles, as one torch operator
layer.py       the module of it that a model has, alone or with keys of other ranks
reference.py   the blocks of the authors' transformer
"""
