"""The command that trains: ``torchrun ... -m titan_attent.train --job.config_file X.toml [--section.key value ...]``.

What it does stands in titan/launch.py.
"""

from titan_attent.titan.launch import train

if __name__ == "__main__":
    train()
