# make demo       boot a guest and type on it (root or not; sets itself up first)
# make test       every test;  make check: the fast ones, under a minute
# make install    on this host, for its users (root, systemd);  make uninstall
# make soak       kill -9 of launcher, broker and front, 100 rounds, 50 VMs (ROUNDS=, SEED=, VMS=)
# make lint       ruff and mypy;  make bench: the figures;  make setup: what all of these need
VENV := .venv
PY := $(VENV)/bin/python
# Without .pyc files each run would parse and rewrite every test anew, in each worker.
PYTEST := PYTHONDONTWRITEBYTECODE= $(PY) -m pytest

# Indispensable for running a guest; and what only tests, images and system hosts want.
PROGRAMS := qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils bwrap:bubblewrap setpriv:util-linux
# No openssh-server: installing it would start one. The tests' sshd runs in a host of its own, see tests/host.
TEST_PROGRAMS := busybox:busybox-static cpio:cpio ssh:openssh-client rsync:rsync socat:socat strace:strace mke2fs:e2fsprogs \
	mmdebstrap:mmdebstrap /usr/share/OVMF/OVMF_CODE_4M.fd:ovmf depmod:kmod man:man-db gcc:gcc /usr/include/stdio.h:libc6-dev \
	ip:iproute2 nft:nftables dnsmasq:dnsmasq-base passt:passt git:git

.PHONY: demo test check soak lint bench install uninstall setup clean
.DEFAULT_GOAL := demo

demo: setup
	@$(PY) etc/demo.py

# Three at a time, a file staying together: most of them wait, for guests and for time to pass.
test: setup-all
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder

check: setup
	$(PYTEST) -m "not slow and not vm and not system" -q -n 2 --dist loadfile

# The rounds of kill -9 of which `make test` runs five: another SEED, other moments.
soak: setup
	VMSHELL_ROUNDS=$(or $(ROUNDS),100) VMSHELL_SEED=$(or $(SEED),9) VMSHELL_VMS=$(or $(VMS),50) \
		$(PYTEST) tests/vm/test_launcher_kills.py tests/attacks/test_front_processes.py

lint: setup
	$(VENV)/bin/ruff check .
	$(PY) -m mypy

bench: setup
	$(PY) bench/run.py

install:
	sh etc/install.sh install

uninstall:
	sh etc/install.sh uninstall

# As root missing packages are installed; otherwise the one command that does it is printed.
setup:
	@sh etc/setup.sh $(VENV) $(PROGRAMS)

.PHONY: setup-all
setup-all:
	@sh etc/setup.sh $(VENV) $(PROGRAMS) $(TEST_PROGRAMS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
