"""The frame filter: between a session's QEMU and its passt. It drops the guest's frames that lead to the host's loopback."""
