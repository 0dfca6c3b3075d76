"""Documents to extract text from: made by real programs (tests/files), made here, and one that never ends."""

from __future__ import annotations

import asyncio
import os
import time
from email.message import EmailMessage
from email.policy import SMTP
from io import BytesIO
from pathlib import Path

from PIL import Image

from agent_chat.server.files.extraction import Extracted, Extractor

FILES = Path(__file__).parents[1] / "files"


DANISH = "Fyrmesteren på Ærøskøbing talte 417 hejrer ved caféen.\n\n    indrykket\tlinje\n"


CSV = "Berth,Boat,Length\n7,Marigold,12.5\n8,Østerlund,9.0\n"


CODE = "def berth(n: int) -> str:\n    if n == 7:\n        return 'Ærø'\n\n    return 'café'\n"


ORG = "an organization"


def image(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    out = BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(out, kind)
    return out.getvalue()


def mail(html_only: bool) -> bytes:
    message = EmailMessage(policy=SMTP)
    message["From"] = "Keeper <keeper@harbour.example>"
    message["To"] = "office@harbour.example"
    message["Subject"] = "Heron count at Ærøskøbing"
    message["Date"] = "Tue, 10 Feb 2026 08:30:00 +0100"
    if html_only:
        message.set_content("<h1>Herons</h1><p>We counted <b>417</b>.</p><p>At the café.</p>", subtype="html")
    else:
        message.set_content("Good morning,\n\n> how many?\n417, at the café.\n", charset="iso-8859-1", cte="8bit")
        message.add_alternative("<p>Good morning</p>", subtype="html")
    message.add_attachment(CSV.encode(), maintype="text", subtype="csv", filename="berths.csv")
    return bytes(message)


class Hanging:
    """An extraction in progress, of a file that never ends: a pipe without a writer."""

    def __init__(self, extractor: Extractor, folder: Path, organization: str = ORG) -> None:
        self._organization = organization
        self._path = folder / f"pipe-{time.monotonic_ns()}"
        os.mkfifo(self._path)
        self._extractor = extractor

    async def __aenter__(self) -> asyncio.Task[Extracted]:
        task = asyncio.create_task(self._extractor.extract(self._organization, self._path, "pipe.txt", None))
        self._end = await asyncio.to_thread(os.open, self._path, os.O_WRONLY)  # returns when the worker has opened it
        return task

    async def __aexit__(self, *_: object) -> None:
        os.close(self._end)
