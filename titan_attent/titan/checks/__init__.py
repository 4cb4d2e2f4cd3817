"""The checks that refuse a run before it starts; each raises a ValueError that says what is wrong, where, and the fix.

preflight.py            all checks before the first process group, in their order
toml_checks.py          keys and sections of the TOML
unread_paths.py         paths that are given and not read
parallelism.py          parallelisms that cannot be combined
value_checks.py         values of torchtitan's keys that it accepts silently and then trains wrongly or fails on
torchtitan_ranges.py    values that torchtitan 0.2.2 refuses itself, later and on every rank
groups.py               data whose examples have groups, and what groups do not combine with
load_sources.py         the source that a run starts from, and keys that contradict it
hugging_face_checks.py  whether the family's adapter of Hugging Face's format carries all weights
resume_checks.py        whether the checkpoint that a run starts from fits the run
dump_folder.py          whether a run starts anew in the folder of another
"""
