"""Files on a disk, at an address or on the Hub, of which parts are read."""

import io
import os
import re

import fsspec
from datasets.utils.file_utils import xopen
from huggingface_hub.utils import http_backoff, http_stream_backoff

_HTTP = re.compile(r"https?://")


def is_address(path: str) -> bool:
    """Whether a path is one of HTTP."""
    return _HTTP.match(path) is not None


def ending_of(path: str) -> str:
    """The ending of the name of a file, in lower case, without what follows it in an address."""
    return os.path.splitext(re.split(r"[?#]", path)[0] if is_address(path) else path)[1].lower()


def opened(path: str) -> io.BufferedIOBase:
    """A file for reading. What a server does not send is asked for again for a while."""
    return io.BufferedReader(_AtAddress(path), 2**20) if is_address(path) else xopen(path, "rb")


def version(path: str) -> str:
    """A text that changes when the file does."""
    if is_address(path):
        return _AtAddress(path).version
    file_system, place = fsspec.core.url_to_fs(path)
    return file_system.ukey(place)


class _AtAddress(io.RawIOBase):
    """A file at an address of HTTP. (That of fsspec needs another client of HTTP.)"""

    def __init__(self, address: str):
        self._address, self._place = address, 0
        with http_stream_backoff("GET", address, **_part(0, 1)) as response:  # as a server may send the whole file
            _check(response)
            self._size = int(response.headers["Content-Range"].rpartition("/")[2])
            self.version = f"{self._size} {response.headers.get('ETag')} {response.headers.get('Last-Modified')}"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        self._place = place + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        response = http_backoff("GET", self._address, **_part(self._place, stop))
        _check(response)
        content = response.content
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def _part(start: int, stop: int) -> dict:
    """The arguments of a request for the bytes from `start` to before `stop`."""
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    return {"headers": headers, "follow_redirects": True}


def _check(response) -> None:
    if response.status_code != 206:
        what = "it sends only whole files" if response.status_code == 200 else response.reason_phrase
        raise OSError(f"the server answers {response.status_code}: {what}")
