"""Image models and their examples.

config.py       the TOML section [vision]
flavors.py      sizes of the models
blocks.py       patches, positions, transformer blocks
vit.py          the classifier, and the trunk of both models
mae.py          the masked autoencoder, its masks and its targets; stochastic depth
mixing.py       mixup and CutMix
examples.py     example id -> inputs and labels of a model
"""
