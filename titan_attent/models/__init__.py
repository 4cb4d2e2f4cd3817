"""Learners beside torchtitan's own, one folder each: models, their sizes, and what they are asked.

vision/    classifiers and masked autoencoders of images
"""
