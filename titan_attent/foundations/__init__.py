"""What every other package stands on. Nothing here knows of models or of torchtitan.

counter_rng.py           randomness as a hash of (key, id) instead of a generator: equal for every number of ranks
sharding.py        which rank owns which example, and the few collectives of the package
agreement.py       do all ranks follow the same decision?
flops.py           floating point operations of a layer, as every system counts them
ledger.py          where the time of a run went, what was trained and skipped
json_lines.py      append-only logs that a resume goes on with
versioned_json.py  files that say what they are
typed.py           what such a file holds, every value of the type that is declared
toml.py            configurations that the package writes
checks.py          one clear error for a value that a key cannot have
"""
