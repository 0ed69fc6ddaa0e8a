"""The launcher's starter: `python3 -IS …/vmshell/launcher/__main__.py ARGS…`. What root runs before `main.py` is all here.

It adds the one folder our code is in, by its real path, and keeps that folder open; `vmshell/__main__.py` says why.
"""

from __future__ import annotations

import os
import sys

code = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
sys.path.insert(0, code)

from vmshell.installed import hold_code  # noqa: E402

hold_code(code)

from vmshell.launcher.main import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
