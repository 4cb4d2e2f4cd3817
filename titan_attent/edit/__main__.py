"""``python -m titan_attent.edit``"""

import gc
import sys

gc.disable()  # searching the modules of torch for garbage, again and again, would take much of the start

from titan_attent.edit.command import main  # noqa: E402

gc.freeze()  # they stay
gc.enable()

if __name__ == "__main__":
    sys.exit(main())
