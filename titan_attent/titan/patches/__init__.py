"""Patches for torchtitan 0.2.2 and torch, each with its reason and the version it can go with.

compat.py         of torchtitan, and of torch on all devices
checkpoint.py     of torchtitan's checkpoints
cpu.py            training on CPU with gloo; cpu_attention.py: attention there
log_filter.py     lines about GPUs, kept out of a log on CPU
"""
