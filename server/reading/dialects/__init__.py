"""The wire protocols: each module turns entries of a log into what clients of one protocol get."""
