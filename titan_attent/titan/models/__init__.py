"""What differs between learners, for the parts of titan/ that serve all of them.

kinds.py            what differs between learners of text and of images
vision.py           learners of images
initial_weights.py  a trunk with a new head
"""
