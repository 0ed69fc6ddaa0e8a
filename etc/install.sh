#!/bin/sh
# install.sh install|uninstall: put vmshell on a systemd host, or take it away again. Run by `make install` and `make uninstall`.
#
# KVM=1         also the command `kvm` for members of vmusers who have a real shell (uninstall always takes it away)
# DESTDIR=DIR   only lay the files out below DIR (for a package); nothing is enabled, created or reloaded
#
# Installing over a running vmshell is the upgrade: VMs run on, their consoles pause for a moment. What vmshell keeps on the host is
# brought into the form of this version by migrate.sh, once. Killed in the middle it is run again; run again it changes nothing.
# Each version of the code has a folder of its own, versions/RELEASE-DIGEST; `current` is a link to the one in force. Processes follow
# it once, at their start, and hold the folder open: what is held stays, and so does the version before.
# What it never does: touch /etc/shells (a shell listed there may be changed away with chsh), overwrite /etc/vmshell/policy.toml.
set -eu
umask 022
cd "$(dirname "$0")/.."
DESTDIR=${DESTDIR:-}
LIBDIR=/usr/local/lib/vmshell
CODE=$LIBDIR/current
UNITDIR=/usr/local/lib/systemd/system
DISTDIR=/usr/lib/python3/dist-packages # where Debian's packages put Python modules; the shell's late imports come from there
SSHD=/etc/ssh/sshd_config.d/50-vmshell.conf
SYSCTL=/usr/local/lib/sysctl.d/50-vmshell.conf
SOCKETS="vmshell-launcher.socket vmshell-relay.socket vmshell-tapnet.socket vmshell-front.socket vmshell-broker.socket"
SERVICES="vmshell-launcher.service vmshell-relay.service vmshell-tapnet.service vmshell-broker.service vmshell-front.service"
NAMES=vmshell-names.service # the broker starts it
ENABLED="$SOCKETS vmshell-broker.service" # the broker also by itself: VMs, published ports and names come back with the host
UNITS="$SOCKETS $SERVICES $NAMES vmshell.slice"
PACKAGES="qemu-system-x86 qemu-utils bubblewrap util-linux openssh-server openssh-client nftables dnsmasq-base iproute2
 python3-prompt-toolkit python3-pexpect python3-pyroute2 python3-pampy python3-six"

TMP=$(mktemp -d)
trap 'rm -rf "$TMP"' EXIT

say() { echo "vmshell: $*"; }
die() { echo "vmshell: $*" >&2; exit 1; }

check_host() {
    [ "$(id -u)" = 0 ] || die "installing needs root: sudo make $1"
    [ -d /run/systemd/system ] || die "this host does not run systemd. \`vmshell --session\` needs no installation; DESTDIR=DIR only lays out the files"
}

missing_packages() {
    for package in $PACKAGES; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s ' "$package"
    done
}

install_packages() {
    command -v dpkg-query >/dev/null || { say "not a Debian system: see to these yourself: $(echo $PACKAGES)"; return; }
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    say "installing packages: $missing"
    apt-get -qq update || true
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $missing >/dev/null </dev/null ||
        die "these packages could not be installed: $missing"
}

check_python() {
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || die "needs /usr/bin/python3, version 3.11 or later"
}

put() { # put MODE SOURCE TARGET: one file, root's, in one rename; one that is there already is left alone
    target=$DESTDIR$3
    sed -e "s|@LIBDIR@|$CODE|g" -e "s|@DISTDIR@|$DISTDIR|g" "$2" >"$TMP/new"
    ! cmp -s "$TMP/new" "$target" || [ -z "$(find "$target" -maxdepth 0 -type f -perm "$1" -uid "$(id -u)")" ] || return 0
    mkdir -p "${target%/*}"
    cp "$TMP/new" "$target.new"
    chmod "$1" "$target.new"
    mv -fT "$target.new" "$target"
}

