"""What the broker asks of the host itself. Part of the broker's process."""
