"""A browser opens the page and uses it as a visitor does."""

import re
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs the extra [demo]")

from browser import chromium
from demo_cases import picture, pixels_in

DRAWN = "#genmod-out figure a[download]"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


class Visit:
    """A tab of the browser at a page, and what went wrong in it."""

    def __init__(self, browser, server, query=""):
        self.server, self.wrong = server, []
        self.tab = browser.new_context().new_page()
        self.tab.set_default_timeout(60_000)
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.tab.on("request", self._note)
        self.tab.goto(f"{server.url}/{query}")
        self.tab.locator("#genmod-go").wait_for()

    def _note(self, request):
        asked = urlsplit(request.url)
        if asked.scheme not in ("data", "blob") and f"http://{asked.netloc}" != self.server.url:
            self.wrong.append(f"asked {request.url}")

    @property
    def query(self):
        return urlsplit(self.tab.url).query

    def settle(self):
        """Waits until all steps of what is drawn have been shown."""
        self.tab.wait_for_function(
            "() => { const out = document.querySelector('#genmod-out');"
            " return out && out.querySelector('figure, .genmod-problem') && !/step/.test(out.innerText)"
            " || out && out.querySelector('.genmod-trajectory'); }"
        )

    def draw(self):
        """Presses "Draw"; the HTML of what is drawn then."""
        self.tab.evaluate(
            "() => document.querySelectorAll('#genmod-out figure, .genmod-problem').forEach(x => x.remove())"
        )
        self.tab.locator("#genmod-go").click()
        self.settle()
        return self.html

    @property
    def html(self):
        return self.tab.locator("#genmod-out").inner_html()

    def set(self, name, value):
        field = self.tab.locator(f"#genmod-{name} input[type=number], #genmod-{name} textarea").first
        field.fill(str(value))
        field.press("Tab")

    def choose(self, name, value):
        field = self.tab.locator(f"#genmod-{name} input").first
        field.click()
        self.tab.get_by_role("option", name=value, exact=True).click()

    def task(self, words):
        self.tab.locator("#genmod-do").get_by_text(words).click()

    def close(self):
        assert self.wrong == []
        self.tab.context.close()


@pytest.fixture
def visit(browser, server):
    visits = []

    def start(*kinds, query=""):
        visits.append(Visit(browser, server(*kinds), query))
        return visits[-1]

    yield start
    for one in visits:
        one.close()


def same_as(html, server, **values):
    """Whether a browser shows what the page draws for these values."""
    expected, shown = pixels_in(server.drawn(**values)[0]), pixels_in(html)
    return list(shown) == list(expected) and all(np.array_equal(shown[name], expected[name]) for name in shown)


def test_a_visitor_draws_and_another_follows_the_link(visit, server):
    first = visit("guided")
    first.settle()
    assert same_as(first.html, server("guided"), number=4) and first.query == ""
    first.choose("class_1", "dog")
    first.set("number", 2)
    first.set("steps", 5)
    first.set("seed", 7)
    html = first.draw()
    assert same_as(html, server("guided"), class_1="dog", number=2, steps=5, seed=7)
    assert first.query == "class_1=dog&steps=5&seed=7&number=2"
    assert "class_labels='dog'" in first.tab.locator("#genmod-code").inner_text()
    second = visit("guided", query=f"?{first.query}")
    second.settle()
    assert same_as(second.html, server("guided"), class_1="dog", number=2, steps=5, seed=7)
    assert second.query == first.query
    first.tab.locator("#genmod-another").click()
    first.tab.wait_for_function("() => /seed=(?!7&)/.test(location.search)")
    seed = int(re.search(r"seed=(\d+)", first.query)[1])
    first.tab.get_by_text(f"seed {seed + 1}").wait_for()
    first.settle()
    assert same_as(first.html, server("guided"), class_1="dog", number=2, steps=5, seed=seed)


def test_a_link_with_values_that_do_not_fit_says_so(visit):
    page = visit("guided", query="?class_1=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E&steps=9999&number=1&seed=2")
    page.settle()
    problems = page.tab.locator(".genmod-problem").all_inner_texts()
    assert problems[0].startswith("class: '<img src=x onerror=alert(1)>' is not there; it is one of cat, dog")
    assert problems[1] == "steps: '9999' is not a whole number from 1 to 250" and page.query == "seed=2&number=1"


