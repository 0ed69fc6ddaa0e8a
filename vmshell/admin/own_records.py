"""One's own VMs and host as their broker wrote them down: for session mode, where no broker need run and everything is one's own.

Never for an installed host: what lies there is the broker's, and root opens none of it by path.
Runs in: vmshell-admin, as the owner of what it reads.
"""

from __future__ import annotations

import json
import os
import pwd
from contextlib import suppress

from ..layout import Layout

ANY = "*"


def image_users(layout: Layout) -> dict[str, list[str]]:
    """VMs (`owner/name`) by the image they refer to, those just being made too. An unreadable record counts for all (`*`)."""
    assert layout.embedded
    users: dict[str, list[str]] = {}
    for uid in _listdir(layout.vms):
        for folder in _listdir(f"{layout.vms}/{uid}"):
            if folder.startswith(".rm-"):
                continue  # its VM is gone; only the deleting goes on
            try:
                with open(f"{layout.vms}/{uid}/{folder}/record.json", encoding="utf-8") as file:
                    images = _names(json.load(file)["images"])
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (ValueError, KeyError, TypeError):
                images = [ANY]
            for image in images:
                users.setdefault(image, []).append(f"{_account(uid)}/{folder}")
    return users


def host_facts(layout: Layout) -> dict[str, str]:
    """What the last session's broker found out about this host; nothing if none has looked since it booted."""
    assert layout.embedded
    try:
        with open(layout.host_facts, encoding="utf-8") as file:
            facts = json.load(file)
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in facts.items()} if isinstance(facts, dict) else {}


def _listdir(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _account(uid: str) -> str:
    with suppress(ValueError, KeyError):
        return pwd.getpwuid(int(uid)).pw_name
    return uid


def _names(value: object) -> list[str]:
    """The list of names that *value* must be; raises TypeError."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("not a list of names")
    return value
