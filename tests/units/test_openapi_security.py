"""The OpenAPI document asks for a key where the server does, and nowhere else."""

from __future__ import annotations

from agent_chat.server.app import ROUTES
from agent_chat.server.http.openapi import build_document


def test_only_the_open_paths_are_without_a_key() -> None:
    api = build_document(ROUTES)
    assert api["security"] == [{"key": []}]
    operations = [(path, each) for path, methods in api["paths"].items() for each in methods.values()]
    without = {path for path, operation in operations if operation.get("security", api["security"]) == []}
    assert without == {"/healthz", "/readyz"}
    assert api["paths"]["/metrics"]["get"]["security"] == [{"metrics_token": []}]
    assert {path for path, _ in operations if path.startswith("/api/")}.isdisjoint(without)
