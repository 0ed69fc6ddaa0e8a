"""What a VM is and what its user may have: definition, policy and the one decision. A pure library: text in, text out."""
