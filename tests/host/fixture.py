"""`host`: an installed host with the users alice and bob, one for each test file. A conftest.py imports it for its folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .machine import Host, name_for, why_not


@pytest.fixture(scope="module")
def bare_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A booted host with nothing of ours on it."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    host = Host(name_for(request.module.__name__))
    host.boot()
    yield host
    host.down()


@pytest.fixture(scope="module")
def host(bare_host: Host) -> Host:
    """The same after `make install`, with alice and bob."""
    bare_host.install()
    for name in ("alice", "bob"):
        bare_host.add_user(name)
    return bare_host
