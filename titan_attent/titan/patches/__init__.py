"""Patches for torchtitan 0.2.2 and torch, each with its reason and the version it can go with.

registry.py            every patch with the versions it is for, and the call that applies them
compat.py              of torchtitan, and of torch on all devices
checkpoint_manager.py  of torchtitan's checkpoints: a manager with its faults fixed
cpu.py                 training on CPU with gloo; cpu_attention.py: attention there
log_filter.py          lines about GPUs, kept out of a log on CPU
"""
