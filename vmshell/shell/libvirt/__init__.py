"""A libvirt domain, read into a definition. Part of the shell's process."""
