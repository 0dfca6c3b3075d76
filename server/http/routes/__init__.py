"""The routes, one module per resource: an endpoint reads the request, calls the service and writes the response."""
