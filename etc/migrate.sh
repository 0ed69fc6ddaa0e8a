#!/bin/sh
# migrate.sh check|forward|back: bring what vmshell keeps on this host into the form that this version has, or back into the one before.
# install.sh runs `check` before it touches anything, and `forward` once the new units are known and before anything of them starts.
#
# State 1, without a mark: a broker that is root owns everything. State 2: what the broker writes is vmshell-broker's.
#
# It may be killed at any step and run again. /var/lib/vmshell/version is written last, and removed first on the way back: this
# version's broker does not start without it, and clients wait in its socket meanwhile. VMs are not touched: a QEMU keeps the files
# it has open, and the relay finds its sockets by their group, which stays as it is.
set -eu
umask 022
cd "$(dirname "$0")/.."
STATE=/var/lib/vmshell
RUN=/run/vmshell
BROKER=vmshell-broker
CODE=/usr/local/lib/vmshell/current
UNITDIR=/usr/local/lib/systemd/system
LATER="vmshell-launcher.socket vmshell-launcher.service vmshell-front.socket vmshell-front.service" # units that state 1 knows nothing of
OURS=$(sed -n 's/^STATE_VERSION = //p' vmshell/layout.py)
RELEASE=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' vmshell/__init__.py)

say() { echo "vmshell: $*"; }
die() { echo "vmshell: $*" >&2; exit 1; }

there() { [ ! -e "$STATE/version" ] || sed -n 's/^state \([0-9][0-9]*\)\( .*\)\{0,1\}$/\1/p' "$STATE/version"; }

check() { # also against a mark that says nothing: what is not understood is not touched
    [ -e "$STATE/version" ] || return 0
    version=$(there)
    [ -n "$version" ] || die "$STATE/version does not say \`state NUMBER\`, so nothing here is touched"
    [ "$version" -le "$OURS" ] || die "the state in $STATE is of version $version ($(cat "$STATE/version")); vmshell $RELEASE knows" \
        "none after $OURS. Install the vmshell named there, or a later one. The way back to this one: \`sh etc/migrate.sh back\` in that" \
        "one's tree, then \`make install\` here"
}

# Owners, never groups. -execdir, and -h: no link is followed, nor a folder that is put in another's place meanwhile.
own() { # own OWNER FOLDER: all that is in it
    # The first one's errors are not fatal: a job of the broker that has just ended may still be removing something.
    find -P "$2" -mindepth 1 -depth ! -user "$1" -execdir chown -h "$1" {} + 2>/dev/null || true
    left=$(find -P "$2" -mindepth 1 ! -user "$1" -print -quit 2>/dev/null || true)
    [ -z "$left" ] || die "$left cannot be given to $1"
}

# Children first, the folder last: its owner marks all below it as done, and then root never walks into it again.
give() { [ ! -d "$1" ] || [ "$(stat -c %U "$1")" = "$BROKER" ] || { own "$BROKER" "$1"; chown -h "$BROKER" "$1"; }; }

# The folder first: from then on the broker cannot enter it.
take() { [ ! -d "$1" ] || { chown -h root "$1"; own root "$1"; }; }

folders() { for folder in "$STATE/vms" "$STATE/shelf" "$RUN/vms" "$RUN/names"; do "$1" "$folder"; done; }

sockets() { # the broker's way to the services that go on; the sockets themselves stay
    for socket in "$RUN/relay.sock" "$RUN/tapnet.sock"; do [ ! -e "$socket" ] || chown -h "$1" "$socket"; done
}

move() { # move OWNER FROM TO
    [ ! -e "$2" ] || mv -fT "$2" "$3"
    [ ! -e "$3" ] || chown -h "$1" "$3"
}

forward() {
    [ "$(there)" != "$OURS" ] || return 0
    systemctl stop vmshell-broker.service
    folders give
    install -d -m 0700 -o "$BROKER" -g "$BROKER" "$STATE/net" "$RUN/broker"
    move "$BROKER" "$STATE/addresses.json" "$STATE/net/addresses.json"
    move "$BROKER" "$RUN/host.json" "$RUN/broker/host.json"
    move "$BROKER" "$RUN/autostarted" "$RUN/broker/autostarted"
    rm -f "$RUN/broker.lock"
    sockets "$BROKER"
    echo "state $OURS vmshell $RELEASE" >"$STATE/version.new"
    mv -f "$STATE/version.new" "$STATE/version"
    [ -d "$STATE/vms" ] || return 0
    say "the state in $STATE is of version $OURS now. The way back, VMs running on: \`sh etc/migrate.sh back\` in this tree, then at once"
    say "\`make install\` in the tree of the version that you had."
}

# The version before reads one list of addresses, not a line for each change. The broker's account writes it: the folder is its.
old_addresses() {
    [ -e "$STATE/net/addresses.log" ] || return 0
    setpriv --reuid "$BROKER" --regid "$BROKER" --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs \
        /usr/bin/python3 -IS -c 'import sys; sys.path.insert(0, sys.argv[1])
from vmshell.broker.network.addresses import write_old_file
write_old_file(sys.argv[2])' "$CODE" "$STATE/net/addresses.json"
}

back() {
    rm -f "$STATE/version" "$STATE/version.new"
    systemctl -q disable --now $LATER 2>/dev/null || true
    for unit in $LATER; do rm -f "$UNITDIR/$unit"; done
    sed -i '/^Service=/d' "$UNITDIR/vmshell-broker.socket" # the older broker is there for users itself
    systemctl daemon-reload # or whoever asks for the broker from now on would have the later sockets made again
    # What is kept for the relay goes with it: the older one takes viewers' pipes for sockets.
    systemctl stop vmshell-broker.service vmshell-relay.service
    systemctl kill -s KILL vmshell-broker.service 2>/dev/null || true # what it had started: nobody may write while root walks
    old_addresses
    folders take
    move root "$STATE/net/addresses.json" "$STATE/addresses.json"
    move root "$RUN/broker/host.json" "$RUN/host.json"
    move root "$RUN/broker/autostarted" "$RUN/autostarted"
    rm -rf "$STATE/net" "$RUN/broker"
    sockets root
    say "the state in $STATE is as before version $OURS. Now run \`make install\` in the tree of the version that you had: until then"
    say "no broker runs. Who is logged in has the newer shell and should log in again."
}

case ${1:-} in
check | forward | back) "$1" ;;
*) die "usage: etc/migrate.sh check|forward|back" ;;
esac
