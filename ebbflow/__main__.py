"""`python -m ebbflow`, for launchers that start a module on every process."""

from __future__ import annotations

import sys

from ebbflow.cli import main

sys.exit(main())
