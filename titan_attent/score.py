"""The command that scores: ``torchrun ... -m titan_attent.score --job.config_file X.toml --checkpoint.initial_load_path
DIR [--section.key value ...]`` writes the losses of a reference model for every example of ``[data] path``.

What it does stands in titan/scoring/checkpoint.py.
"""

from titan_attent.titan.scoring.checkpoint import score

if __name__ == "__main__":
    score()
