"""The systems that take part in the steps of a run, one folder each, and the seam through which they do.

system.py       the seam: what a system may do, and when it is called
system_list.py  the systems there are, in the order in which they are called
teaching/       [teacher]: which examples are trained, and with what weights
freezing/       [freezing]: which parts of the model a step updates
highway/        [highway]: which way the gradient takes
"""
