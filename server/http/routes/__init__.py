"""The routes, one module per noun: each reads the request, calls the service once, and writes the answer."""
