"""`python -m regraft.engine`, the same as `regraft`."""

import sys

from regraft.engine.cli import main

sys.exit(main())
