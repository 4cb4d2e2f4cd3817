"""Models that torchtitan does not have, one folder per kind: modules, sizes and examples.

vision/    image classifiers and masked autoencoders
hyla/      attention as a hypernetwork
"""
