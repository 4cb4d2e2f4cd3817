"""Models that torchtitan does not have, one folder per modality: modules, sizes and examples.

vision/    image classifiers and masked autoencoders
"""
