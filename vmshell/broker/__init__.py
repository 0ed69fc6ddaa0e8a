"""The broker's process: the only program that starts QEMU. Root in system mode, oneself in session mode; stdlib only."""
