"""The wheel, installed in an environment of its own next to a top-level package `agents`, used in an empty folder.

Usually the environment also sees the packages of the one that runs the tests, and `agents` is a stand-in: this takes a
few seconds. With CHAT_TEST_NEW_ENVIRONMENT=1, as in .ci/run, pip installs everything that the wheel requires, and
`openai-agents`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.support.installed import post_question_with_tool, report, started, write_probe
from tests.support.services import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "agents", "stores", "web_demo")
SOURCES = (*PACKAGES, ".src", "README.md", "LICENSE", "pyproject.toml")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info", "node_modules")
BUILD = "from setuptools import build_meta; print(build_meta.build_{}('dist'))"
IS_NEW = os.environ.get("CHAT_TEST_NEW_ENVIRONMENT") == "1"
"""Whether the environment has packages of its own only, and the real `openai-agents`."""

CHAT = """
import asyncio, json, sys
from importlib.metadata import version
from websockets.asyncio.client import connect


async def main(url, key):
    async with connect(url, additional_headers={"Authorization": f"Bearer {key}"}) as socket:
        message = {"content": "What time is it in Tokyo?"}
        await socket.send(json.dumps({"type": "message.create", "request_id": "1", "message": message}))
        types = []
        async with asyncio.timeout(30):
            while "run.completed" not in types:
                types.append(json.loads(await socket.recv())["type"])
    print(json.dumps({"websockets": version("websockets"), "types": types}))


asyncio.run(main(*sys.argv[1:]))
"""
"""A client on the WebSocket, run with the `websockets` of the new environment."""


class Environment:
    """A virtual environment with the wheel and a top-level package `agents`.

    Attributes:
        python: its interpreter.
        command: its `agent-chat`.
        wheel: the installed wheel, built from the source distribution.
        clone: the copy of the sources that both were built from.
    """

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "clone"
        self.python = folder / "venv" / "bin" / "python"
        self.command = folder / "venv" / "bin" / "agent-chat"
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.clone / name, symlinks=True, ignore=NOT_SOURCES)
            else:
                shutil.copy(source, self.clone / name)
        self.wheel = _build(self.clone)
        _run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"))
        packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        if IS_NEW:
            self.pip("install", "-q", str(self.wheel), "openai-agents>=0.24")
        else:
            # A .pth file in that folder, such as that of our editable install, is not read: it is no site folder.
            (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))
            (packages / "agents").mkdir()
            (packages / "agents" / "__init__.py").write_text('"""In place of OpenAI\'s package."""\n')
            self.pip("install", "-q", "--no-deps", "--no-index", str(self.wheel))

    def run(self, *arguments: str) -> str:
        """Run the interpreter; what it printed."""
        return _run(str(self.python), *arguments)

    def pip(self, *arguments: str) -> None:
        _run(sys.executable, "-m", "pip", "--python", str(self.python), *arguments)

    def has(self, file: str) -> bool:
        """Whether this file is part of the environment."""
        return Path(file).resolve().is_relative_to(self.python.parents[1].resolve())


