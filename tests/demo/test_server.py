"""The page over HTTP: what it answers to visitors, to several at once, and to whatever else is sent."""

import json
import random
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs the extra [demo]")

from demo_cases import picture, pixels_in, sent
from pages import free_port

from hf_genmod.demo.server import ASKED, LARGEST_REQUEST, check_port

QUICK = {"steps": 3, "number": 2}


def test_the_page_is_there_and_asks_no_other_server(server):
    page = httpx.get(f"{server('guided').url}/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    config = httpx.get(f"{server('guided').url}/config").json()
    assert config["analytics_enabled"] is False and config["title"].endswith("hf_genmod")
    assert "googleapis" not in json.dumps(config) + page.text


def test_it_listens_on_this_machine_alone(server):
    port = int(server("guided").url.rpartition(":")[2])
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {
        "127.0.0.1"
    }:
        with socket.socket() as probe:
            probe.settimeout(5)
            assert probe.connect_ex((address, port)) != 0


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: {port} is not free .*; give another by --port"):
            check_port("127.0.0.1", port)
    with pytest.raises(ValueError, match="port: 99999 is not within 1 ... 65535"):
        check_port("127.0.0.1", 99999)
    check_port("127.0.0.1", free_port())


def test_visitors_at_once_get_their_own_images(server):
    page = server("guided")
    asked = [{"seed": 10 * i, "class_1": name, **QUICK} for i, name in enumerate(["cat", "dog", "lizard", "dog"])]
    alone = [page.drawn(**changed) for changed in asked]
    with ThreadPoolExecutor(4) as visitors:
        together = list(visitors.map(lambda changed: page.drawn(**changed), asked))
    for (html, code), (expected, expected_code) in zip(together, alone, strict=True):
        images, others = pixels_in(html), pixels_in(expected)
        assert code == expected_code and list(images) == list(others) and len(images) == 2
        assert all(np.array_equal(images[name], others[name]) for name in images)
    assert len({code for _, code in together}) == 4


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"class_1": "dgo"}, "class: 'dgo' is not there; did you mean dog?"),
        ({"steps": 10**9}, "steps: 1000000000 is not a whole number from 1 to 250"),
        ({"do": "edit"}, "picture: there is none; choose a file, or drop one"),
        ({"do": "edit", "picture": {"picture": "data:image/png;base64,AAAA"}}, "picture: the file is no picture that"),
        ({"class_1": "cat", "weight_1": 0}, "class_labels: {'cat': 0.0} gives no label a weight"),
        (
            {"steps": 249, "sampler": "as saved", "guidance_scale": "x"},
            "γ, guidance scale: 'x' is not a number",
        ),
    ],
)
def test_a_mistake_is_a_sentence_on_the_page(changed, message, server):
    import html

    shown, code = server("guided").drawn(**changed)
    assert code == "" and html.unescape(shown).startswith(f'<p class="genmod-problem" role="alert">{message}')


def test_markup_in_labels_and_prompts_stays_text(server):
    page = server("marked")
    html, code = page.drawn(class_1="<script>alert(1)</script>", **QUICK)
    assert "<script" not in html and "class_labels='<script>alert(1)</script>'" in code
    html, _ = page.drawn(class_1="<img src=x onerror=alert(1)>")
    assert "&lt;img" in html and "<img" not in html
    html, code = server("text").drawn(prompt="</script><b>a cat", **QUICK)
    assert "<b>" not in html and "prompt='</script><b>a cat'" in code


FILES = ["/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd",
         "/static/../../../etc/passwd",
         "/assets/%2e%2e/%2e%2e/etc/passwd", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/stream/a",
         "/custom_component/a/b/c/d", "/monitoring", "/docs", "/openapi.json", "/gradio_api/openapi.json"]  # fmt: skip


def answer_to(page, head: str) -> bytes:
    """The answer to a request as it is written, which clients would change or refuse to send."""
    with socket.create_connection(page.url.removeprefix("http://").split(":")) as connection:
        connection.sendall(f"{head}\r\nHost: x\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("path", FILES)
def test_no_file_is_served(path, server):
    answer = answer_to(server("guided"), f"GET {path} HTTP/1.0")
    assert b" 404 " in answer.splitlines()[0] and b"root:" not in answer


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/component_server", "/gradio_api/run/draw", "/login"]
)
def test_no_file_is_taken(path, server):
    assert httpx.post(f"{server('guided').url}{path}", files={"files": b"x"}).status_code == 404


def test_a_request_that_is_too_large_is_refused(server):
    url = f"{server('guided').url}/gradio_api/call/draw"
    head = f"POST /gradio_api/call/draw HTTP/1.0\r\nContent-Length: {LARGEST_REQUEST + 1}"
    assert b" 413 " in answer_to(server("guided"), head).splitlines()[0]
    with pytest.raises(httpx.HTTPError):
        httpx.post(url, content=(b" " * 2**20 for _ in range(50)), timeout=60).raise_for_status()
    assert server("guided").drawn(**QUICK)[1]


