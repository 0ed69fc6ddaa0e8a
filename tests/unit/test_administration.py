"""What the broker answers root's tools: who stands on an image, what an account owns; and that the tools read it so.

Rows D22, D29.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.broker import FakeBroker
from vmshell import encoding
from vmshell.admin import usage
from vmshell.broker.composition import Parts
from vmshell.broker.host.processes import Host
from vmshell.broker.runtime.call import Peer
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.vm.objects import Object
from vmshell.broker.vm.vm import Vm
from vmshell.errors import BadValue, VmshellError
from vmshell.layout import Layout
from vmshell.messages import ASKED_MAX, SHOWN_MAX, ImageUsers, Owned, Request, parse_request
from vmshell.model.definition import Definition
from vmshell.model.policy import Policy
from vmshell.refusals import CannotTell, NotAllowed

ROOT, ALICE = Peer(0, "root", admin=True), Peer(1000, "alice", admin=False)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(**{name: f"{tmp_path}/{name[0]}" for name in ("etc", "state", "run", "log")}, embedded=False)


@pytest.fixture
def parts(layout: Layout) -> Parts:
    return broker_of(layout)


def broker_of(layout: Layout) -> Parts:
    """All of a broker, without a client; its records read from the disk."""
    made = Parts(layout, Policy(), Loop(print), Host(embedded=True))
    made.registry.load()
    return made


def ask(parts: Parts, request: Request, peer: Peer = ROOT) -> dict[str, Any]:
    """The answer that *peer* gets, as it comes out of a packet."""
    answers: list[dict[str, object]] = []
    call = SimpleNamespace(peer=peer, reply=answers.append)
    parts.handlers[type(request)](call, request)
    (answer,) = answers
    return encoding.decode(encoding.encode({"id": 1, "ok": answer}))["ok"]  # type: ignore[return-value]


def make(parts: Parts, name: str, image: str, uid: int = 1000, owner: str = "alice") -> Vm:
    vm = parts.registry.create(uid, owner, Definition(name=name, image=image))
    parts.registry.finish_creation(vm)
    return vm


@contextlib.contextmanager
def serving(parts: Parts) -> Iterator[FakeBroker]:
    """The broker's handlers behind a real socket."""

    def answer(body: dict[str, object]) -> object:
        try:
            return ask(parts, parse_request(body))
        except VmshellError as exc:
            return exc

    with FakeBroker(parts.layout) as fake:
        fake.answers |= {"image-users": answer, "owned": answer}
        yield fake


# --- images -----------------------------------------------------------------------------------------------------------


def test_every_vm_counts_for_its_images_from_the_moment_it_is_being_made(parts: Parts) -> None:
    make(parts, "web1", "demo")
    make(parts, "web2", "demo")
    parts.registry.create(1001, "bob", Definition(name="half", image="demo"))
    parts.removal.remove(make(parts, "gone", "other"))
    with serving(parts):
        assert str(usage.users_of(parts.layout, "demo")) == "alice/web1, alice/web2, bob/half"
        assert usage.users_of(parts.layout, "other").count == 0
        assert usage.user_counts(parts.layout, ["other", "demo"]) == {"other": 0, "demo": 3}


@pytest.mark.parametrize("record", ["", "{", "[]", '{"images": "demo"}'])
def test_a_record_that_cannot_be_read_counts_for_every_image_until_it_is_gone(layout: Layout, record: str) -> None:
    make(broker_of(layout), "web1", "demo")
    Path(layout.vm_state(1000, "web1"), "record.json").write_text(record)
    parts = broker_of(layout)
    answer = ask(parts, ImageUsers(images=["demo"]))
    assert answer == {"images": [{"count": 0, "first": []}], "unreadable": {"count": 1, "first": ["1000/web1"]}}
    with serving(parts):
        assert usage.users_of(layout, "other").count == 1
        assert usage.user_counts(layout, ["other"]) == {"other": 0}
        parts.removal.remove(*parts.registry.of(1000))
        assert usage.users_of(layout, "other").count == 0


def test_of_a_newer_versions_vm_its_record_says_what_it_stands_on(layout: Layout) -> None:
    make(broker_of(layout), "web1", "demo")
    path = Path(layout.vm_state(1000, "web1"), "record.json")
    record = {**json.loads(path.read_text()), "version": 99}
    path.write_text(json.dumps(record))
    assert ask(broker_of(layout), ImageUsers(images=["demo"]))["images"] == [{"count": 1, "first": ["alice/web1"]}]
    path.write_text(json.dumps({**record, "images": {"demo": 1}}))
    assert ask(broker_of(layout), ImageUsers(images=["demo"]))["unreadable"]["count"] == 1


