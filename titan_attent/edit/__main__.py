"""``python -m titan_attent.edit``"""

import sys

from titan_attent.edit.command import main

if __name__ == "__main__":
    sys.exit(main())
