"""One boot asks each question once: what its objects are, which images it stands on, what its owner may have."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.costs import Bench
from vmshell import wire
from vmshell.broker.network import attachments
from vmshell.broker.runtime.loop import Loop
from vmshell.messages import Port
from vmshell.model.policy import Policy


def turn_until(loop: Loop, done: Any) -> None:
    for _ in range(400):
        if done():
            return
        loop.after(0.01, loop.stop)
        loop.run()
    raise AssertionError("nothing was launched")


def test_each_object_image_and_limit_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules, checks, overlays and the launch plan are handed what was found, from the request to the launcher."""
    monkeypatch.setattr(attachments, "DNSMASQ", "/bin/true")
    bench = Bench(tmp_path)
    parts: Any = bench.parts
    for store, name in ((bench.parts.registry.shelf(1000, "alice"), "o1.iso"), (parts.registry.get(1000, "web1").store, "root")):
        Path(store.path(name)).touch(mode=0o600)
    parts.capabilities.accel = "tcg"
    launched: list[Any] = []
    parts.launcher.launch = lambda number, plan, fds, heard, ended: launched.append(plan)

    def answer(message: Any, answered: Any) -> None:
        fds = [os.open(os.devnull, os.O_RDWR)] if isinstance(message, Port) else []
        answered(None, wire.Packet({"ok": {}}, fds))

    parts.tapnet.request = answer
    asked: collections.Counter[tuple[object, ...]] = collections.Counter()

    def count(owner: Any, name: str, at: int) -> None:
        real = getattr(owner, name)

        def counted(*words: Any, **more: Any) -> Any:
            asked[name, words[at]] += 1
            return real(*words, **more)

        monkeypatch.setattr(owner, name, counted)

    count(parts.resources, "facts_of", 1)
    count(parts.images, "get", 0)
    count(Policy, "effective", 1)
    bench.ask({"id": 1, "verb": "boot", "vm": "web1"})
    turn_until(parts.loop, lambda: launched)
    assert {ref for name, ref in asked if name == "facts_of"} == {"root", "shelf:o1.iso"}
    # Once for the boot, and once by the look at everything that is open, which asks for everybody.
    assert asked.pop(("effective", "alice")) <= 2
    assert set(asked.values()) == {1}, asked
    bench.close()


def test_what_is_still_to_be_made_is_judged_by_the_boot(tmp_path: Path) -> None:
    """`define` makes it, as it always did; that a CD drive takes no qcow2 disk is said when it is there."""
    bench = Bench(tmp_path)
    parts: Any = bench.parts
    parts.jobs.start = lambda kind, words, fds, done: done(0, {})
    (answer,) = bench.ask(
        {"id": 1, "verb": "define", "vm": "new1", "text": '[[disk]]\npath = "c"\ntype = "cdrom"\nsize = "4M"\n'}
    )
    assert answer["ok"]["missing"] == [] and parts.registry.get(1000, "new1").store.get("c").format == "qcow2"
    (answer,) = bench.ask({"id": 2, "verb": "boot", "vm": "new1"})
    assert answer["error"]["code"] == "wrong-format"
    bench.close()
