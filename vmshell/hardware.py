"""What of a machine is chosen by a name from a closed list.

Runs in: the launcher, the broker, the shell. Stdlib only, no I/O.
"""

from __future__ import annotations

CPU_MODELS = {"host": "", "qemu64": "qemu64,svm=off"}  # what there is without a policy: QEMU's -cpu text by name
# What QEMU ships; its -k also opens a path, so only these ever reach it.
KEYMAPS = (
    *("ar", "bepo", "cz", "da", "de", "de-ch", "en-gb", "en-us", "es", "et", "fi", "fo", "fr", "fr-be", "fr-ca", "fr-ch", "hr"),
    *("hu", "is", "it", "ja", "lt", "lv", "mk", "nl", "no", "pl", "pt", "pt-br", "ru", "sl", "sv", "th", "tr"),
)
