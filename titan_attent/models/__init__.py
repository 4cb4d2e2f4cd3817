"""Models that torchtitan does not have, one folder per kind: modules, sizes and examples.

mot/       text: a mixture of transformers, one expert per sequence
vision/    image classifiers and masked autoencoders
hyla/      attention as a hypernetwork
"""
