"""``python -m titan_attent.look``"""

import sys

from titan_attent.look.command import main

sys.exit(main())
