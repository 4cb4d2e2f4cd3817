"""What a run is refused for before it costs anything; each check raises a ValueError with what, where and the fix.

preflight.py        all checks before the first process group, in their order
parallelism.py      parallelisms that cannot be combined
value_checks.py     values of torchtitan's own keys that it takes without a word and fails on later
load_sources.py     what a run starts from, and keys that contradict it
resume_checks.py    whether the checkpoint that a run starts from fits it
"""
