"""The server: HTTP, WebSocket, runs. It imports `agents` and `stores`; neither imports it."""
