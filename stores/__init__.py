"""What is kept: the nouns, the events, the contracts, and one module per backend.

Nothing here knows about agents or HTTP; `agents` and `server` stand above it.
"""
