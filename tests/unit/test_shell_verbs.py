"""One table: parser, help, completion and man page say the same."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmshell import messages
from vmshell.refusals import Usage
from vmshell.shell.cli import completion, help, verbs
from vmshell.shell.cli.values import CHECKS
from vmshell.shell.commands import machines
from vmshell.shell.ui.output import account, greeting


def test_every_word_means_one_verb() -> None:
    words = [word for verb in verbs.TABLE for word in (verb.name, *verb.aliases)]
    assert len(words) == len(set(words)) == len(verbs.BY_WORD)


def test_every_request_of_the_wire_has_its_verb_and_nothing_more() -> None:
    """By the verb's own name, under another one, or for administrators only."""
    own = {verb.name for verb in verbs.visible()}
    others = {"disk-add": "disk", "drop": "rm", "define": "kvm", "done": "put"}  # `set` is also `unset`, `info` also `snapshots`
    admin = {"launch-line", "reload", "net-health", "image-users", "owned", "unreadable"}
    assert set(messages.REQUESTS) - own == {"disk-add", "drop", "done", "host-key"} | admin
    only_here = {"help", "exit", "unset", "snapshots", "kvm", "import-libvirt", "disk", "ssh", "unpublish"}
    assert own - set(messages.REQUESTS) == only_here
    assert set(others.values()) <= own


def test_every_kind_of_value_has_its_check() -> None:
    kinds = {option.kind for verb in verbs.TABLE for option in verb.options}
    kinds |= {argument.kind for verb in verbs.TABLE for argument in verb.arguments}
    assert kinds - {"flag"} <= set(CHECKS)


def test_help_names_every_verb_alias_and_option() -> None:
    overview = help.overview(200)
    for verb in verbs.visible():
        assert verb.name in overview and verb.help in overview
        about = help.topic(verb.name, 80)
        assert about.startswith(f"usage: {verb.name}")
        for word in (*verb.aliases, *(f"--{option.name}" for option in verb.options)):
            assert word in about, (verb.name, word)
        for alias in verb.aliases:
            assert help.topic(alias) == help.topic(verb.name)


@pytest.mark.parametrize("width", [40, 80, 132])
def test_help_fits_the_width(width: int) -> None:
    for verb in verbs.visible():
        assert max(map(len, help.topic(verb.name, width).splitlines())) <= width, verb.name
    assert max(map(len, help.overview(width).splitlines())) <= width


def test_help_on_nothing_known() -> None:
    with pytest.raises(Usage, match="no help on bot"):
        help.topic("bot")


def test_exit_statuses_are_documented() -> None:
    assert help.undocumented_statuses() == []
    assert "130" in help.topic("exit-status")


def test_man_sections_name_everything() -> None:
    man = help.man_sections()
    for verb in verbs.visible():
        assert f"\\fB{verb.name.replace('-', chr(92) + '-')}\\fR" in man
        for option in verb.options:
            assert "\\-\\-" + option.name.replace("-", "\\-") in man
    assert not [line for line in man.splitlines() if line.startswith(".") and line.split()[0] not in (".SH", ".TP", ".RS", ".RE")]


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_man_source_has_no_warnings() -> None:
    source = ".TH VMSHELL 1\n.SH NAME\nvmshell \\- x\n" + help.man_sections()
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8"], input=source.encode(), capture_output=True, check=True)
    assert done.stderr == b""
    assert "Interrupted by Ctrl-C" in done.stdout.decode()


class Names:
    """A broker that knows two VMs and one image."""

    def call(self, request: messages.Request, progress: object = None) -> tuple[dict[str, object], None]:
        if isinstance(request, messages.Networks):
            return {"networks": [{"name": "users"}, {"name": "db"}]}, None
        if isinstance(request, messages.Net):
            return {"published": [{"port": 80, "proto": "tcp"}, {"port": 53, "proto": "udp"}]}, None
        if isinstance(request, messages.Images):
            return {"images": [{"name": "demo"}], "more": False}, None
        return {"vms": [{"name": "web1"}, {"name": "web2"}], "more": False}, None


class NameContext:
    broker = Names()


def completed(before: str) -> list[str]:
    return completion.complete(NameContext(), before)[1]  # type: ignore[arg-type]


def test_completion_comes_from_the_table_and_the_broker() -> None:
    assert {f"{verb.name} " for verb in verbs.visible()} | {"web1 ", "web2 "} == set(completed(""))
    assert completed("sh") == ["shutdown "] and completed("netw") == ["networks "]
    assert completed("boot w") == ["web1 ", "web2 "]
    assert completed("start web1 --c") == ["--console "]
    assert completed("new x --image ") == ["demo "]
    assert completed("new w") == []
    assert completed("boot web1 --wait ") == []
    assert completed("boot --wait x w") == ["web1 ", "web2 "]
    assert completed("/etc/") == [] and completed("boot /et") == [] and completed("destroy ") == []


def test_completion_of_networks_and_published_ports() -> None:
    assert completed("connect w") == completed("ssh w") == completed("net w") == ["web1 ", "web2 "]
    assert completed("unpublish web1 ") == ["53/udp ", "80/tcp "] and completed("publish web1 8") == ["80/tcp "]
    assert completed("connect web1 ") == ["80 "]
    assert completed("publish web1 80 --to ") == ["world "]
    assert completed("set web1 net0=") == ["net0=db ", "net0=users "]
    assert completed("set web1 net0.network=u") == ["net0.network=users "]
    assert completed("set web1 memory=") == completed("set web1 net0.link=") == []
    assert completed("net web1 ") == ["--follow ", "--json "] and completed("net web1 -f -") == ["--json "]
    assert completed("ssh -l ") == [] and completed("ssh -l bob w") == ["web1 ", "web2 "]


def test_short_options_are_shown() -> None:
    assert "  -f, --follow" in help.topic("net") and "net NAME [-f] [--json]" in help.topic("net")
    assert "-l, --login USER" in help.topic("ssh")
    assert "\\fB\\-f\\fR, \\fB\\-\\-follow\\fR" in help.man_sections()


def test_greetings() -> None:
    assert "no VMs yet" in greeting([], more=False)
    assert greeting([{"name": "web1", "state": "running"}], more=False).startswith("You have 1 VM: web1 is running.")
    assert "2 VMs, 1 running" in greeting([{"state": "running"}, {"state": "off"}], more=False)


@pytest.mark.parametrize(("limit", "shown"), [(240, True), (0, False)])
def test_whoami_shows_rates_where_there_are_any(limit: int, shown: bool) -> None:
    said: list[str] = []
    context = SimpleNamespace(say=said.append, terminal=SimpleNamespace(columns=lambda: 0, colour=False))
    limits = {"vms_max": 10, "changes_per_minute": limit}
    account(cast(Any, context), {"user": "alice", "uid": 1000, "mode": "system", "limits": limits, "used": {"vms": 2}})
    assert ["changes", "a", "minute", "240"] in [line.split() for line in said] if shown else "minute" not in "".join(said)


def test_no_action_is_without_a_verb() -> None:
    runs = {verb.run for verb in verbs.TABLE}
    public = {
        getattr(machines, name)
        for name in ("list_vms", "info", "new", "boot", "console", "shutdown", "kill", "reset", "reboot", "rm")
    }
    assert public <= runs