@pytest.mark.slow
def test_labels_with_markup_are_text(visit):
    page = visit("marked", query="?steps=2&number=1")
    page.settle()
    page.choose("class_1", "<script>alert(1)</script>")
    assert len(pixels_in(page.draw())) == 1
    assert page.tab.locator("#genmod-out script, #genmod-out b").count() == 0


def give(page, tmp_path, image):
    image.save(tmp_path / "mine.png")
    page.tab.locator(".genmod-file input").set_input_files(tmp_path / "mine.png")
    page.tab.locator('.genmod-give[data-ready="yes"]').wait_for()


def test_a_visitor_uploads_a_picture_and_brushes_a_part(visit, tmp_path):
    page = visit("guided", query="?steps=3&number=1")
    page.task("variations")
    page.tab.locator(".genmod-file").wait_for()
    give(page, tmp_path, picture((8, 8)))
    varied = pixels_in(page.draw())
    assert np.array_equal(varied["given.png"], np.asarray(picture((8, 8)))) and "mask.png" not in varied
    page.tab.locator(".genmod-brush").fill("2")
    canvas = page.tab.locator(".genmod-paint")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.tab.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=5)
    page.tab.mouse.up()
    images = pixels_in(page.draw())
    mask, given, drawn = images.pop("mask.png"), images.pop("given.png"), images.popitem()[1]
    assert set(np.argwhere(mask)[:, 1]) == {1, 2} and set(np.argwhere(mask)[:, 0]) == {1, 2, 3, 4}
    assert np.array_equal(drawn[mask == 0], given[mask == 0]) and not np.array_equal(drawn, given)
    page.tab.get_by_text("clear the paint").click()
    assert "mask.png" not in pixels_in(page.draw())


@pytest.mark.slow
def test_a_file_that_is_no_picture_is_a_sentence(visit, tmp_path):
    page = visit("guided", query="?do=edit")
    page.tab.get_by_text("Choose an image, then press Draw.").wait_for()
    (tmp_path / "mine.png").write_bytes(b"no picture")
    page.tab.locator(".genmod-file input").set_input_files(tmp_path / "mine.png")
    page.tab.locator('.genmod-give[data-ready="no"]').wait_for()
    assert "the file is no picture that can be read" in page.draw()


def test_the_slider_over_t_shows_each_step(visit):
    page = visit("guided", query="?do=steps&steps=4")
    slider = page.tab.locator(".genmod-time input")
    slider.wait_for()
    times = slider.get_attribute("data-times").split(",")
    assert len(times) == 4
    for place in (0, 2):
        slider.fill(str(place))
        shown = page.tab.locator("#genmod-out img:visible")
        assert shown.count() == 4 and page.tab.locator(".genmod-time output").inner_text() == times[place]
        assert {one.get_attribute("data-t") for one in shown.all()} == {times[place]}
    other = visit("guided", query=f"?{page.query}")
    other.tab.locator(".genmod-time input").wait_for()
    assert other.query == page.query and page.query.endswith(f"&t={times[2]}")
    assert other.tab.locator(".genmod-time output").inner_text() == times[2]


@pytest.mark.slow
def test_sliders_of_the_latents_change_the_image_and_the_link(visit, server):
    page = visit("vae")
    page.settle()
    first = page.html
    i = server("vae").model.factors[0][0]
    page.set(f"z{i}", 2.5)
    page.tab.wait_for_function(f"() => /z{i}=2.5/.test(location.search)")
    page.tab.wait_for_function("before => document.querySelector('#genmod-out').innerHTML !== before", arg=first)
    other = visit("vae", query=f"?{page.query}")
    other.settle()
    assert pixels_in(other.html)["latents.png"].tolist() == pixels_in(page.html)["latents.png"].tolist()


@pytest.mark.slow
def test_a_picture_is_reconstructed_and_enlarged(visit, tmp_path):
    page = visit("vae", query="?do=reconstruct")
    give(page, tmp_path, picture((8, 8)))
    assert set(pixels_in(page.draw())) == {"given.png", "reconstructed.png"}
    page = visit("upsampler", query="?steps=3&longest=8")
    give(page, tmp_path, picture((8, 4)))
    assert pixels_in(page.draw())["image-0.png"].shape == (8, 16, 3)
