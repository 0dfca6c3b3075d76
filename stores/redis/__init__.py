"""The log in Redis."""
