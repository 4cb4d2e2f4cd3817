"""What differs between learners, for the parts of titan/ that serve all of them.

families.py         the families there are, one object each; family.py: what such an object says
text.py             learners of text
vision.py           learners of images
initial_weights.py  a trunk with a new head
"""
