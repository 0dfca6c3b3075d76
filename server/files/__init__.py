"""Uploaded files and rendered HTML. Everything risky runs in worker processes."""
