"""The shared store, on MongoDB."""
