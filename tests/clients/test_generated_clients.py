"""Clients generated from the OpenAPI document compile, and upload, post and read against a live server."""

from __future__ import annotations

import asyncio
import compileall
import importlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import KEY
from tests.support.servers import Live
from tests.support.services import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120, func_only=True)]  # installing has a limit of its own

INSTALL_SECONDS = 150
SOURCES = Path(__file__).parent / "generated"
NO_HOOKS = "post_hooks: []\n"
"""The generator would format its output and check it with ruff."""


async def run(*command: str, folder: Path, seconds: float = 50) -> str:
    """Run a command to its end; what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(seconds):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def save_document(server: Live, folder: Path) -> None:
    (folder / "openapi.json").write_bytes((await server.http.get("/openapi.json")).content)


async def test_a_python_client_uploads_posts_and_reads(
    server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save_document(server, tmp_path)
    (tmp_path / "config.yaml").write_text(NO_HOOKS)
    command = (sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none", "--config", "config.yaml")
    printed = await run(*command, "--path", "openapi.json", "--output-path", "generated_client", folder=tmp_path)
    assert "Warning" not in printed, printed
    assert compileall.compile_dir(tmp_path / "generated_client", quiet=1)
    monkeypatch.syspath_prepend(tmp_path)

    def load(name: str) -> Any:
        return importlib.import_module(f"generated_client.{name}")

    models = load("models")
    client = load("client").AuthenticatedClient(server.url, KEY, raise_on_unexpected_status=True)
    agent = next(each for each in await load("api.agents.list_agents").asyncio(client=client) if each.is_default)
    thread = await load("api.threads.create_thread").asyncio(
        agent.id, client=client, body=models.ThreadCreate(title="Generated")
    )
    form = models.UploadForm(files=[load("types").File(io.BytesIO(b"some text"), "note.txt", "text/plain")])
    [attachment] = await load("api.attachments.upload").asyncio(agent.id, thread.id, client=client, body=form)
    body = models.MessageCreate(content="Hello", attachments=[models.AttachmentRef(attachment.id)])
    posted = await load("api.messages.post_message").asyncio(agent.id, thread.id, client=client, body=body)
    assert posted.metadata.run.status == "completed"
    read = await load("api.threads.get_thread").asyncio(agent.id, thread.id, client=client, message_limit=10)
    assert [message.id for message in read.messages][-1] == posted.id
    assert read.messages[0].attachments[0].filename == "note.txt"
    file = await load("api.attachments.download").asyncio(agent.id, thread.id, attachment.id, client=client)
    assert file.payload.read() == b"some text"
    missing = await load("api.agents.get_agent").asyncio(str(thread.id), client=client)
    assert missing.code == "agent_not_found"


@pytest.fixture
async def npm_folder(tmp_path: Path) -> Path:
    """A folder with the generator and our script, and its npm packages installed."""
    if not shutil.which("npm"):
        missing("npm is not installed")
    shutil.copytree(SOURCES, tmp_path, dirs_exist_ok=True)
    command = ("npm", "install", "--prefer-offline", "--no-package-lock", "--no-audit", "--no-fund", "--silent")
    await run(*command, folder=tmp_path, seconds=INSTALL_SECONDS)
    return tmp_path


async def test_a_typescript_client_uploads_posts_and_reads(server: Live, npm_folder: Path) -> None:
    await save_document(server, npm_folder)
    await run("node", "generate.mjs", folder=npm_folder)
    options = ("--strict", "--module", "nodenext", "--target", "es2022", "--lib", "es2023,dom", "--skipLibCheck")
    await run("node", "node_modules/typescript/bin/tsc", *options, "client.ts", folder=npm_folder)
    found = json.loads(await run("node", "client.js", server.url, KEY, folder=npm_folder))
    assert found == {
        "status": "completed",
        "last": True,
        "attached": "note.txt",
        "file": "some text",
        "missing": "agent_not_found",
    }
