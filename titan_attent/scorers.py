"""The command that makes scorers: ``torchrun ... -m titan_attent.scorers --trusted DIR --output DIR --job.config_file
X.toml`` trains an amateur and an expert, and writes the losses of both on every example of the run's data.

What it does stands in titan/scoring/pair.py.
"""

from titan_attent.titan.scoring.pair import make_scorers

if __name__ == "__main__":
    make_scorers()
