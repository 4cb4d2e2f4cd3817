"""Patches for torchtitan 0.2.2 and torch, each with its reason and the condition under which it can be removed.

registry.py            every patch with the versions it is for, and the function that applies them
at_import.py           applies those that torchtitan needs while it is imported
compat.py              patches of torchtitan and torch on all devices
checkpoint_manager.py  torchtitan's checkpoint manager with its faults fixed
cpu.py                 training on CPU with gloo
cpu_attention.py       attention on CPU
log_filter.py          removes lines about GPUs from a log on CPU
"""
