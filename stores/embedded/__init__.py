"""The log of one process, in files of the data folder or in memory."""
