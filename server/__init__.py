"""The server: HTTP, WebSocket, runs. It stands on `agents` and `stores`; nothing stands on it."""