put_link() { # put_link TEXT LINK: in one rename
    [ "$(readlink "$2")" != "$1" ] || return 0
    ln -sfn "$1" "$2.new"
    mv -fT "$2.new" "$2"
}

sources() { find vmshell tapnet -type f ! -path '*/__pycache__/*' | LC_ALL=C sort; }

digest_of() { (cd "$1" && sources | xargs sha256sum | sha256sum | cut -c1-12); }

is_whole() { # is what lies in this folder what its name says, and nobody else's to write?
    [ -d "$1" ] && [ "$(digest_of "$1")" = "${1##*-}" ] && [ -z "$(find "$1" \( -perm /022 -o ! -uid "$(id -u)" \) -print -quit)" ]
}

put_code() { # complete and compiled in a folder of its own before the link says so
    name=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' vmshell/__init__.py)-$(digest_of .)
    code=$LIBDIR/versions/$name
    if ! is_whole "$DESTDIR$code"; then
        new=$DESTDIR$LIBDIR/versions/.new damaged=$DESTDIR$LIBDIR/versions/.damaged
        rm -rf "$new" "$damaged"
        mkdir -p "$new"
        sources | tar -cf - --owner=0 --group=0 --mode='u=rwX,go=rX' -T - | tar -C "$new" -xf - --no-same-owner
        [ ! -e "$DESTDIR$code" ] || mv -T "$DESTDIR$code" "$damaged"
        mv -T "$new" "$DESTDIR$code"
    fi
    # Only what is not compiled yet, by this Python.
    /usr/bin/python3 -IS -m compileall -q -s "$DESTDIR$code" -p "$code" "$DESTDIR$code" >/dev/null ||
        die "the code does not compile with /usr/bin/python3"
    before=$(readlink "$DESTDIR$CODE" || true)
    case $before in '' | "versions/$name") ;; *) put_link "$before" "$DESTDIR$LIBDIR/previous" ;; esac
    put_link "versions/$name" "$DESTDIR$CODE"
}

is_held() { find /proc/[0-9]*/fd -maxdepth 1 -lname "$1" 2>/dev/null | grep -q .; }

# Before there were versions the code lay in $LIBDIR itself. Its processes hold nothing; they are told by how they were started.
old_code_runs() {
    for process in $(grep -lsE '/usr/local/(bin/vmshell|sbin/vmshell-admin|lib/vmshell/vmshell/)' /proc/[0-9]*/cmdline); do
        find "${process%/*}/fd" -maxdepth 1 -lname "$LIBDIR/versions/*" 2>/dev/null | grep -q . || return 0
    done
    return 1
}

remove_old_code() {
    for folder in "$LIBDIR"/versions/*; do
        case versions/${folder##*/} in "$(readlink "$CODE")" | "$(readlink "$LIBDIR/previous")") continue ;; esac
        is_held "$folder" || rm -rf "$folder"
    done
    rm -rf "$LIBDIR/versions/.new" "$LIBDIR/versions/.damaged"
    [ ! -e "$LIBDIR/vmshell" ] || old_code_runs || rm -rf "$LIBDIR/vmshell" "$LIBDIR/tapnet"
}

put_man() { # the verbs of vmshell(1) come from the table that also parses them
    /usr/bin/python3 -IS "$DESTDIR$CODE/vmshell/__main__.py" shell --verbs-man >"$TMP/verbs"
    sed -e "/@VERBS@/{r $TMP/verbs" -e 'd}' etc/man/vmshell.1 >"$TMP/page"
    put 0644 "$TMP/page" /usr/local/share/man/man1/vmshell.1
    for page in etc/man/*.[1-8]; do
        [ "$page" = etc/man/vmshell.1 ] || put 0644 "$page" "/usr/local/share/man/man${page##*.}/${page##*/}"
    done
}

