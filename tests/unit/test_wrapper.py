"""The secure wrapper: the page's 56 options verbatim, today's forms, and that nothing typed becomes anything but a definition."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmshell.model import policy
from vmshell.model.decide import Usage, apply_fixed, decide
from vmshell.model.definition import from_table, to_toml
from vmshell.refusals import NoSuchObject
from vmshell.shell.qemu_cli import translate as qemu_cli
from vmshell.shell.qemu_cli.options import OPTIONS

TREE = Path(__file__).parents[2]
SHELF = {"root", "hda", "hdb", "fd.img", "cd.iso", "bzImage", "initrd.gz", "my.rom", "disk.qcow2"}

# Each row of the page as somebody would type it, in the order of the page (tests/data/options-2007.tsv).
TYPED = [
    ("-M pc", "unused"),
    ("-fda fd.img", "allowed"),
    ("-fdb fd.img", "allowed"),
    ("-hda hda", "allowed"),
    ("-hdb hdb", "allowed"),
    ("-hdc hda", "unused"),
    ("-hdd hdb", "unused"),
    ("-cdrom cd.iso", "allowed"),
    ("-hda hda -boot c", "allowed"),
    ("-hda hda -snapshot", "allowed"),
    ("-no-quit", "unused"),
    ("-no-fd-bootchk", "unused"),
    ("-m 128", "denied"),
    ("-smp 1", "unused"),
    ("-nographic", "denied"),
    ("-vnc :1 -k fr", "unused"),
    ("-audio-help", "unused"),
    ("-soundhw es1370", "unused"),
    ("-localtime", "allowed"),
    ("-full-screen", "unused"),
    ("-win2k-hack", "denied"),
    ("-usb", "denied"),
    ("-usbdevice tablet", "denied"),
    ("-net nic,macaddr=06:00:00:00:00:09,model=rtl8139", "denied"),
    ("-net user,hostname=x", "denied"),
    ("-net tap,ifname=tap0,script=/tmp/x", "denied"),
    ("-net socket,listen=:1234", "denied"),
    ("-net socket,mcast=230.0.0.1:1234", "denied"),
    ("-net none", "denied"),
    ("-tftp /", "denied"),
    ("-smb /home", "denied"),
    ("-redir tcp:2222::22", "denied"),
    ("-kernel bzImage", "allowed"),
    ("-kernel bzImage -append x", "allowed"),
    ("-kernel bzImage -initrd initrd.gz", "allowed"),
    ("-monitor stdio", "denied"),
    ("-vmchannel di:1,pty", "denied"),
    ("-balloon pty", "denied"),
    ("-serial stdio", "denied"),
    ("-parallel /dev/parport0", "denied"),
    ("-pidfile /tmp/x", "denied"),
    ("-S", "unused"),
    ("-s", "denied"),
    ("-p 1234", "denied"),
    ("-d int", "denied"),
    ("-M pc -hda hda -hdachs 130,16,63", "allowed"),
    ("-L /tmp", "denied"),
    ("-no-kvm", "denied"),
    ("-std-vga", "unused"),
    ("-no-acpi", "allowed"),
    ("-no-reboot", "allowed"),
    ("-loadvm tag", "allowed"),
    ("-vnc :1", "allowed"),
    ("-daemonize", "unused"),
    ("-no-rtc", "denied"),
    ("-option-rom my.rom", "allowed"),
]
THE_17 = {
    *("-fda", "-fdb", "-hda", "-hdb", "-cdrom", "-boot", "-snapshot", "-no-acpi", "-no-reboot", "-localtime", "-loadvm", "-vnc"),
    *("-option-rom", "-kernel", "-append", "-initrd", "-hdachs"),
}


def rows_2007() -> list[list[str]]:
    lines = (TREE / "tests/data/options-2007.tsv").read_text().splitlines()[1:]
    return [line.split("\t") for line in lines]


def resolve(word: str) -> str:
    if word not in SHELF:
        raise NoSuchObject(where="your shelf", object=word, advice="")
    return f"shelf:{word}"


def translate(line: str, only: Any = None) -> qemu_cli.Translation:
    return qemu_cli.translate(line.split(), resolve, only)


def test_the_page_is_whole() -> None:
    rows = rows_2007()
    assert len(rows) == len(TYPED) == 56
    for (option, _, kind), (typed, expected) in zip(rows, TYPED, strict=True):
        assert option.split()[0] in typed.split() and kind == expected
        assert OPTIONS[option.split()[0]].page == kind
    assert {option for option, _, kind in rows if kind == "allowed"} == THE_17


@pytest.mark.parametrize(("typed", "kind"), TYPED)
def test_every_row_of_the_page_verbatim(typed: str, kind: str) -> None:
    """The allowed ones work; of the others some have a safe meaning within one's limits today, and every refusal is one line."""
    for line in (typed, " ".join(f"-{word}" if word.startswith("-") else word for word in typed.split())):
        found = translate(line)
        if kind == "allowed":
            assert not found.refused, found.refused
            from_table(found.table, "vm")
        elif found.refused:
            assert found.table == {}
            lines = qemu_cli.refusal_lines(found)
            assert len(lines) == len(found.refused)
            assert all(re.match(r".+: (denied|not used): .+", line) for line in lines), lines
        else:
            assert all(row.became for row in found.rows)