ODD = [None, True, -1, 0, 1e308, 10**30, "", "x" * 3000, "/etc/passwd", "../../etc/passwd",
       "<script>alert(1)</script>", "\x00", "🦎" * 100, [], [1, [2]], {},
       {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
       {"path": "http://127.0.0.1:1/x.png", "url": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}},
       {"picture": "/etc/passwd"}, {"picture": "data:image/png;base64,AAAA", "mask": 7}, {"picture": ["x"]},
       {"__type__": "update"}, "data:image/svg+xml;base64,PHN2Zy8+", "NaN", "Infinity"]  # fmt: skip


def malformed(page, rng):
    """The body of a request with some values that nobody should send."""
    names = [setting.name for setting in page.settings]
    quick = {"steps": 1, "number": 1, "do": rng.choice(page.model.tabs)}
    data = page.data(rng.choice(ODD), **quick | {rng.choice(names): rng.choice(ODD) for _ in range(rng.randint(1, 3))})
    kind = rng.random()
    if kind < 0.1:
        return {"data": data[: rng.randrange(len(data))]}
    if kind < 0.15:
        return {"data": [*data, *data]}
    if kind < 0.2:
        return rng.choice(
            [{}, {"data": None}, {"data": "x"}, [], "x", {"data": data, "session_hash": rng.choice(ODD)}]
        )
    return {"data": data}


def send_malformed(page, count, capfd):
    rng, url = random.Random(0), f"{page.url}/gradio_api/call/draw"
    kinds = set()
    with httpx.Client(timeout=60, headers={"content-type": "application/json"}) as client:
        for _ in range(count):
            response = client.post(url, content=json.dumps(malformed(page, rng)))
            if response.status_code != 200:
                kinds.add(response.status_code)
                assert response.headers["content-type"] in ("application/json", "text/plain")
                assert not any(word in response.text for word in FORBIDDEN), response.text
                continue
            event, data = page.events(response.json()["event_id"], client)[-1]
            kinds.add(event)
            assert not any(word in json.dumps(data) for word in FORBIDDEN), data
            assert event != "complete" or not re.search("<(script|img src=x)", data[0])
    assert {"complete", "error", 422} <= kinds <= {"complete", "error", 400, 413, 422}
    # Gradio prints one of its own at the terminal for a visitor who has left before the answer.
    assert "src/hf_genmod" not in capfd.readouterr().err
    html, code = page.drawn(**{**QUICK, "number": 1}, picture=sent())
    assert code and "<img" in html


FORBIDDEN = ("Traceback", "root:", "site-packages", "hf_genmod/demo")


@pytest.mark.parametrize("kind", ["text"])
def test_malformed_requests_are_answered_and_the_page_goes_on(kind, server, capfd):
    send_malformed(server(kind), 150, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["guided", "classifier guided", "text", "upsampler", "vae"])
def test_a_thousand_malformed_requests(kind, server, capfd):
    send_malformed(server(kind), 1000, capfd)


def test_malformed_events_of_the_page_itself_are_answered(server, capfd):
    """Those that only its own script sends, by the way that it takes."""
    page, rng = server("vae"), random.Random(0)
    functions = httpx.get(f"{page.url}/config").json()["dependencies"]
    for function in [*functions, {"id": 999, "inputs": []}, {"id": -1, "inputs": []}]:
        for _ in range(5):
            data = [rng.choice(ODD) for _ in function["inputs"]]
            sent = {"data": data, "fn_index": function["id"], "session_hash": "abcdef", "event_data": rng.choice(ODD)}
            assert httpx.post(f"{page.url}/gradio_api/queue/join", json=sent).status_code in (200, 400, 404, 422)
    with httpx.stream("GET", f"{page.url}/gradio_api/queue/data?session_hash=abcdef", timeout=60) as answer:
        assert not any(word in answer.read().decode() for word in FORBIDDEN)
    assert "Traceback" not in capfd.readouterr().err and page.drawn(do="latents")[1]


def test_a_picture_is_enlarged_over_http(server):
    html, code = server("upsampler").drawn(sent(picture((8, 4))), steps=3, longest=8)
    shapes = {name: pixels.shape for name, pixels in pixels_in(html).items()}
    assert shapes == {"given.png": (4, 8, 3), "bicubic.png": (8, 16, 3), "image-0.png": (8, 16, 3)} and code


@pytest.mark.parametrize(
    "path", ["/", "/config", "/gradio_api/queue/join", "/gradio_api/call/draw/a1", "/assets/a-b.js"]
)
def test_what_the_page_needs_is_let_through(path):
    assert ASKED.fullmatch(path)
