"""Runs: an agent's parts become events, and events become the stored message."""