def test_what_of_the_refused_has_a_safe_meaning_today() -> None:
    """These forms became keys with limits of their own since 2007; each says so in --explain. Nothing else did."""
    widened = {typed.split()[0] for typed, kind in TYPED if kind != "allowed" and not translate(typed).refused}
    assert widened <= {
        "-M",
        "-hdc",
        "-hdd",
        "-m",
        "-smp",
        "-nographic",
        "-vnc",
        "-usb",
        "-usbdevice",
        "-net",
        "-redir",
        "-std-vga",
        "-k",
    }


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
def test_no_option_of_the_installed_qemu_is_without_a_row() -> None:
    """Completeness by construction: a QEMU with an option that nobody has judged fails here."""
    text = subprocess.run(["qemu-system-x86_64", "-help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"^(--?[A-Za-z][\w-]*)", text, re.MULTILINE)) | {"-h", "-M"}
    assert len(options) > 100
    missing = sorted(option for option in options if "-" + option.lstrip("-") not in OPTIONS)
    assert missing == []


def test_the_strict_profile_leaves_the_page_s_17_options_and_no_more() -> None:
    path = TREE / "etc/examples/strict-2007.toml"
    rules = policy.parse(path.read_text(), str(path)).effective("alice", ())
    accepted = set()
    for (option, _, _), (typed, _) in zip(rows_2007(), TYPED, strict=True):
        words = typed.replace("-M pc ", "").replace("-vnc :1 -k", "-k") if option != "-M" else typed
        found = qemu_cli.translate(words.split(), resolve, rules.limits.wrapper_options)
        if found.refused:
            continue
        definition = apply_fixed(from_table(found.table, "vm"), rules.limits, only_unsaid=True)
        share = Usage(vms=1, cpus=definition.cpus, memory=definition.memory, nics=len(definition.nics))
        refused = [verdict for verdict in decide("vm", rules, definition, share, Usage(), {}) if not verdict.ok]
        assert not refused, (typed, refused)
        accepted.add(option)
    assert accepted == THE_17


# Threat rows B01-B45 as far as they are options or file names.
HOSTILE = [
    *("-drive file=root,file=/etc/passwd,format=raw", "-drive file=/etc/passwd,format=raw", "-drive file=root,,x,format=raw"),
    *("-name x,process=sshd", "-name -x", "-hda --", "-hda -snapshot", "-hda json:{}", '-hda json:{"driver":"file"}'),
    *(
        "-hda nbd:127.0.0.1:10901",
        "-hda http://x/y",
        "-hda fat:/etc",
        "-hda fat:rw:/",
        "-hda blkdebug::root",
        "-hda /dev/fdset/1",
    ),
    *("-hda /proc/self/fd/3", "-hda fd:3", "-hda ../root", "-hda /dev/sda", "-cdrom /dev/cdrom", "-drive file=root,if=none"),
    *("-serial mon:stdio", "-serial file:/tmp/x", "-monitor stdio", "-qmp stdio", "-mon chardev=x", "-chardev pty,id=x"),
    *("-incoming exec:id", "-incoming tcp:0:1", "-netdev user,id=n,guestfwd=tcp:1.2.3.4:1-cmd:id", "-netdev user,id=n,smb=/"),
    *("-netdev user,id=n,tftp=/", "-netdev tap,id=n,script=/x", "-netdev bridge,id=n,helper=/x", "-nic tap", "-net tap"),
    *("-fw_cfg name=opt/x,file=/etc/passwd", "-acpitable file=/etc/passwd", "-smbios file=/etc/passwd", "-bios /etc/passwd"),
    *("-device loader,file=/etc/passwd", "-object secret,id=s,file=/etc/passwd", "-object rng-random,id=r,filename=/dev/mem"),
    *("-debugcon file:/x", "-D /x", "-pidfile /x", "-trace file=/x", "-audiodev wav,id=a,path=/x", "-virtfs local,path=/"),
    *("-fsdev local,id=f,path=/", "-object memory-backend-file,id=m,mem-path=/x", "-plugin /x", "-readconfig /x", "-L /"),
    *("-spice port=1", "-gdb tcp::1234", "-s", "-set drive.x.file=y", "-chroot /", "-runas root", "-device vfio-pci,host=0"),
    *("-device usb-host", "-tpmdev passthrough,id=t", "-accel tcg", "-daemonize", "-vnc :1,password=on -L x", "-global x.y=z"),
    *("-machine pc,dump-guest-core=on", "-M pc,mem-merge=off", "-cpu host,+vmx", "-boot splash=/etc/passwd", "-m 1G,maxmem=9G"),
    *("root", "-kernel /boot/vmlinuz", "-kernel bzImage -append", "-append x", "-initrd initrd.gz", "-preconfig", "-nonsense"),
    *("-device e1000,netdev=n,romfile=/x", "-hda=root", "-rtc base=2020-01-01,clock=vm", "-loadvm 1", "-run-with user=root"),
]


@pytest.mark.parametrize("line", HOSTILE)
def test_attacks_in_options_are_refused_one_line_each(line: str) -> None:
    found = translate(line)
    assert found.refused and found.table == {}
    assert len(qemu_cli.refusal_lines(found)) == len(found.refused)
    assert all(text.isprintable() for text in qemu_cli.refusal_lines(found))
    qemu_cli.explain_table(found, 80)


def test_what_gets_through_is_a_definition_and_no_more() -> None:
    line = "-hda disk.qcow2 -cdrom cd.iso -boot dc -m 256 -smp 2 -localtime -no-reboot -vnc :3 -k de -snapshot --save mine"
    found = translate(line)
    assert not found.refused and found.save == "mine"
    text = to_toml(from_table(found.table, "mine"))
    for part in (
        'type = "pc"',
        'size = "256M"',
        "count = 2",
        '"localtime"',
        '"stop"',
        '"vnc"',
        '"de"',
        "snapshot = true",
        "shelf:cd.iso",
    ):
        assert part in text
    assert all(row.became for row in found.rows)


def test_several_refusals_are_all_shown() -> None:
    lines = qemu_cli.refusal_lines(translate("-hda root -monitor stdio -smb /x --bogus"))
    assert [line.split(":")[0] for line in lines] == ["-monitor stdio", "-smb /x", "--bogus"]
