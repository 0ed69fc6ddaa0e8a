"""The `host` fixture, for tests that need a whole system of their own."""

from tests.host.fixture import bare_host, host

__all__ = ["bare_host", "host"]