put_files() {
    put_code
    put 0755 etc/bin/vmshell /usr/local/bin/vmshell
    put 0755 etc/bin/vmshell-admin /usr/local/sbin/vmshell-admin
    if [ "${KVM:-}" = 1 ]; then put 0755 etc/bin/kvm /usr/local/bin/kvm; fi
    for unit in $UNITS; do put 0644 "etc/systemd/$unit" "$UNITDIR/$unit"; done
    for example in etc/examples/*; do put 0644 "$example" "/usr/local/share/vmshell/examples/${example##*/}"; done
    put 0644 etc/sysusers.d/vmshell.conf /usr/local/lib/sysusers.d/vmshell.conf
    put 0644 etc/sysctl.d/50-vmshell.conf "$SYSCTL"
    put 0644 pam/vmshell /etc/pam.d/vmshell
    put_man
    mkdir -p "$DESTDIR/etc/ssh/vmshell-keys"
    if [ ! -e "$DESTDIR/etc/vmshell/policy.toml" ]; then
        put 0644 etc/policy.toml /etc/vmshell/policy.toml
    elif ! cmp -s etc/policy.toml "$DESTDIR/etc/vmshell/policy.toml"; then
        put 0644 etc/policy.toml /etc/vmshell/policy.toml.shipped
        say "kept your /etc/vmshell/policy.toml; the one that comes with this version is policy.toml.shipped beside it"
    fi
}

put_sshd() { # refused by sshd: everything as before, and said. A wrong file here could lock the administrator out.
    if ! command -v sshd >/dev/null; then
        put 0644 etc/sshd_config.d/50-vmshell.conf "$SSHD"
        say "there is no sshd here; $SSHD waits for one"
        return
    fi
    had=$TMP/had
    if [ -e "$SSHD" ]; then cp -p "$SSHD" "$had"; fi
    put 0644 etc/sshd_config.d/50-vmshell.conf "$SSHD"
    mkdir -p -m 0755 /run/sshd # where sshd was never started, `sshd -t` misses it
    if ! problem=$(sshd -t 2>&1); then
        if [ -e "$had" ]; then mv -f "$had" "$SSHD"; else rm -f "$SSHD"; fi
        die "sshd refuses its configuration with $SSHD in place, so that file is as it was before: $problem"
    fi
    if [ -e "$had" ] && ! cmp -s "$had" "$SSHD"; then
        mv -f "$had" "$SSHD.before"
        say "$SSHD was another one; that is kept as ${SSHD##*/}.before, which sshd does not read"
    fi
    grep -qsiE '^[[:space:]]*Include[[:space:]]+/etc/ssh/sshd_config\.d/\*\.conf' /etc/ssh/sshd_config ||
        say "WARNING: /etc/ssh/sshd_config does not include /etc/ssh/sshd_config.d/*.conf: members of vmusers are not confined"
    systemctl try-reload-or-restart ssh.service || true
}

activate() {
    systemd-sysusers /usr/local/lib/sysusers.d/vmshell.conf
    /usr/lib/systemd/systemd-sysctl "$SYSCTL" || say "$SYSCTL cannot be put in force here (doctor says what that means)"
    systemctl daemon-reload
    sh etc/migrate.sh forward
    put_tmpfiles
    systemd-tmpfiles --create /usr/local/lib/tmpfiles.d/vmshell.conf
    systemctl -q enable $ENABLED
    systemctl start $SOCKETS
    # An upgrade: the new code takes over. The sockets stay, so clients wait and see no error.
    systemctl restart $SERVICES || die "the services do not start: journalctl -u 'vmshell-*'"
}

put_tmpfiles() { put 0644 etc/tmpfiles.d/vmshell.conf /usr/local/lib/tmpfiles.d/vmshell.conf; }

running_vms() { systemctl list-units --plain --no-legend 'vmshell-vm-*.scope' 2>/dev/null | wc -l; }

