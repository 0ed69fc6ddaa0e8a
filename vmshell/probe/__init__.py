"""The probe: what QEMU is here, and does KVM really run a guest? One process per boot of the host, started by the broker."""
