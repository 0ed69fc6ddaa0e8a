"""What each form of QEMU's options becomes, exactly; what is refused, with its class and reason; names that are no names."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmshell.model.definition import emit, from_table, parse
from vmshell.refusals import NoSuchObject
from vmshell.shell.qemu_cli.options import ALLOWED, DENIED, OPTIONS, UNUSED
from vmshell.shell.qemu_cli.translate import Translation, explain_table, refusal_lines, translate

SHELF = {"root", "data", "data.qcow2", "info.img", "k", "rd", "rom.bin"}
NET = [{"network": "users"}]
ROOT = {"path": "shelf:root", "bus": "ide", "format": "raw"}
ISO = {"path": "library:debian-12.iso", "type": "cdrom", "bus": "ide"}
FLOPPY = {"path": "shelf:info.img", "type": "floppy"}


def resolve(word: str) -> str:
    if word in SHELF:
        return f"shelf:{word}"
    if word == "debian-12.iso":
        return f"library:{word}"
    raise NoSuchObject(where="your shelf", object=word, advice=f"`put shelf.{word}` brings it in")


def tried(line: str, only: set[str] | None = None) -> Translation:
    found = translate(shlex.split(line), resolve, only)
    if found.refused:
        assert found.table == {}
    else:
        # What is accepted is a definition, also after a trip through TOML.
        assert parse(emit(found.table), found.name or "vm") == from_table(found.table, found.name or "vm")
    return found


def table(line: str) -> dict[str, Any]:
    found = tried(line)
    assert not found.refused, refusal_lines(found)
    return found.table


def refusals(line: str) -> list[str]:
    return refusal_lines(tried(line))


def pc(**more: Any) -> dict[str, Any]:
    return {"machine": {"type": "pc"}, "net": NET, **more}


# --- what is typed, and what it becomes -----------------------------------------------------------------------------------

# The 17 options that the page allows.
PAGE = [
    ("-fda", "-fda info.img", pc(disk=[FLOPPY])),
    ("-fdb", "-fdb info.img", pc(disk=[FLOPPY])),
    ("-hda", "-hda root", pc(disk=[ROOT])),
    ("-hdb", "-hdb root", pc(disk=[ROOT])),
    ("-cdrom", "-cdrom debian-12.iso", pc(disk=[ISO])),
    ("-boot", "-boot n", pc(boot={"order": ["net0"]})),
    ("-snapshot", "-hda root -snapshot", pc(disk=[{**ROOT, "snapshot": True}])),
    ("-localtime", "-localtime", pc(machine={"type": "pc", "clock": "localtime"})),
    ("-kernel", "-kernel k", pc(boot={"kernel": "shelf:k"})),
    ("-append", "-kernel k -append 'a=b, c'", pc(boot={"kernel": "shelf:k", "cmdline": "a=b, c"})),
    ("-initrd", "-kernel k -initrd rd", pc(boot={"kernel": "shelf:k", "initrd": "shelf:rd"})),
    (
        "-hdachs",
        "-hda root -hdachs 1024,16,63,lba",
        pc(disk=[{**ROOT, "geometry": {"cyls": 1024, "heads": 16, "secs": 63, "trans": "lba"}}]),
    ),
    ("-no-acpi", "-no-acpi", pc(machine={"type": "pc", "acpi": False})),
    ("-no-reboot", "-no-reboot", pc(machine={"type": "pc", "on_reboot": "stop"})),
    ("-loadvm", "-loadvm before-upgrade", pc(boot={"restore": "before-upgrade"})),
    ("-vnc", "-vnc :1", pc(display={"type": "vnc"})),
    ("-option-rom", "-option-rom rom.bin", pc(boot={"option_rom": ["shelf:rom.bin"]})),
]


def test_the_pages_17() -> None:
    assert {name for name, _, _ in PAGE} == {name for name, option in OPTIONS.items() if option.page == ALLOWED}


@pytest.mark.parametrize(("name", "line", "wanted"), PAGE)
@pytest.mark.parametrize("dash", ["", "-"])
def test_the_pages_allowed_options(name: str, line: str, wanted: dict[str, Any], dash: str) -> None:
    line = " ".join(dash + word if word in OPTIONS else word for word in line.split(" "))
    assert table(line) == wanted
    row = next(row for row in tried(line).rows if row.option.split()[0] == dash + name)
    assert (row.kind, row.page) == (ALLOWED, ALLOWED)
    assert row.became


CARD = {"network": "users", "model": "virtio", "mac": "06:00:00:00:00:2a", "forward": ["tcp:2222:22", "udp:5353:53"]}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("-M q35", pc(machine={"type": "q35"})),
        ("-machine q35", pc(machine={"type": "q35"})),
        ("-machine type=pc,acpi=off", pc(machine={"type": "pc", "acpi": False})),
        ("-machine pc-q35-7.2", pc(machine={"type": "pc-q35-7.2"})),
        ("-hdc root", pc(disk=[ROOT])),
        ("-hdd root", pc(disk=[ROOT])),
        ("-cpu host", pc(cpu={"model": "host"})),
        ("-cpu EPYC-Rome", pc(cpu={"model": "EPYC-Rome"})),
        ("-smp 2", pc(cpu={"count": 2})),
        ("-smp cpus=4", pc(cpu={"count": 4})),
        ("-m 256", pc(memory={"size": "256M"})),
        ("-m 2G", pc(memory={"size": "2G"})),
        ("-m size=768M", pc(memory={"size": "768M"})),
        ("-rtc base=localtime", pc(machine={"type": "pc", "clock": "localtime"})),
        ("-rtc base=utc", pc(machine={"type": "pc", "clock": "utc"})),
        ("-action reboot=shutdown", pc(machine={"type": "pc", "on_reboot": "stop"})),
        ("-action reboot=reset", pc(machine={"type": "pc", "on_reboot": "restart"})),
        ("-display none", pc()),
        ("-display vnc=:3", pc(display={"type": "vnc"})),
        ("-display none -vnc 127.0.0.1:3", pc(display={"type": "vnc"})),
        ("-vnc none", pc(display={"type": "vnc"})),
        ("-vnc :1 -k fr", pc(display={"type": "vnc", "keymap": "fr"})),
        ("-vga virtio", pc(display={"video": "virtio"})),
        ("-std-vga", pc(display={"video": "std"})),
        ("-device cirrus-vga", pc(display={"video": "cirrus"})),
        ("-device usb-tablet", pc(display={"tablet": True})),
        ("-usbdevice tablet", pc(display={"tablet": True})),
        ("-name web1", pc(name="web1")),
        ("-name guest=web1", pc(name="web1")),
        ("--name web1", pc(name="web1")),
        ("-nic none", {"machine": {"type": "pc"}}),
        ("-net none", {"machine": {"type": "pc"}}),
        ("-nic user", pc()),
        ("-net nic -net user", pc()),
        ("-net nic,model=e1000 -net user,hostfwd=tcp::8080-:80", pc(
            net=[{"network": "users", "model": "e1000", "forward": ["tcp:8080:80"]}]
        )),
        (
            "-nic user,model=virtio-net-pci,mac=06:00:00:00:00:2a,hostfwd=tcp::2222-:22,hostfwd=udp::5353-:53",
            pc(net=[CARD]),
        ),
        (
            "-netdev user,id=n0,hostfwd=::8080-:80 -device e1000e,netdev=n0",
            pc(net=[{"network": "users", "model": "e1000e", "forward": ["tcp:8080:80"]}]),
        ),
        ("-drive file=root", pc(disk=[ROOT])),
        ("-hda data.qcow2", pc(disk=[{**ROOT, "path": "shelf:data.qcow2", "format": "qcow2"}])),
        ("-drive root,format=qcow2", pc(disk=[{**ROOT, "format": "qcow2"}])),
        ("-drive file=root,if=virtio,format=raw", pc(disk=[{**ROOT, "bus": "virtio"}])),
        ("-drive file=root,if=scsi,snapshot=on", pc(disk=[{**ROOT, "bus": "scsi", "snapshot": True}])),
        ("-drive file=root,if=virtio,readonly=on", pc(disk=[{**ROOT, "bus": "virtio", "readonly": True}])),
        ("-drive file=info.img,if=floppy,index=1", pc(disk=[FLOPPY])),
        ("-drive media=cdrom", pc(disk=[{"type": "cdrom", "bus": "ide"}])),
        ("-device ide-cd", pc(disk=[{"type": "cdrom", "bus": "ide"}])),
        ("-hda debian-12.iso -snapshot", pc(
            disk=[{"path": "library:debian-12.iso", "bus": "ide", "format": "raw", "snapshot": True}]
        )),
        ("-drive if=none,id=c,file=debian-12.iso,media=cdrom -device scsi-cd,drive=c", pc(disk=[{**ISO, "bus": "scsi"}])),
        ("-device usb-storage,drive=stick -drive if=none,id=stick,file=root,format=raw", pc(disk=[{**ROOT, "bus": "usb"}])),
        ("-M q35 -hda root -cdrom debian-12.iso", pc(
            machine={"type": "q35"}, disk=[{**ROOT, "bus": "sata"}, {**ISO, "bus": "sata"}]
        )),
        ("-hda shelf:x -kernel image:demo -cdrom library:y.iso", pc(
            boot={"kernel": "image:demo"}, disk=[{**ROOT, "path": "shelf:x"}, {**ISO, "path": "library:y.iso"}]
        )),
        ("-kernel k -append -s", pc(boot={"kernel": "shelf:k", "cmdline": "-s"})),
    ],
)  # fmt: skip
def test_forms_and_what_they_become(line: str, wanted: dict[str, Any]) -> None:
    assert table(line) == wanted


def test_disks_stand_in_the_order_of_their_places() -> None:
    found = table("-fda info.img -hdd data -cdrom debian-12.iso -hda root -boot cda")
    assert found["disk"] == [FLOPPY, ROOT, ISO, {**ROOT, "path": "shelf:data"}]
    assert found["boot"]["order"] == ["disk0", "cdrom0", "floppy0", "disk1"]


def test_a_boot_letter_comes_first_and_the_rest_follows_as_in_qemu() -> None:
    disks = "-hda root -hdb data -cdrom debian-12.iso"
    assert table(f"{disks} -boot d")["boot"]["order"] == ["cdrom0", "disk0", "disk1"]
    assert table(f"{disks} -boot order=d,strict=on")["boot"]["order"] == ["cdrom0"]
    assert table(f"{disks} -boot menu=on")["boot"] == {"menu": True}
    both = table(f"{disks} -boot order=dn -boot menu=off")["boot"]
    assert both == {"menu": False, "order": ["cdrom0", "net0", "disk0", "disk1"]}


def test_bootindex_is_a_boot_order() -> None:
    line = (
        "-M q35 -drive file=root,if=none,id=d0 -drive file=data,if=none,id=d1 "
        "-device virtio-blk-pci,drive=d0,bootindex=2 -device scsi-hd,drive=d1 "
        "-netdev user,id=n0 -device virtio-net-pci,netdev=n0,bootindex=1"
    )
    found = table(line)
    assert [(disk["path"], disk["bus"]) for disk in found["disk"]] == [("shelf:root", "virtio"), ("shelf:data", "scsi")]
    assert found["boot"]["order"] == ["net0", "disk0", "disk1"]
    assert "bootindex 2 is there twice" in refusals(line.replace("drive=d1 ", "drive=d1,bootindex=2 "))[0]


def test_snapshot_spares_what_is_not_written() -> None:
    disks = table("-hda root -cdrom debian-12.iso -fda info.img -drive file=data,if=virtio,readonly=on -snapshot")["disk"]
    assert {disk["path"]: disk.get("snapshot", False) for disk in disks} == {
        "shelf:root": True,
        "library:debian-12.iso": False,
        "shelf:info.img": True,
        "shelf:data": False,
    }


# --- refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("-M ?", DENIED, "? is no machine"),
        ("-M isapc", DENIED, "isapc is no machine"),
        ("-machine microvm", DENIED, "microvm is no machine"),
        ("-m lots", DENIED, "memory.size is lots"),
        ("-m 1", DENIED, "memory.size is 1M"),
        ("-m", DENIED, "needs an argument"),
        ("-m=512", DENIED, "-m 512"),
        ("-m 512 -m 1G", DENIED, "-m 512 already said otherwise"),
        ("-smp 0", DENIED, "cpu.count is 0"),
        ("-smp two", DENIED, "no number"),
        ("-boot q", DENIED, "not made of a, c, d and n"),
        ("-boot nn", DENIED, "each once"),
        ("-boot d", DENIED, "there is no cdrom"),
        ("-hdachs 1,2,3", DENIED, "no -hda"),
        ("-hda root -hdachs 1,2", DENIED, "three numbers"),
        ("-hda root -hdachs 70000,1,1", DENIED, "1 to 65535"),
        ("-hda root -hdachs 1,1,1,weird", DENIED, "translation"),
        ("-M q35 -hda root -hdachs 1,1,1", DENIED, "q35"),
        ("-append quiet", DENIED, "for a kernel"),
        ("-initrd rd", DENIED, "for a kernel"),
        ("-k fr", DENIED, "for a screen"),
        ("-vnc :1 -k klingon", DENIED, "keymap"),
        ("-vnc :1 -k /etc/passwd", DENIED, "keymap"),
        ("-vnc unix:/tmp/x", DENIED, "names no display"),
        ("-vnc fd:3:1", DENIED, "names no display"),
        ("-vnc :1,", DENIED, "a comma too many"),
        ("-loadvm ../x", DENIED, "snapshot's name"),
        ("-usbdevice host:1234:5678", DENIED, "devices and files of the host"),
        ("-usbdevice disk:/etc/passwd", DENIED, "usb-storage"),
        ("-hda root -hda data", DENIED, "taken by another option"),
        ("-cdrom debian-12.iso -hdc root", DENIED, "same place as -hdc"),
        ("-hda debian-12.iso", DENIED, "library is read-only"),
        ("-hda root -hdb root", DENIED, "another disk of this VM writes to it"),
        ("-option-rom rom.bin -option-rom rom.bin", DENIED, "twice"),
        ("-nographic", DENIED, "monitor on the terminal"),
        ("-display sdl,gl=on", UNUSED, "no window"),
        ("-display gtk", UNUSED, "no window"),
        ("-display egl-headless,rendernode=/dev/dri/renderD128", DENIED, "graphics card"),
        ("-display spice-app", DENIED, "starts a program"),
        ("-vga qxl", DENIED, "more for a guest to attack"),
        ("-serial stdio", UNUSED, "`console NAME`"),
        ("-serial mon:stdio", UNUSED, "`console NAME`"),
        ("-serial pty", DENIED, "opens, overwrites or deletes"),
        ("-accel kvm", UNUSED, "administrator's"),
        ("-accel tcg", DENIED, "no boundary"),
        ("-enable-kvm", UNUSED, "leave it out"),
        ("-device virtio-balloon-pci", UNUSED, "every VM has one"),
        ("-device virtio-rng-pci,rng=r0", UNUSED, "every VM has one"),
        ("-device qemu-xhci", UNUSED, "when the tablet"),
        ("-device vfio-pci,host=01:00.0", DENIED, "device of the host"),
        ("-device AC97", DENIED, "code for a guest to attack"),
        ('-device \'{"driver":"virtio-blk-pci","drive":"d0"}\'', DENIED, "code for a guest to attack"),
        ("-drive '{\"file\":\"root\"}'", DENIED, "JSON"),
        ("-drive file=root,if=pflash", DENIED, "if=pflash"),
        ("-drive file=root,if=none,id=d0", DENIED, "no device uses it"),
        ("-drive file=root,format=vmdk", DENIED, "raw, qcow2"),
        ("-drive file=root,index=9", DENIED, "4 places"),
        ("-drive file=root,readonly=maybe", DENIED, "neither on nor off"),
        ("-drive file=root,readonly=on", DENIED, "virtio can"),
        ("-drive file=root,if=none,id=d0 -device ide-hd,drive=d0 -device ide-hd,drive=d0", DENIED, "already has a device"),
        ("-drive file=debian-12.iso,if=virtio,media=cdrom", DENIED, "not on virtio"),
        ("-drive if=virtio", DENIED, "names no file"),
        ("-drive file=a,,b", DENIED, "a comma too many"),
        ("-device virtio-blk-pci,drive=d0", DENIED, "no -drive with id=d0"),
        ("-device virtio-blk-pci", DENIED, "names no drive"),
        ("-netdev tap,id=n0", UNUSED, "passed by the broker"),
        ("-netdev bridge,id=n0", DENIED, "root's rights"),
        ("-netdev socket,id=n0,listen=:1", DENIED, "takes ports"),
        ("-netdev user,id=n0", DENIED, "no card is connected"),
        ("-netdev user", DENIED, "no identifier"),
        ("-device virtio-net-pci,netdev=n0", DENIED, "no -netdev with id=n0"),
        ("-nic tap,script=/tmp/x", UNUSED, "passed by the broker"),
        ("-nic none,model=virtio", DENIED, "none stands alone"),
        ("-nic user,hostfwd=tcp:0.0.0.0:8080-:80", DENIED, "the policy's to say"),
        ("-nic user,hostfwd=tcp::8080-10.0.2.2:80", DENIED, "the policy's to say"),
        ("-nic user,hostfwd=nonsense", DENIED, "no forward"),
        ("-nic user,mac=ff:ff:ff:ff:ff:ff", DENIED, "neither a group's"),
        ("-net nic", DENIED, "-net user beside it"),
        ("-net user", DENIED, "-net nic beside it"),
        ("-net nic,vlan=1 -net user", DENIED, "no hubs"),
        ("-net nic,model=ne2k_pci -net user", DENIED, "no card that VMs have"),
        ("-redir tcp:2222::22", DENIED, "-nic user,hostfwd=tcp::2222-:22"),
        ("root", DENIED, "-hda root"),
        ("-", DENIED, "-hda FILE"),
        ("--", DENIED, "-hda FILE"),
        ("''", DENIED, "-hda FILE"),
        ("--hda=root", DENIED, "-hda root"),
        ("-cdorm debian-12.iso", DENIED, "did you mean -cdrom?"),
        ("--explian", DENIED, "did you mean --explain?"),
        ("-frobnicate x", DENIED, "no such option"),
        ("-cdrom nothere.iso", DENIED, "`put shelf.nothere.iso` brings it in"),
    ],
)
def test_refused_with_class_and_reason(line: str, kind: str, said: str) -> None:
    found = tried(line)
    assert [row.kind for row in found.refused] == [kind]
    assert said in refusal_lines(found)[0]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("-machine q35,nvdimm=on,memory-backend=m,usb=on", ["nvdimm=on", "memory-backend=m", "usb=on"]),
        ("-machine q35,accel=kvm:tcg", ["accel=kvm:tcg"]),
        ("-cpu host,+vmx,pmu=on", ["+vmx", "pmu=on"]),
        ("-smp 2,cores=2,threads=1,maxcpus=8", ["cores=2", "threads=1", "maxcpus=8"]),
        ("-m 512,slots=2,maxmem=8G", ["slots=2", "maxmem=8G"]),
        ("-boot n,splash=/etc/passwd,once=d", ["splash=/etc/passwd", "once=d"]),
        ("-rtc base=utc,clock=vm,driftfix=slew", ["clock=vm", "driftfix=slew"]),
        ("-name web1,process=sshd", ["process=sshd"]),
        ("-vnc :1,password=on,tls-creds=t", ["password=on", "tls-creds=t"]),
        ("-drive file=root,cache=unsafe,aio=native,bps=1", ["cache=unsafe", "aio=native", "bps=1"]),
        ("-drive file=root,file.driver=nbd,backing.file=x", ["file.driver=nbd", "backing.file=x"]),
        ("-drive file=root,file=data", ["file=data"]),
        ("-nic user,smb=/home,tftp=/,guestfwd=tcp:1.2.3.4:1-cmd:id", ["smb=/home", "tftp=/", "guestfwd=tcp:1.2.3.4:1-cmd:id"]),
        ("-action reboot=reset,panic=none", ["panic=none"]),
        ("-device usb-tablet,bus=usb.0", ["bus=usb.0"]),
    ],
)
def test_every_unknown_part_has_a_line_of_its_own(line: str, parts: list[str]) -> None:
    rows = tried(line).refused
    assert [row.option for row in rows] == [f"{line.split()[0]} …{part}" for part in parts]
    assert all(row.reason and row.instead for row in rows)


def test_an_argument_never_becomes_an_option_nor_an_option_an_argument() -> None:
    """QEMU would open a file called -snapshot here; a person has forgotten the file."""
    assert [line.split(":")[0] for line in refusals("-hda -snapshot -cdrom")] == ["-hda", "-cdrom"]
    assert [row.option for row in tried("-unknown root -hda root").refused] == ["-unknown root"]


def test_one_mistake_is_not_many() -> None:
    """What refers to a refused option is not refused as well."""
    assert len(refusals("-cdrom /x.iso -boot d")) == 1
    assert len(refusals("-kernel /vmlinuz -initrd rd -append quiet")) == 1
    assert len(refusals("-drive file=nbd:x,if=none,id=d0 -device ide-hd,drive=d0")) == 1
    assert len(refusals("-hda ../root -hdachs 1,1,1")) == 1


# B01, B03 to B08: files whose names are more than names
NAMES = [
    *("x,file=secret,format=raw", "x,,y", "json:{}", 'json:{"driver":"file","filename":"/etc/shadow"}', "{}"),
    *("nbd:127.0.0.1:10901", "nbd+unix:///x?socket=/run/x", "http://169.254.169.254/", "ssh:host", "iscsi:x", "fat:rw:home"),
    *("fat:.", "blkdebug::root", "/dev/fdset/1", "/proc/self/fd/3", "fd:3", "/dev/sda", "/etc/passwd", "../x", "..", "."),
    *(".hidden", "shelf:../x", "shelf:a/b", "shelf:", "library:/etc/passwd", "file:root", "root\n-monitor", "root\x1b[2J"),
    *("r\u043eot", "x" * 65, ""),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["-hda", "-cdrom", "-fda", "-kernel", "-option-rom", "-drive format=raw,file="])
def test_names_that_are_no_names(option: str, name: str) -> None:
    words = [*option.split()[:1], option.split()[1] + name] if " " in option else [option, name]
    found = translate(["-hdb", "root", *words], lambda word: f"shelf:{word}")
    assert found.refused and found.table == {}
    assert all(line.isprintable() for line in [*refusal_lines(found), *explain_table(found, 80)])


# --- our own options, the policy, and any words at all ------------------------------------------------------------------------


def test_own_options_stand_anywhere() -> None:
    for line in ("--save web1 --explain -hda root", "-hda root --explain --save=web1"):
        found = tried(line)
        assert (found.save, found.explain, found.table) == ("web1", True, pc(disk=[ROOT]))
    found = tried("-hda root --name web2")
    assert (found.save, found.explain, found.name) == (None, False, "web2")


@pytest.mark.parametrize(
    "line",
    ["--save Web1", "--save", "--save -snapshot", "--name -snapshot", "-name 'x,y=z'", "--save web1 --name web2", "-name .x"],
)
def test_names_are_names(line: str) -> None:
    assert tried(f"{line} -hda root").refused


def test_the_policy_may_leave_fewer() -> None:
    assert not tried("-M pc --hda root --save x --explain", {"-hda", "-machine"}).refused
    found = tried("-hda root -cdrom debian-12.iso -smb /", {"-hda"})
    assert [row.option for row in found.refused] == ["-cdrom debian-12.iso", "-smb /"]
    assert "policy" in refusal_lines(found)[0]
    assert tried("-hda root", set()).refused


WORDS = st.lists(
    st.sampled_from([*OPTIONS, "--hda", "--save", "--explain"])
    | st.sampled_from(["root", "data", "k", "shelf:root", "q35", "pc", "512", "2", ":1", "d", "user", "none", "nic", "tablet"])
    | st.sampled_from(["file=root,if=none,id=d0", "virtio-blk-pci,drive=d0", "user,id=n0", "virtio-net-pci,netdev=n0", "web1"])
    | st.text(max_size=12),
    max_size=12,
)


@given(WORDS)
def test_nothing_typed_breaks_it_and_nothing_odd_comes_out(typed: list[str]) -> None:
    found = translate(typed, resolve)
    assert bool(found.table) != bool(found.refused)
    assert all(line.isprintable() for line in [*explain_table(found, 80), *refusal_lines(found)])
    if found.table:
        for ref in from_table(found.table, found.name or "vm").objects():
            assert not set(ref) & set(",/{}")


# --- for the terminal -------------------------------------------------------------------------------------------------------


def test_the_table_for_people() -> None:
    found = tried("-hda root -cdrom debian-12.iso -boot d -m 1G")
    assert explain_table(found, 100) == [
        "OPTION                CLASS     MEANS",
        "-hda root             allowed   disk0: path=shelf:root bus=ide format=raw",
        "-cdrom debian-12.iso  allowed   cdrom0: path=library:debian-12.iso type=cdrom bus=ide",
        "-boot d               allowed   boot.order=cdrom0,disk0",
        "-m 1G                 allowed   memory.size=1G (within your limits; in 2007 the administrator's",
        "                                alone)",
        "                      default   machine.type=pc",
        "                      default   net0: network=users",
    ]
    assert all(len(line) <= 60 for line in explain_table(found, 60))
    assert len(explain_table(found, 0)) == 7


def test_every_refusal_is_shown() -> None:
    assert refusals("-smb /home -hda root -nographic -enable-kvm") == [
        "-smb /home: denied: it starts a file server on the host; instead: bring files in with `put`, on a disk or an ISO image",
        "-nographic: denied: it puts QEMU's monitor on the terminal; instead: no screen is the default; "
        "the serial port is the console: `console NAME`",
        "-enable-kvm: not used: KVM is used wherever the host has it; instead: leave it out",
    ]
