"""QEMU's command line, read into a definition. Part of the shell's process."""
