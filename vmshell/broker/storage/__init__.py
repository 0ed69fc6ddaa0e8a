"""What a VM is made of: its objects as files, images, uploads. Part of the broker's process."""
