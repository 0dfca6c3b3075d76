"""Reading a thread's log, for every transport."""
