"""The command that wrote text before it was ``python -m titan_attent.data.text``: one error that says so."""

import sys

if __name__ == "__main__":
    sys.exit("error: python -m titan_attent.data.writer is python -m titan_attent.data.text now, with the same options")
