"""The shared log, on Redis."""
