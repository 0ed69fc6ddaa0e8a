"""The serial console on the person's terminal. Part of the shell's process."""
