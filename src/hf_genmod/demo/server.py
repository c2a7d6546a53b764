"""Serves the page of a model on this machine."""

import logging
import os
import re
import socket
from pathlib import Path

import gradio as gr

from hf_genmod.demo.model import DemoModel
from hf_genmod.demo.page import FILES, build

LOG = logging.getLogger(__name__)
MOST_WAITING = 32  # visitors
LARGEST_REQUEST = 40 * 2**20  # bytes, of which a picture and a mask are most
# What a page asks for; Gradio would answer more, such as requests for files.
ASKED = re.compile(
    r"/(|config|gradio\.js|theme\.css|favicon\.ico|favicon\.png|manifest\.json|robots\.txt)"
    r"|/(assets|static|svelte)/[\w./@-]*"
    r"|/gradio_api/(info|startup-events|theme\.css|heartbeat/\w+|queue/join|queue/data|call/draw(/\w+)?|cancel|reset"
    r"|app_id|login_check|user)/?"
)


class Gate:
    """Lets through what the page asks for, of up to 40 MB, and tells browsers to ask no other server."""

    def __init__(self, app, policy: bool = True):
        self.app, self.policy = app, policy

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not ASKED.fullmatch(scope["path"]) or ".." in scope["path"]:
            return await _answer(send, 404)
        if not length.isdigit() or len(length) > 12 or int(length) > LARGEST_REQUEST:
            return await _answer(send, 413)
        received, has_started = 0, False

        async def counted():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > LARGEST_REQUEST:  # of a request that does not say how long it is
                return {"type": "http.disconnect"}
            return message

        async def with_policy(message):
            nonlocal has_started
            has_started = True
            if self.policy and message["type"] == "http.response.start":
                own = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
                message = message | {"headers": [*message["headers"], (b"content-security-policy", own.encode())]}
            await send(message)

        try:
            return await self.app(scope, counted, with_policy)
        except Exception as error:  # of a request that no page sends, such as for an event that is not there
            LOG.warning("a request to %s failed (%s)", scope["path"], type(error).__name__)
            if not has_started:
                await _answer(send, 400)


async def _answer(send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send(
        {"type": "http.response.body", "body": {400: b"not understood", 404: b"not here", 413: b"too large"}[status]}
    )


def check_port(host: str, port: int) -> None:
    """Raises `ValueError` if a port is not free."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port: {port} is not within 1 ... 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port: {port} is not free ({error.strerror}); give another by --port") from error


def serve(model: DemoModel, port: int = 7860, share: bool = False, host: str = "127.0.0.1") -> gr.Blocks:
    """
    Serves the page of a model, on this machine alone unless `share`, and returns at once: `page.block_thread()` goes
    on until Ctrl-C, and `page.close()` ends the page.

    Args:
        model ([`DemoModel`]): The model.
        port (`int`): Where, at 127.0.0.1.
        share (`bool`): Whether Gradio also makes a link that anybody can open for a week.
        host (`str`): The address to listen at; a Space takes "0.0.0.0".

    Raises:
        ValueError: If the port is not free.
    """
    check_port(host, port)
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    page = build(model)
    page.queue(max_size=MOST_WAITING)
    is_space = "SPACE_ID" in os.environ
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, show_error=False,
        ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, run_history=False, footer_links=[],
        allowed_paths=[], max_file_size=1, theme=theme, css=_text("page.css"),
        head=f"<script>{_text('page.js')}</script>",
        app_kwargs={"middleware": [_middleware(policy=not (is_space or share))]},
    )  # fmt: skip
    return page


def _middleware(**options):
    from starlette.middleware import Middleware

    return Middleware(Gate, **options)


def _text(name: str) -> str:
    return Path(FILES, name).read_text(encoding="utf-8")
