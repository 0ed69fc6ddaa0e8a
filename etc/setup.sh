#!/bin/sh
# setup.sh VENV PROGRAM:PACKAGE…: have the programs (or files, by absolute path) and a virtual environment that `make` needs.
# Does nothing when all is there.
#
# As root on Debian it installs the packages that are missing; otherwise it prints the one command that would, and stops.
# Changes nothing of the machine besides: no service, no account.
set -eu
cd "$(dirname "$0")/.."
venv=$1
shift
PATH=$PATH:/usr/sbin:/sbin

# The machine's own python where it is recent enough: what is installed by `make install` runs under that one too.
python=
for candidate in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done

missing=
for pair in "$@"; do
    case $pair in
    /*) [ -e "${pair%%:*}" ] || missing="$missing ${pair#*:}" ;;
    *) command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}" ;;
    esac
done
if [ -z "$python" ]; then
    missing="$missing python3 python3-venv"
elif [ ! -x "$venv/bin/python" ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing="$missing python3-venv"
fi

if [ -n "$missing" ]; then
    install="apt-get install --no-install-recommends$missing"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "These Debian packages are missing. As root, run" >&2
        echo "    $install" >&2
        echo "and then the same make command again." >&2
        exit 1
    fi
    echo "setup: $install" >&2
    apt-get -qq update </dev/null || true
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $missing </dev/null >/dev/null
    [ -n "$python" ] || python=/usr/bin/python3
fi

# Made again when setup.cfg is newer: its lists of requirements and programs may have changed.
if [ ! "$venv/.done" -nt setup.cfg ]; then
    echo "setup: python packages into $venv" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -e '.[test]' </dev/null
    touch "$venv/.done"
fi
