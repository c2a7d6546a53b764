"""Pages at free ports, and calls of their HTTP interface."""

import json
import socket

import httpx

from hf_genmod.demo.model import DemoModel
from hf_genmod.demo.server import serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """The page of one or several checkpoints in this process."""

    def __init__(self, *folders):
        self.model = DemoModel(folders[0], folders[1:])
        self.page = serve(self.model, free_port())
        self.url = self.page.local_url.rstrip("/")
        self.settings = [*self.model.settings.values()]

    def data(self, picture=None, **changed) -> list:
        """What the page sends: the values of all settings, and a picture."""
        return [changed.get(s.name, s.default) for s in self.settings] + [picture]

    def call(self, data, client=httpx) -> list[tuple]:
        """All that the page answers to values, (event, data)."""
        response = client.post(f"{self.url}/gradio_api/call/draw", json={"data": data}, timeout=60)
        return self.events(response.json()["event_id"], client)

    def events(self, event_id: str, client=httpx) -> list[tuple]:
        """All (event, data) of a call."""
        answer = client.get(f"{self.url}/gradio_api/call/draw/{event_id}", timeout=120)
        lines = answer.text.splitlines()
        events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        values = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        return [*zip(events, values, strict=True)]

    def drawn(self, picture=None, **changed) -> tuple[str, str]:
        """The HTML and the Python that the page ends with."""
        event, (html, code) = self.call(self.data(picture, **changed))[-1]
        assert event == "complete"
        return html, code
