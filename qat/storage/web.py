"""Files at http(s) addresses, read from any byte on, also from servers that cannot skip.

Looks like an fsspec file system as far as archives need one; fsspec's own needs two more packages.
"""

import http.client
import io
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

TIMEOUT_SECONDS = 60
TRIES = 3  # in a row, without one byte got
WAIT_SECONDS = 1
SKIP_BYTES = 1 << 20
ABSENT = (403, 404, 410)  # object stores answer 403 for what is not there
NO_HEAD = (400, 405, 501)
URL_SIGNS = "%/:=&?~#+!$,;'@()*[]"


class WebFiles:
    """What a web server has."""

    def exists(self, url: str) -> bool:
        """Return whether there is a file."""
        try:
            self.size(url)
        except FileNotFoundError:
            return False
        return True

    def size(self, url: str) -> int:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If the server does not tell.
        """
        try:
            with request(url, method="HEAD") as answer:
                stated = answer.headers.get("Content-Length")
        except urllib.error.HTTPError as error:
            if error.code not in NO_HEAD:
                raise
            with request(url) as answer:
                stated = answer.headers.get("Content-Length")
        if stated is None:
            raise ValueError(f"{url}: the server does not tell the size; fetch it by other means")
        return int(stated)

    def open(self, url: str, mode: str = "rb") -> "WebFile":
        """Open a file for reading."""
        if mode != "rb":
            raise ValueError(f"{url} can only be read; push to a folder or a bucket")
        return WebFile(url, self.size(url))

    def cat_file(self, url: str) -> bytes:
        """Return a small file's content."""
        with self.open(url) as file:
            return b"".join(iter(file.read, b""))


class WebFile(io.RawIOBase):
    """One file, read forwards; a broken connection is taken up again where it broke."""

    def __init__(self, url: str, num_bytes: int) -> None:
        self.url, self.num_bytes = url, num_bytes
        self._at = 0
        self._answer: Any = None

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted from the start."""
        if whence != io.SEEK_SET:
            raise ValueError(f"{self.url} is read from its start only")
        self._hang_up()
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes: fewer at the end, or before an error that the next call raises."""
        left = self.num_bytes - self._at
        wanted = left if size < 0 else min(size, left)
        parts: list[bytes] = []
        tries = 0
        while wanted > 0:
            part, error = self._read_some(wanted)
            parts.append(part)
            wanted -= len(part)
            tries = 0 if part else tries + 1
            if tries == TRIES and any(parts):
                break  # what has come is worth keeping
            if tries == TRIES:
                why = error or "the connection closed early"
                raise OSError(f"{self.url}: {why}; run the same command again and it goes on")
            time.sleep(WAIT_SECONDS * tries)
        return b"".join(parts)

    def _read_some(self, wanted: int) -> tuple[bytes, Exception | None]:
        """Return what one attempt gives, and why it gave nothing."""
        try:
            if self._answer is None:
                self._answer = self._open_at(self._at)
            part = self._answer.read(wanted)
        except (OSError, http.client.HTTPException) as error:
            self._hang_up()
            return b"", error
        self._at += len(part)
        if len(part) < wanted:
            self._hang_up()
        return part, None

    def _open_at(self, offset: int) -> Any:
        """Return an answer that stands at a byte, skipped to where the server sends all."""
        answer = request(self.url, headers={"Range": f"bytes={offset}-"} if offset else {})
        is_part = answer.status == http.client.PARTIAL_CONTENT
        skip = 0 if is_part else offset
        while skip:
            skipped = len(answer.read(min(skip, SKIP_BYTES)))
            if not skipped:
                raise ConnectionError("the connection closed early")
            skip -= skipped
        return answer

    def _hang_up(self) -> None:
        """Leave the connection."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def close(self) -> None:
        """Leave the connection for good."""
        self._hang_up()
        super().close()


def request(url: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
    """Return a server's answer.

    Raises:
        FileNotFoundError: If the server has no such file.
        ConnectionError: If the server cannot be reached.
        HTTPError: If it answers with another error.
    """
    written = urllib.parse.quote(url, safe=URL_SIGNS)  # a name with a space in it is no URL
    asked = urllib.request.Request(written, method=method, headers=headers or {})
    try:
        return urllib.request.urlopen(asked, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in ABSENT:
            raise FileNotFoundError(f"{url} does not exist; check its name") from error
        error.msg = f"{error.msg} ({url})"
        raise
    except urllib.error.URLError as error:
        raise ConnectionError(
            f"{url} cannot be reached ({error.reason}); check the address and the network"
        ) from error
