"""``python -m titan_attent.report``"""

import sys

from titan_attent.report import main

sys.exit(main())
