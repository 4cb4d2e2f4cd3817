"""The training command: ``torchrun ... -m titan_attent.train --job.config_file X.toml [--section.key value ...]``.

It is implemented in titan/launch.py.
"""

from titan_attent.titan.launch import train

if __name__ == "__main__":
    train()
