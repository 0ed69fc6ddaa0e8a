"""The way to the broker. Part of the shell's process."""
