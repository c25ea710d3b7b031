"""The way out: converted models back as ordinary ones."""