# Only what is ours by its mark: the packet filter's two tables, and the bridges whose alias says so. Taps ended with their VMs.
remove_networks() {
    for family in inet bridge; do nft delete table "$family" vmshell 2>/dev/null || true; done
    for link in /sys/class/net/*; do
        [ "$(cat "$link/ifalias" 2>/dev/null)" != vmshell ] || ip link delete "${link##*/}" 2>/dev/null || true
    done
}

vmshell_accounts() { getent passwd | awk -F: '$7 == "/usr/local/bin/vmshell" {print $1}'; }

uninstall() {
    if [ -z "$DESTDIR" ]; then
        running=$(running_vms)
        [ "$running" = 0 ] || [ "${STOP_VMS:-}" = 1 ] ||
            die "VMs are running: $running. Shut them down first, or pull their plugs with \`make uninstall STOP_VMS=1\` (disks are kept)"
        systemctl -q disable --now $ENABLED 2>/dev/null || true
        systemctl stop $SERVICES $NAMES vmshell.slice 2>/dev/null || true
        remove_networks
    fi
    rm -rf "$DESTDIR$LIBDIR" "$DESTDIR/run/vmshell"
    rm -rf "$DESTDIR/usr/local/share/vmshell"
    if cmp -s etc/bin/kvm "$DESTDIR/usr/local/bin/kvm"; then rm -f "$DESTDIR/usr/local/bin/kvm"; fi
    for file in /usr/local/bin/vmshell /usr/local/sbin/vmshell-admin /usr/local/lib/sysusers.d/vmshell.conf \
        /usr/local/lib/tmpfiles.d/vmshell.conf "$SYSCTL" /etc/pam.d/vmshell "$SSHD"; do rm -f "$DESTDIR$file"; done
    for unit in $UNITS; do rm -f "$DESTDIR$UNITDIR/$unit"; done
    for page in etc/man/*.[1-8]; do rm -f "$DESTDIR/usr/local/share/man/man${page##*.}/${page##*/}"; done
    rm -f "$DESTDIR/etc/vmshell/policy.toml.shipped"
    if cmp -s etc/policy.toml "$DESTDIR/etc/vmshell/policy.toml"; then rm -f "$DESTDIR/etc/vmshell/policy.toml"; fi
    rmdir "$DESTDIR/etc/vmshell" "$DESTDIR/etc/ssh/vmshell-keys" "$DESTDIR/var/lib/vmshell-home" 2>/dev/null || true
    [ -z "$DESTDIR" ] || return 0
    systemctl daemon-reload
    ! command -v sshd >/dev/null || systemctl try-reload-or-restart ssh.service || true
    say "removed. Kept: the users' VMs and images (/var/lib/vmshell), console logs (/var/log/vmshell), a changed policy.toml,"
    say "ssh keys (/etc/ssh/vmshell-keys), the group vmusers and the system users vmshell-broker (which owns the VMs),"
    say "vmshell-relay (which owns the logs), vmshell-front, vmshell-tapnet and vmshell-names."
    accounts=$(vmshell_accounts)
    [ -z "$accounts" ] || say "These accounts have vmshell as their shell and cannot log in until you give them another one" \
        "(usermod -s /bin/bash NAME) or delete them (userdel NAME):" $accounts
}

case ${1:-} in
install)
    [ -n "$DESTDIR" ] || { check_host install; sh etc/migrate.sh check; install_packages; check_python; }
    put_files
    if [ -n "$DESTDIR" ]; then put_tmpfiles; put 0644 etc/sshd_config.d/50-vmshell.conf "$SSHD"; exit 0; fi
    put_sshd
    activate
    remove_old_code
    say "installed. Next:"
    say "  vmshell-admin image build demo          an image to make VMs from"
    say "  vmshell-admin user add NAME --key FILE  an account"
    say "  vmshell-admin doctor                    is everything as it should be?"
    ;;
uninstall)
    [ -n "$DESTDIR" ] || check_host uninstall
    uninstall
    ;;
*) die "usage: etc/install.sh install|uninstall" ;;
esac
