"""The training command: ``torchrun ... -m titan_attent.train --job.config_file X.toml [--section.key value ...]``.

With ``--check N`` it checks a run of N processes and prints its plan, without torchrun. It is implemented in
titan/launch.py.
"""

from titan_attent.titan.launch import train

if __name__ == "__main__":
    train()
