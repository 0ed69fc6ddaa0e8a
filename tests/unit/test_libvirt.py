"""libvirt's domains read into definitions: what there is a key for, a line for everything else, and hostile documents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmshell.errors import BadValue, VmshellError
from vmshell.model.definition import emit, from_table, parse
from vmshell.shell.libvirt.domain import read_domain
from vmshell.shell.libvirt.xml import DEPTH_MAX, ELEMENTS_MAX, LINES_MAX, SIZE_MAX

# As `virsh dumpxml` prints a VM that virt-install made, shortened where it repeats itself.
DUMPED = """<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>Web_1.example</name>
  <uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <title>the web server</title>
  <description>serves
    the pages</description>
  <metadata><libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/x"><x/></libosinfo:libosinfo></metadata>
  <memory unit='KiB'>1048576</memory>
  <currentMemory unit='KiB'>1048576</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram>/var/lib/libvirt/qemu/nvram/web1_VARS.fd</nvram>
    <bootmenu enable='yes'/>
  </os>
  <features><acpi/><apic/><vmport state='off'/></features>
  <cpu mode='host-passthrough' check='none' migratable='on'><topology sockets='1' cores='2' threads='1'/></cpu>
  <clock offset='localtime'><timer name='rtc' tickpolicy='catchup'/><timer name='pit' tickpolicy='delay'/></clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/var/lib/libvirt/images/web 1.qcow2'/>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <boot order='2'/>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='/srv/data.img'/>
      <target dev='sda' bus='scsi'/>
      <transient/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='/isos/debian-12.iso'/>
      <target dev='sdb' bus='sata'/>
      <readonly/>
      <boot order='1'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdc' bus='sata'/></disk>
    <disk type='file' device='floppy'><source file='/isos/info.img'/><target dev='fda' bus='fdc'/></disk>
    <disk type='block' device='disk'><source dev='/dev/vg/lv'/><target dev='vdb' bus='virtio'/></disk>
    <disk type='network' device='disk'>
      <auth username='u'><secret type='ceph' uuid='x'/></auth>
      <source protocol='rbd' name='pool/image'/><target dev='vdc'/>
    </disk>
    <controller type='usb' index='0' model='qemu-xhci'/>
    <controller type='pci' index='0' model='pcie-root'/>
    <interface type='network'>
      <mac address='52:54:00:8b:09:1f'/>
      <source network='default'/>
      <target dev='vnet2'/>
      <model type='e1000e'/>
      <link state='down'/>
      <boot order='3'/>
    </interface>
    <interface type='user'>
      <model type='virtio'/>
      <portForward proto='tcp'><range start='2022' to='22'/></portForward>
    </interface>
    <interface type='hostdev'><source><address type='pci'/></source></interface>
    <serial type='pty'><source path='/dev/pts/3'/><target type='isa-serial' port='0'/></serial>
    <console type='pty' tty='/dev/pts/3'><source path='/dev/pts/3'/><target type='serial' port='0'/></console>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <input type='tablet' bus='usb'/>
    <input type='keyboard' bus='ps2'/>
    <graphics type='vnc' port='5900' autoport='yes' listen='127.0.0.1' keymap='fr' passwd='verysecret'>
      <listen type='address' address='127.0.0.1'/>
    </graphics>
    <graphics type='spice' autoport='yes'/>
    <sound model='ich9'/>
    <video><model type='qxl' ram='65536' heads='1'/></video>
    <hostdev mode='subsystem' type='pci' managed='yes'/>
    <filesystem type='mount'><source dir='/home'/><target dir='home'/></filesystem>
    <memballoon model='virtio'><stats period='5'/></memballoon>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'/>
  <qemu:commandline><qemu:arg value='-monitor'/><qemu:arg value='stdio'/></qemu:commandline>
