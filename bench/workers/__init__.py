"""One module a system; each runs in that system's own environment and imports nothing else's."""
