"""Who may speak as the broker (N6)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vmshell import brokeraccount


def test_where_the_broker_has_an_account_nobody_else_is_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwd.getpwnam", lambda name: SimpleNamespace(pw_uid={"vmshell-broker": 987}[name]))
    assert brokeraccount.uid() == 987


def test_without_that_account_it_is_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(name: str) -> object:
        raise KeyError(name)

    monkeypatch.setattr("pwd.getpwnam", nobody)
    assert brokeraccount.uid() == 0
