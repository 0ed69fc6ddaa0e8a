"""The terminal, its lines, tables and prompts. Part of the shell's process."""
