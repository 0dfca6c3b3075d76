"""The wire protocols: each module turns entries of a log into what clients of one protocol get.

`stores/message_parts.py` returns the parts of a stored message in the order in which the log had them.
"""
