"""Does one organization slow down another? `python -m tests.bench.neighbour [ATTACK …]`."""
