"""The HTTP edge: requests in, JSON, event streams and sockets out. The service behind it knows none of this."""
