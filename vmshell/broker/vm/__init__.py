"""VMs as records in memory and on disk, and who may do what with them. Part of the broker's process."""
