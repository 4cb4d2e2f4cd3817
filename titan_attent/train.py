"""The training command: ``torchrun ... -m titan_attent.train --job.config_file X.toml [--section.key value ...]``.

With ``--check N`` it checks a run of N processes and prints its plan, without torchrun. It is implemented in
titan/launch.py. What needs no torch is checked before (titan/first_checks.py).
"""

from titan_attent.titan.first_checks import check_command_line

if __name__ == "__main__":
    check_command_line("titan_attent.train")
    from titan_attent.titan.launch import train

    train()
