"""Models of images, and how an example of theirs is made.

config.py       the TOML section
flavors.py      sizes of the models
blocks.py       patches, positions, transformer blocks
vit.py          the classifier, and the trunk of both models
mae.py          the masked autoencoder, its masks and its targets; stochastic depth
mixing.py       mixup and CutMix
examples.py     from an example's number to what a model is given
"""
