"""Code that every other package uses. Nothing here depends on models or on torchtitan.

counter_rng.py     random numbers as a hash of (key, id), not from a generator: the same on every number of ranks
sharding.py        which rank owns which example, and the few collectives of the package
agreement.py       checks that all ranks follow the same decision
flops.py           floating point operations of a layer, as every system counts them
ledger.py          seconds per activity of a run; examples trained and skipped
event_files.py     the records of TensorBoard files
file_lock.py       whether another process holds a lock file
json_lines.py      append-only logs that a resumed run continues
versioned_json.py  JSON files that name their format and version
typed.py           JSON values checked against the types that a dataclass declares
words.py           numbers with their nouns
toml.py            configurations that the package writes
checks.py          one clear error for a value that a key cannot have
"""
