"""The server's page, in a browser."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from support.browser import WAIT_MS, chromium, visiting
from support.server import answer, serving

from edge_shiftkv import Runtime, load_image

expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def model(demo):
    return ["-m", demo / "demo-text-q8_0.gguf", "--mmproj", demo / "demo-mmproj-f16.gguf"]


@pytest.fixture(scope="module")
def server(model):
    with serving(*model) as server:
        yield server


@pytest.fixture(scope="module")
def slow(model):
    """A server whose answers take long, and with place for one session."""
    with serving(*model, "--sessions", "1", "--kv-budget", "0.5", slowly=True) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tiny):
    """A server that asks for a key, of a model that sees pictures in tiles."""
    with serving("-m", tiny.text, "--mmproj", tiny.tiled_mmproj, "--max-tokens", "4", "--api-key", "s3cret") as server:
        yield server


@pytest.fixture(scope="module")
def runtime(demo):
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1) as runtime:
        yield runtime


@pytest.fixture
def page(browser, server):
    with visiting(browser, home(server)) as page:
        yield page


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A picture that is twice as wide as high, which the demo's model sees padded."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    pixels = np.random.default_rng(1).integers(0, 256, (15, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 150), Image.Resampling.NEAREST).save(path)
    return path


def home(server):
    return server.url.removesuffix("v1")


def choose(page, path):
    page.get_by_label("Choose a picture").set_input_files(path)
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()


def drop(page, path):
    """Drop a file on the page, as from a file manager."""
    data = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [data, path.name],
    )
    page.locator("#drop").dispatch_event("dragover", {"dataTransfer": transfer})
    page.locator("#drop").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()


def ask(page, question):
    """Ask, and wait for the answer; return what was sent and the answer that is to be seen."""
    page.get_by_label("What do you want to know?").fill(question)
    with page.expect_request("**/ask") as sent:
        page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=question)).to_be_visible()
    expect(page.locator("#times")).to_be_visible()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    return sent.value.post_data_json, page.locator("#answer").text_content()


def keep(page, percent):
    page.get_by_label("Keep of the KV cache").fill(str(percent))


def colours(page, points):
    """The colours, with their opacity, of the map at points in shares of its width and height."""
    return page.locator("#map").evaluate(
        """(canvas, points) => points.map(([x, y]) => [...canvas.getContext("2d").getImageData(
            Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data])""",
        points,
    )


def shows(page, selection, size):
    """Whether the map has a colour of its own for each count, and has it in the middle of each patch with that count.

    The patches are a square that the picture is in the middle of.
    """
    (span,) = selection.image_spans
    counts = np.zeros(selection.n_prompt, int)
    for layer in selection.layers:
        for head in range(selection.n_heads // len(selection.layers)):
            counts[selection.kept(layer, head)] += 1
    side = max(size)
    middles = {}
    for i in range(span.nx * span.ny):
        y, x = divmod(i, span.nx)
        width, height = size
        at = (
            ((x + 0.5) / span.nx * side - (side - width) / 2) / width,
            ((y + 0.5) / span.ny * side - (side - height) / 2) / height,
        )
        if min(at) > 0 and max(at) < 1:
            middles[at] = int(counts[span.start + i])
    found = {}
    for colour, count in zip(colours(page, list(middles)), middles.values(), strict=True):
        found.setdefault(count, set()).add(tuple(colour))
    greens = [next(iter(found[count]))[1] for count in sorted(found) if count]
    return (
        len(found) > 2
        and all(len(of_count) == 1 for of_count in found.values())
        and len(set.union(*found.values())) == len(found)
        and all(colour[3] > 0 for of_count in found.values() for colour in of_count)
        and greens == sorted(greens, reverse=True)  # the darker, the more
    )


def blank(page):
    return not page.locator("#map").evaluate(
        "(canvas) => new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)"
        ".data.buffer).some((pixel) => pixel)"
    )


def own(runtime, path, question, **options):
    with runtime.session(images=[path], **options) as session:
        return session.ask(question)


def test_a_picture_is_dropped_and_asked_about(page, demo, runtime):
    drop(page, demo / "document.png")
    assert blank(page)
    sent, text = ask(page, "Read line 2.")
    expected = own(runtime, demo / "document.png", "Read line 2.", kv_budget=0.33, kv_method="mixed")
    assert text == expected.text != ""
    assert sent["kv_budget"] == 0.33
    assert shows(page, expected.selection, (224, 224))
    n, kept, bytes_kept = (
        expected.figures.prompt_tokens,
        expected.figures.kept_tokens,
        expected.figures.kv_bytes_kept / 2**20,
    )
    rows = page.get_by_role("table", name="KV cache").get_by_role("row")
    expect(rows.nth(1)).to_contain_text(f"{n}{kept} ({100 * kept / n:.0f} %)")
    expect(rows.nth(2)).to_contain_text(f"{expected.figures.kv_bytes_prompt / 2**20:.2f} MiB{bytes_kept:.2f} MiB")
    assert re.search(r"first token[\d.]+ s", page.locator("#times").text_content())


def test_a_padded_picture(page, wide, runtime):
    choose(page, wide)
    keep(page, 20)
    _, text = ask(page, "Read line 1.")
    expected = own(runtime, wide, "Read line 1.", kv_budget=0.2)
    assert text == expected.text
    assert shows(page, expected.selection, (300, 150))
    box = page.locator("#map").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(2, abs=0.05)


def test_the_budget_and_the_method(page, demo, runtime):
    keep(page, 25)
    choose(page, demo / "document.png")
    expect(page.locator("#budget-text")).to_have_text(re.compile(r"25 % of the prompt, about 65 of 259 KV pairs"))
    for percent, method in ((10, "mixed"), (40, "snapkv"), (40, "keydiff"), (100, "mixed")):
        keep(page, percent)
        page.get_by_label("Which part is chosen by").select_option(method)
        sent, text = ask(page, "Read everything.")
        budget = percent / 100 if percent < 100 else None
        assert (sent["kv_budget"], sent["kv_method"]) == (budget, method)
        expected = own(runtime, demo / "document.png", "Read everything.", kv_budget=budget, kv_method=method)
        assert text == expected.text
        expect(page.locator("#pairs-kept")).to_contain_text(str(expected.figures.kept_tokens))
        if budget:
            assert shows(page, expected.selection, (224, 224))
    expect(page.locator("#budget-text")).to_have_text("all of the prompt: nothing is cut")
    expect(page.locator("#pairs-kept")).to_have_text("279 (all)")
    expect(page.locator("#readout")).to_contain_text("Nothing was cut")
    assert blank(page)
    from edge_shiftkv import METHODS

    assert page.get_by_label("Which part is chosen by").locator("option").all_text_contents() == list(METHODS)


def test_further_questions(page, demo, runtime):
    opened = []
    page.on("request", lambda request: opened.append(request) if request.url.endswith("/sessions") else None)
    choose(page, demo / "document.png")
    answers = {}
    for question in ("Read line 2.", "Read line 4."):
        sent, answers[question] = ask(page, question)
        assert set(sent) == {"question", "kv_budget", "kv_method", "stream"}  # the picture is not sent again
    assert len(opened) == 1
    with runtime.session(images=[demo / "document.png"], kv_budget=0.33) as session:
        expected = {question: session.ask(question) for question in answers}
    assert answers == {question: given.text for question, given in expected.items()}
    first, second = (expected[question].selection for question in answers)
    assert shows(page, second, (224, 224))
    listed = page.get_by_role("region", name="Asked about this picture").get_by_role("button")
    expect(listed).to_have_count(2)
    assert all("first token after" in text for text in listed.all_text_contents())
    listed.filter(has_text="Read line 2.").click()
    expect(page.locator("#answer")).to_have_text(answers["Read line 2."])
    assert shows(page, first, (224, 224))
    assert not shows(page, second, (224, 224))
    # Another picture begins anew, and the session of this one is closed.
    with page.expect_response(lambda response: response.request.method == "DELETE") as closed:
        choose(page, demo / "document.png")
    assert closed.value.json()["deleted"] is True
    expect(listed).to_have_count(0)
    assert blank(page)


def test_the_map_tells_counts(page, demo, runtime):
    choose(page, demo / "document.png")
    ask(page, "Read line 2.")
    selection = own(runtime, demo / "document.png", "Read line 2.", kv_budget=0.33).selection
    counts = selection.image_counts(0).reshape(16, 16)
    canvas = page.get_by_role("img", name="Patches by how many kept them")
    box = canvas.bounding_box()
    for y, x in ((2, 5), (5, 2), (15, 15), (0, 14)):
        canvas.hover(position={"x": box["width"] * (x + 0.5) / 16, "y": box["height"] * (y + 0.5) / 16})
        told = f"Patch in row {y + 1}, column {x + 1}: kept by {counts[y, x]} of 8."
        expect(page.locator("#readout")).to_have_text(told)
    page.get_by_role("heading", name="Question").hover()
    expect(page.locator("#readout")).to_contain_text("Point at a patch")
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#readout")).to_have_text(f"Patch in row 2, column 3: kept by {counts[1, 2]} of 8.")
    assert page.locator("#top").text_content() == str(counts.max())


def test_the_example_is_there_for_the_demos_model(page, demo, runtime):
    page.get_by_role("button", name="Take the example").click()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#answer")).to_have_text(own(runtime, demo / "document.png", "Read line 2.").text)


def test_what_is_wrong_is_said(browser, server, demo, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((demo / "document.png").read_bytes()[:3000])
    with visiting(browser, home(server), refused=1) as page:
        page.get_by_label("Choose a picture").set_input_files(broken)
        expect(page.get_by_role("alert")).to_contain_text("the picture's data is damaged")
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_disabled()
        choose(page, demo / "document.png")
        expect(page.get_by_role("alert")).to_have_count(0)


def sends(events):
    return lambda route: route.fulfill(body=events, content_type="text/event-stream")


def test_an_answer_that_breaks_off(page, demo):
    choose(page, demo / "document.png")
    begun = 'data: {"choices": [{"delta": {"content": "VOLT"}}]}\n\n'
    for rest, message in (
        ('data: {"error": {"message": "the request took too long", "code": "time_limit"}}\n\n', "took too long"),
        ("", "The answer broke off"),
    ):
        page.route("**/ask", sends(begun + rest))
        page.get_by_label("What do you want to know?").fill("Read line 2.")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text(message)
        expect(page.locator("#answer")).to_have_text("VOLT")
        page.unroute("**/ask")


def test_another_picture_is_chosen_while_one_is_read(page, demo, wide, runtime):
    held = []
    page.route("**/v1/sessions", lambda route: route.continue_() if held else held.append(route))
    page.get_by_label("Choose a picture").set_input_files(wide)
    expect(page.get_by_role("status")).to_have_text("Reading the picture")
    choose(page, demo / "document.png")
    _, text = ask(page, "Read line 2.")
    assert text == own(runtime, demo / "document.png", "Read line 2.", kv_budget=0.33).text
    assert len(held) == 1


def test_an_answer_comes_piece_by_piece_and_can_be_stopped(browser, slow, demo, runtime):
    whole = own(runtime, demo / "document.png", "Read everything.", kv_budget=0.5).text
    with visiting(browser, home(slow)) as page:
        expect(page.get_by_label("Keep of the KV cache")).to_have_value("50")  # the server's own
        choose(page, demo / "document.png")
        page.get_by_label("What do you want to know?").fill("Read everything.")
        page.keyboard.press("Enter")
        expect(page.locator("#answer")).to_have_text(re.compile(".{3}"))
        assert not blank(page)
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("status")).to_have_text("Stopped.")
        part = page.locator("#answer").text_content()
        assert whole.startswith(part)
        assert len(part) < len(whole)
        slow.holds(0)


def test_a_session_that_made_way_is_opened_again(browser, slow, demo, runtime):
    with visiting(browser, home(slow), refused=1) as page:
        choose(page, demo / "document.png")
        answer(slow.send({"text": "Another."}, "/v1/sessions"))
        _, text = ask(page, "Read line 4.")
        assert text == own(runtime, demo / "document.png", "Read line 4.", kv_budget=0.5).text


def give_key(page, key):
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use it").click()


def test_a_key(browser, guarded, tiny):
    asked = []
    with visiting(browser, home(guarded), refused=1) as page:
        page.on("request", lambda request: asked.append(request))
        expect(page.get_by_label("Keep of the KV cache")).to_be_hidden()
        give_key(page, "other")
        expect(page.get_by_role("alert")).to_have_text("a wrong API key")
        give_key(page, "s3cret")
        expect(page.get_by_label("API key")).to_be_hidden()
        expect(page.get_by_role("button", name="Take the example")).to_be_hidden()  # that is the demo's
        choose(page, tiny.picture)
        ask(page, "What is it?")
        page.reload()
        expect(page.get_by_label("Keep of the KV cache")).to_be_visible()  # the tab remembers
        assert page.context.cookies() == []
        assert page.evaluate("localStorage.length") == 0
    with_key = [request.headers.get("authorization") for request in asked if "/v1/" in request.url]
    assert {*with_key} == {"Bearer other", "Bearer s3cret"}
    assert not any("s3cret" in text for text in [*guarded.log(), *(request.url for request in asked)])


def test_a_tiled_picture_has_two_maps(browser, guarded, tiny):
    with Runtime(tiny.text, tiny.tiled_mmproj, n_threads=1) as runtime:
        selection = own(runtime, tiny.picture, "What is it?", kv_budget=0.33).selection
    first, *_, overview = selection.image_spans
    with visiting(browser, home(guarded)) as page:
        give_key(page, "s3cret")
        choose(page, tiny.picture)
        ask(page, "What is it?")
        for part, span in (("tiles", first), ("overview", overview)):
            page.get_by_label("Patches of the").select_option(part)
            page.locator("#map").focus()
            page.keyboard.press("ArrowDown")
            kept = selection.counts()[span.start]
            told = f"Patch in row 1, column 1: kept by {kept} of {selection.n_heads}."
            expect(page.locator("#readout")).to_have_text(told)


def test_a_model_that_reads_no_pictures(page):
    page.route(
        "**/v1/models",
        lambda route: route.fulfill(json={"data": [{**route.fetch().json()["data"][0], "images": False}]}),
    )
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("start the server with --mmproj")


def test_a_small_window_in_the_dark(browser, server, demo):
    small = {"width": 320, "height": 600}
    with visiting(browser, home(server), viewport=small, color_scheme="dark") as page:
        choose(page, demo / "document.png")
        ask(page, "Read line 2.")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        paper, ink = (
            [
                int(value)
                for value in re.findall(r"\d+", page.locator("body").evaluate(f"e => getComputedStyle(e).{it}"))
            ]
            for it in ("backgroundColor", "color")
        )
        assert max(paper) < 64
        assert min(ink) > 192


def test_the_files_of_the_page(server):
    for path, kind in (
        ("/", "text/html; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.json", "application/json"),
        ("/icon.svg", "image/svg+xml"),
        ("/example.png", "image/png"),
    ):
        status, headers, body = answer(server.raw("GET", path))
        assert (status, headers["content-type"]) == (200, kind)
        assert body
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert answer(server.raw("GET", path, Host="evil.example"))[0] == 403
    assert json.loads(answer(server.raw("GET", "/page.json"))[2]) == {"api_key": False, "example": True}
    assert answer(server.raw("GET", "/web/page.js"))[0] == 404


def test_the_example_is_the_shipped_picture(server, demo):
    assert answer(server.raw("GET", "/example.png"))[2] == (demo / "document.png").read_bytes()
    assert load_image(demo / "document.png").size == (224, 224)  # which these tests go by
