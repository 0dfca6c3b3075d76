"""What is stored: the data types, the events, the contracts, and one folder per backend.

Nothing here depends on agents or HTTP; `agents` and `server` are the layers above.
"""