def _run(*command: str, cwd: Path | None = None) -> str:
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def _build(clone: Path) -> Path:
    """Build the source distribution, and the wheel from what it contains."""
    sdist = clone / "dist" / _run(sys.executable, "-c", BUILD.format("sdist"), cwd=clone).split()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(clone / "dist", filter="data")
    unpacked = clone / "dist" / sdist.name.removesuffix(".tar.gz")
    return unpacked / "dist" / _run(sys.executable, "-c", BUILD.format("wheel"), cwd=unpacked).split()[-1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the agent kind `probe`."""
    folder = tmp_path_factory.mktemp("probe")
    write_probe(folder)
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, in which the installed server runs."""
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
async def installed(
    environment: Environment, empty: Path, probe: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server that the environment's `agent-chat` runs."""
    data = tmp_path_factory.mktemp("data")
    async with started([environment.command], empty, data, PYTHONPATH=str(probe)) as client:
        yield client


def test_the_wheel_holds_the_four_packages_whole_and_nothing_else(environment: Environment) -> None:
    tree = {
        f"agent_chat/{path.relative_to(environment.clone)}"
        for name in PACKAGES
        for path in (environment.clone / name).rglob("*")
        if path.is_file()
    }
    names = {name for name in zipfile.ZipFile(environment.wheel).namelist() if ".dist-info/" not in name}
    assert names == tree | {"agent_chat/__init__.py", "agent_chat/py.typed"}


async def test_it_runs_next_to_another_package_agents_from_an_empty_folder(
    environment: Environment, empty: Path, installed: httpx.AsyncClient
) -> None:
    environment.pip("check")
    found = await report(installed)
    assert environment.has(found.agents)
    assert found.loaded_twice == []
    assert str(ROOT / ".src") not in found.path
    answer = await post_question_with_tool(installed)
    assert answer["tool_calls"][0]["tool_name"] == "current_time"
    assert answer["metadata"]["run"]["status"] == "completed"
    spoken = await _websocket(environment, installed)
    if IS_NEW:
        assert int(spoken.websockets.split(".")[0]) < 17, "openai-agents 0.24 excludes websockets 17"
    assert {"ack", "message.delta", "tool_call.completed", "run.completed"} <= set(spoken.types)
    assert os.listdir(empty) == []


class Spoken(msgspec.Struct, frozen=True):
    """What the WebSocket client prints: its version of `websockets`, the types of the frames it received."""

    websockets: str
    types: list[str]


async def _websocket(environment: Environment, client: httpx.AsyncClient) -> Spoken:
    threads = "/api/v1/chat/default/threads"
    thread = (await client.post(threads, json={})).raise_for_status().json()["id"]
    url = f"{str(client.base_url).rstrip('/')}{threads}/{thread}/ws".replace("http://", "ws://", 1)
    key = client.headers["Authorization"].removeprefix("Bearer ")
    return msgspec.json.decode(await asyncio.to_thread(environment.run, "-c", CHAT, url, key), type=Spoken)


async def test_a_clone_does_not_hide_another_package_agents(
    environment: Environment, probe: Path, tmp_path: Path
) -> None:
    """`python -m server` in a clone runs the clone's code, also where a wheel is installed."""
    command = [str(environment.python), "-m", "server"]
    async with started(command, environment.clone, tmp_path / "data", PYTHONPATH=str(probe)) as client:
        found = await report(client)
    assert environment.has(found.agents)
    assert found.loaded_twice == []
    assert found.path[0] == str(environment.clone / ".src")


@pytest.mark.browser
async def test_the_installed_page_sends_a_message_and_shows_the_answer(installed: httpx.AsyncClient) -> None:
    chromium = shutil.which("chromium") or missing("no chromium on PATH")
    async_api = pytest.importorskip("playwright.async_api")
    async with (
        async_api.async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]) as browser,
    ):
        await post_question_with_tool(installed)
        page = await browser.new_page()
        key = installed.headers["Authorization"].removeprefix("Bearer ")
        await page.goto(f"{installed.base_url}?key={key}")
        await page.get_by_role("button", name="What time is it in Tokyo?", exact=True).click()
        await page.locator("article.assistant[data-status=completed]").wait_for()
        assert await page.locator(".tool[data-status=done]").count() == 1


def test_an_agent_in_another_package_is_checked_against_our_types(environment: Environment, tmp_path: Path) -> None:
    """The wheel's `py.typed` makes mypy report a wrong argument."""
    module = tmp_path / "wrong.py"
    module.write_text("from agent_chat.agents import Text\n\nText(1)\n")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(environment.python)]
    command = [*mypy, "--config-file=", f"--cache-dir={tmp_path / 'cache'}", str(module)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'Argument 1 to "Text" has incompatible type "int"; expected "str"' in found.stdout
    assert "Found 1 error" in found.stdout
