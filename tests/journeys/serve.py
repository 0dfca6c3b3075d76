"""`python -m tests.journeys.serve`: the server's command line, with the scripted agent beside its own kinds."""

from agents.registry import Kind
from server import app
from server.__main__ import main
from tests.journeys.scripted import Scripted

if __name__ == "__main__":
    app.KINDS["scripted"] = Kind(Scripted())
    main(prog_name="serve")
