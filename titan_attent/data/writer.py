"""The former name of ``python -m titan_attent.data.text`` and of its function, kept for existing scripts."""

import sys

from titan_attent.data.text.__main__ import main
from titan_attent.data.text.writer import write_dataset

__all__ = ["main", "write_dataset"]

if __name__ == "__main__":
    sys.exit(main())
