"""dnsmasq: writes the configuration of dnsmasq from root's policy before each of its starts, and ends."""
