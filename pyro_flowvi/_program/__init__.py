"""What a Pyro program is, found once: sites, plates, enumeration, densities, names of parameters."""
