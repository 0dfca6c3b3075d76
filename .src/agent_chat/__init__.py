"""The chat server, as one package: `server`, `agents`, `stores`, and the page `web_demo`."""
