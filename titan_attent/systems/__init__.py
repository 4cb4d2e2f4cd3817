"""The systems that take part in the steps of a run, one folder each, and their interface.

system.py       the interface: the methods of a system, and when they are called
system_list.py  all systems of this package, in the order in which they are called
settings.py     the settings of a run, independent of the trainer
teaching/       [teacher]: which examples are trained on, and with which weights
freezing/       [freezing]: which modules of the model a step updates
distillation/   [distillation]: which targets the loss has beside the labels
highway/        [highway]: how the gradient reaches the blocks
"""