</domain>
"""


def domain(inside: str = "", devices: str = "", os: str = "") -> str:
    return (
        f"<domain type='kvm'><name>vm</name><os><type machine='pc'>hvm</type>{os}</os>"
        f"<features><acpi/></features>{inside}<devices>{devices}</devices></domain>"
    )


def test_a_whole_domain() -> None:
    table, left_out, objects = read_domain(DUMPED)
    assert table == {
        "name": "web-1-example",
        "description": "serves the pages",
        "agent": True,
        "machine": {"type": "q35", "firmware": "uefi", "acpi": True, "clock": "localtime", "on_reboot": "stop"},
        "cpu": {"count": 2, "model": "host"},
        "memory": {"size": "1024M"},
        "boot": {"menu": True, "order": ["cdrom0", "disk0", "net0"]},
        "disk": [
            {"path": "web-1.qcow2", "bus": "virtio", "format": "qcow2"},
            {"path": "data.img", "bus": "scsi", "format": "raw", "snapshot": True},
            {"path": "debian-12.iso", "type": "cdrom", "bus": "sata"},
            {"type": "cdrom", "bus": "sata"},
            {"path": "info.img", "type": "floppy", "bus": "fdc"},
        ],
        "net": [
            {"network": "users", "model": "e1000e", "link": "down"},
            {"network": "users", "model": "virtio", "forward": ["tcp:2022:22"]},
        ],
        "display": {"type": "vnc", "keymap": "fr", "tablet": True},
    }
    assert objects == ["web-1.qcow2", "data.img", "debian-12.iso", "info.img"]
    assert parse(emit(table)).name == "web-1-example"
    assert not any("verysecret" in line for line in left_out)
    told = [line.split(": ")[0] for line in left_out]
    for path in (
        "domain@id",
        "uuid",
        "title",
        "metadata",
        "currentMemory",
        "os/loader",
        "os/nvram",
        "features/vmport",
        "cpu/topology",
        "clock/timer",
        "devices/emulator",
        "devices/disk/driver@cache",
        "devices/disk/alias",
        "devices/disk/address",
        "devices/disk",
        "devices/controller",
        "devices/interface",
        "devices/interface/source",
        "devices/interface/target",
        "devices/channel",
        "devices/graphics",
        "devices/graphics@passwd",
        "devices/sound",
        "devices/video/model",
        "devices/video/model@ram",
        "devices/hostdev",
        "devices/filesystem",
        "seclabel",
        "qemu:commandline",
    ):
        assert path in told, path
    assert "devices/controller: every VM has it where it is needed (2 times)" in left_out
    assert "name: Web_1.example became web-1-example" in left_out


def test_the_least_domain() -> None:
    table, left_out, objects = read_domain("<domain><name>a</name></domain>")
    assert (table, left_out, objects) == ({"name": "a", "machine": {"acpi": False}}, [], [])


@pytest.mark.parametrize(
    ("inside", "section", "wanted"),
    [
        ("<memory>262144</memory>", "memory", {"size": "256M"}),
        ("<memory unit='GiB'>2</memory>", "memory", {"size": "2048M"}),
        ("<memory unit='bytes'>268435457</memory>", "memory", {"size": "257M"}),
        ("<memory unit='MB'>512</memory>", "memory", {"size": "489M"}),
        ("<memory unit='parsecs'>2</memory>", "memory", None),
        ("<memory unit='TiB'>99999</memory>", "memory", None),
        ("<memory>lots</memory>", "memory", None),
        ("<vcpu>4</vcpu>", "cpu", {"count": 4}),
        ("<vcpu>0</vcpu>", "cpu", None),
        ("<vcpu>100000</vcpu>", "cpu", None),
        ("<cpu mode='custom' match='exact'><model fallback='allow'>qemu64</model></cpu>", "cpu", {"model": "qemu64"}),
        ("<cpu mode='custom'><model>a,b=c</model></cpu>", "cpu", None),
    ],
)
def test_machine_values(inside: str, section: str, wanted: dict[str, object] | None) -> None:
    table, left_out, _ = read_domain(domain(inside))
    assert table.get(section) == wanted
    assert bool(left_out) == (wanted is None)


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("<clock offset='timezone' timezone='Europe/Paris'/>", "offset timezone: utc or localtime"),
        ("<on_reboot>preserve</on_reboot>", "preserve: restart or destroy"),
        ("<on_crash>coredump-destroy</on_crash>", "on_crash: a VM that has ended"),
        ("<vcpu current='1'>2</vcpu>", "vcpu@current"),
        ("<unheard>of</unheard>", "unheard: there is no key for it"),
        ("<description>\x85</description>", ""),
        ("<cpu><feature policy='require' name='vmx'/></cpu>", "cpu/feature: flags"),
    ],
)
def test_what_is_left_out_of_the_machine(inside: str, said: str) -> None:
    _, left_out, _ = read_domain(domain(inside))
    assert any(said in line for line in left_out) or not said


@pytest.mark.parametrize(
    ("disk", "wanted", "said"),
    [
        ("<source file='/a'/><target dev='hda' bus='ide'/><geometry cyls='16' heads='4' secs='9' trans='lba'/>",
         {"path": "a", "bus": "ide", "format": "raw", "geometry": {"cyls": 16, "heads": 4, "secs": 9, "trans": "lba"}}, ""),
        ("<source file='/a'/><target dev='hda' bus='ide'/><geometry cyls='0' heads='4' secs='9'/>",
         {"path": "a", "bus": "ide", "format": "raw"}, "1 to 65535"),
        ("<source file='/a'/><target dev='vda'/><geometry cyls='16' heads='4' secs='9'/>",
         {"path": "a", "bus": "virtio", "format": "raw"}, "only a disk on ide"),
        ("<source file='/a'/><target dev='sda' bus='sata'/>", {"path": "a", "bus": "ide", "format": "raw"}, "ide is taken"),
        ("<source file='/a'/><target dev='xvda' bus='xen'/>", {"path": "a", "format": "raw"}, "the usual one is taken"),
        ("<source file='/a'/><target bus='virtio'/><readonly/>",
         {"path": "a", "bus": "virtio", "format": "raw", "readonly": True}, ""),
        ("<source file='/a'/><target bus='virtio'/><shareable/><serial>WD</serial>",
         {"path": "a", "bus": "virtio", "format": "raw"}, "devices/disk/shareable"),
        ("<driver type='vmdk'/><source file='/a'/><target bus='virtio'/>", None, "format is vmdk"),
        ("<target bus='virtio'/>", None, "names no file"),
        ("<source file='/a'/><target bus='virtio'/><backingStore type='file'><source file='/b'/></backingStore>",
         {"path": "a", "bus": "virtio", "format": "raw"}, "an object stands alone"),
    ],
)  # fmt: skip
def test_disks(disk: str, wanted: dict[str, object] | None, said: str) -> None:
    table, left_out, _ = read_domain(domain(devices=f"<disk type='file'>{disk}</disk>"))
    assert table.get("disk") == ([wanted] if wanted else None)
    assert any(said in line for line in left_out) if said else left_out == []
    from_table(table)


def test_objects_have_names_of_their_own() -> None:
    files = ["/a/root.img", "/b/root.img", "/b/root.img", "/c/.hidden", "/d/Ä,ö=ü", "json:{}", "../../etc/passwd", "/", "x" * 300]
    disks = "".join(f"<disk type='file'><source file='{file}'/><target bus='virtio'/></disk>" for file in files)
    table, left_out, objects = read_domain(domain(devices=disks))
    assert objects == ["root.img", "2-root.img", "hidden", "disk", "json---", "passwd", "2-disk", "x" * 64]
    entries = table["disk"]
    assert isinstance(entries, list)
    assert [entry["path"] for entry in entries] == [*objects[:2], "2-root.img", *objects[2:]]
    assert any("2-root.img" in line for line in left_out)


def test_direct_boot_and_order() -> None:
    disks = "<disk type='file'><source file='/a'/></disk><disk type='file' device='cdrom'/>"
    table, left_out, objects = read_domain(
        domain(
            devices=disks,
            os="<kernel>/boot/vmlinuz</kernel><initrd>/boot/initrd.img</initrd><cmdline>console=ttyS0</cmdline>"
            "<boot dev='network'/><boot dev='cdrom'/><boot dev='hd'/>",
        )
    )
    assert table["boot"] == {
        "kernel": "vmlinuz",
        "initrd": "initrd.img",
        "cmdline": "console=ttyS0",
        "order": ["cdrom0", "disk0"],
    }
    assert objects == ["vmlinuz", "initrd.img", "a"]
    assert left_out == ["os/boot: this VM has no such device"]
    table, left_out, _ = read_domain(domain(os="<initrd>/x</initrd><cmdline>quiet</cmdline>"))
    assert "boot" not in table
    assert [line.split(":")[0] for line in left_out] == ["os/initrd", "os/cmdline"]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("<serial type='file'><source path='/etc/passwd'/></serial>", "devices/serial: it leads to a file"),
        ("<serial type='pty'/><serial type='pty'/>", "devices/serial: VMs have one serial port"),
        ("<input type='evdev'><source dev='/dev/input/event0'/></input>", "devices/input: devices of the host"),
        ("<rng model='virtio'><backend model='egd'>x</backend></rng>", "devices/rng: every VM has one"),
        ("<memballoon model='none'/>", "devices/memballoon: every VM has one"),
        ("<tpm model='tpm-crb'/>", "devices/tpm"),
        ("<redirdev bus='usb'/>", "devices/redirdev"),
        ("<interface type='direct'/>", "devices/interface"),
        ("<interface type='user'><model type='ne2k_pci'/></interface>", "model is ne2k_pci"),
        ("<interface type='user'><portForward proto='tcp'><range start='22'/></portForward></interface>", "from 1024"),
        ("<disk type='file' device='lun'><source file='/a'/></disk>", "devices/disk: a lun"),
        ("<graphics type='vnc' keymap='/etc/passwd'/>", "display.keymap"),
        ("<graphics type='vnc' passwd='hunter2'/>", "devices/graphics@passwd: secrets"),
    ],
)
def test_what_is_left_out_of_the_devices(device: str, said: str) -> None:
    table, left_out, _ = read_domain(domain(devices=device))
    assert any(said in line for line in left_out), left_out
    assert not any("hunter2" in line for line in left_out)
    from_table(table)


# --- hostile documents --------------------------------------------------------------------------------------------------

LAUGHS = '<!DOCTYPE domain [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><domain><name>&b;</name></domain>'
OUTSIDE = '<!DOCTYPE domain [<!ENTITY x SYSTEM "file:///etc/passwd">]><domain><name>&x;</name></domain>'


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        OUTSIDE,
        '<!DOCTYPE domain SYSTEM "http://127.0.0.1/x.dtd"><domain/>',
        "<!DOCTYPE domain><domain/>",
        "<domain><name>&undeclared;</name></domain>",
        "",
        "no xml",
        "<domain>",
        "<network/>",
        "<a/><b/>",
        "<domain type='xen'/>",
        "<domain type='lxc'/>",
        "<domain><os><type>exe</type></os></domain>",
        "<domain><os><type arch='aarch64'>hvm</type></os></domain>",
        "<x>" * (DEPTH_MAX + 1) + "</x>" * (DEPTH_MAX + 1),
        "<domain>" + "<x/>" * ELEMENTS_MAX + "</domain>",
        f"<domain><!--{'x' * SIZE_MAX}--></domain>",
        "<domain>" + "ä" * (SIZE_MAX // 2) + "</domain>",
        "\udcff<domain/>",
    ],
)
def test_hostile_documents_are_refused(text: str) -> None:
    with pytest.raises(BadValue) as refused:
        read_domain(text)
    assert refused.value.sentence().isprintable()


def test_the_documents_own_encoding_is_not_believed() -> None:
    table, _, _ = read_domain("<?xml version='1.0' encoding='utf-16'?><domain><name>a</name></domain>")
    assert table["name"] == "a"


def test_what_is_left_out_is_fit_for_a_terminal_and_bounded() -> None:
    inside = "".join(f"<x{number}/>" for number in range(LINES_MAX + 50))
    _, left_out, _ = read_domain(domain(f"<on_crash>\x85\u202e</on_crash><description>\u202eevil</description>{inside}"))
    assert len(left_out) == LINES_MAX + 1
    assert left_out[-1].endswith("more")
    assert all(line.isprintable() and len(line) < 400 for line in left_out)


@given(st.text(max_size=300) | st.text("<>/='\"! [disktypefa&;]", max_size=200).map(lambda text: domain(devices=text)))
def test_nothing_breaks_it(text: str) -> None:
    try:
        table, left_out, objects = read_domain(text)
    except VmshellError:
        return
    assert all(line.isprintable() for line in [*left_out, *objects])
    emit(table)
