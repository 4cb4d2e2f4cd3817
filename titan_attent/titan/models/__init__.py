"""The differences between model families, for the modules of titan/ that serve all of them.

family.py           the interface of a family and of a modality
families.py         the families, one object each
flavors.py          the flavors of text models, and the size of their vocabulary
text.py             text models
mot.py              the mixture of transformers
routing.py          its noise, balance loss and logged shares
hyla.py             text models with attention as a hypernetwork
vision.py           image models
initial_weights.py  starts from a checkpoint's trunk with a new head
"""