# --- accounts ---------------------------------------------------------------------------------------------------------


def test_D22_an_account_owns_what_lies_in_its_folders_with_or_without_a_record(parts: Parts) -> None:
    layout = parts.layout
    make(parts, "web1", "demo")
    parts.registry.create(1000, "alice", Definition(name="half"))
    Path(layout.vm_state(1000, "lost")).mkdir()
    shelf = parts.registry.shelf(1000, "alice")
    os.makedirs(shelf.folder)
    Path(shelf.begin("root.img", Object("raw", 1))).touch()
    shelf.finish("root.img", Object("raw", 1))
    with serving(parts):
        assert str(usage.belongings(layout, 1000, "alice")) == ".new-2, lost, web1, shelf.root.img"
        assert usage.belongings(layout, 1001, "bob").count == 0
        assert usage.vm_counts(layout, [1001, 1000]) == {1001: "0", 1000: "3"}


def test_what_cannot_be_listed_is_not_nothing(parts: Parts) -> None:
    layout = parts.layout
    Path(layout.vms, "1000").touch()  # stands for a folder that the broker may not read
    os.makedirs(f"{layout.shelf(1001)}/00")
    Path(layout.shelf(1001), "00", "objects.json").write_text("{")
    with serving(parts):
        with pytest.raises(CannotTell, match="nobody can say what alice owns: the host could not store that: Not a directory"):
            usage.belongings(layout, 1000, "alice")
        assert str(usage.belongings(layout, 1001, "bob")) == "shelf.objects.json"  # damaged, so who knows what else there was
        assert usage.vm_counts(layout, [1000, 1002]) == {1000: "?", 1002: "0"}


# --- bounds and rights ------------------------------------------------------------------------------------------------


def test_the_largest_answer_fits_into_a_packet(parts: Parts) -> None:
    owner = "\U0001f600" * 300  # an account name that a directory may hold
    images = [f"{'i' * 29}{index:02}" for index in range(ASKED_MAX)]
    for image in images:
        for index in range(SHOWN_MAX + 1):
            make(parts, f"vm{index}-{image[-2:]}", image, owner=owner)
    for row in ask(parts, ImageUsers(images=images))["images"]:
        assert (row["count"], len(row["first"])) == (SHOWN_MAX + 1, SHOWN_MAX)
    uids = list(range(2000, 2000 + ASKED_MAX))
    for uid in uids:
        for index in range(SHOWN_MAX + 1):
            Path(parts.layout.vm_state(uid, "\U0001f600" * 60 + str(index))).mkdir(parents=True)
    assert [row["count"] for row in ask(parts, Owned(uids=uids))["owned"]] == [SHOWN_MAX + 1] * ASKED_MAX


def test_many_are_asked_about_in_portions(parts: Parts) -> None:
    images = [f"image-{index}" for index in range(2 * ASKED_MAX + 1)]
    make(parts, "web1", images[-1])
    with serving(parts) as fake:
        assert usage.user_counts(parts.layout, images) == {**dict.fromkeys(images, 0), images[-1]: 1}
        assert len(usage.vm_counts(parts.layout, range(1000, 1000 + ASKED_MAX + 1))) == ASKED_MAX + 1
        assert fake.verbs() == ["image-users"] * 3 + ["owned"] * 2


@pytest.mark.parametrize("request_", [ImageUsers(images=["demo"]), Owned(uids=[1000])], ids=["image-users", "owned"])
def test_D29_only_administrators_are_told(parts: Parts, request_: Request) -> None:
    with pytest.raises(NotAllowed):
        ask(parts, request_, ALICE)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ImageUsers, {"images": ["a"] * (ASKED_MAX + 1)}), (ImageUsers, {"images": "demo"}), (ImageUsers, {"images": ["../x"]}),
        (Owned, {"uids": [0] * (ASKED_MAX + 1)}), (Owned, {"uids": [-1]}), (Owned, {"uids": [True]}), (Owned, {"uids": ["0"]}),
    ],
)  # fmt: skip
def test_more_or_other_than_may_be_asked(kind: type[Request], values: dict[str, object]) -> None:
    with pytest.raises((BadValue, VmshellError)):
        kind(**cast(Any, values))
