"""Uploaded files and rendered text: everything risky runs in worker processes."""
