"""The page of `dar-jax serve` in Debian's Chromium, under its own content security policy."""

import base64
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
SECONDS = 120_000  # at most, in milliseconds; machines may be busy


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page after it has drawn its first ten digits; nothing may go wrong in its console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"])
    page, wrong = context.new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    expect(page.locator(".card.done")).to_have_count(10, timeout=SECONDS)
    yield page
    assert not wrong
    context.close()


def tokens(card):
    return [cell.get_attribute("title") for cell in card.locator(".groups i").all()]


def pictures(card):
    return [image.get_attribute("src") for image in card.locator(".groups img").all()]


def copied(page, card, name):
    button = card.locator(f".tools button[title^='Copy as {name}'], .tools button[title^='Copy a {name}']")
    button.click()
    expect(button).to_have_text("copied")
    page.locator("#grid").evaluate("node => navigator.clipboard.readText().then(text => node.dataset.copied = text)")
    return page.locator("#grid").get_attribute("data-copied")


def test_frames_slider_and_keys(page):
    """Every card shows its frames in order; the slider shows them again without a request."""
    card, requests = page.locator(".card").first, []
    frames = pictures(card)
    assert len(set(frames)) == 4 and all(frame.startswith("data:image/png") for frame in frames)
    page.on("request", lambda request: request.url.startswith("http") and requests.append(request.url))
    shown = card.locator(".frame img").first
    for group in (1, 3, 2, 4):
        page.locator("#slider").fill(str(group))
        expect(shown).to_have_attribute("src", frames[group - 1])
        expect(page.locator("#when")).to_have_text(f"{4 * group} of 16")
    page.locator("h1").click()
    page.keyboard.press("ArrowLeft")
    expect(shown).to_have_attribute("src", frames[2])
    page.keyboard.press(" ")
    expect(page.locator("#play")).to_have_text("\u275a\u275a")
    expect(shown).to_have_attribute("src", frames[3], timeout=SECONDS)
    page.keyboard.press("Escape")
    expect(page.locator("#play")).to_have_text("\u25b6")
    assert not requests


def test_branch(page):
    """The child stands beside its parent, with the parent's first tokens and previews."""
    parent = page.locator(".card").first
    parent.locator(".groups button").nth(1).click()
    parent.locator(".branch input[type=text]").fill("7")
    parent.locator(".branch .main").click()
    expect(page.locator(".card.done")).to_have_count(11, timeout=SECONDS)
    family = page.locator(".family.many")
    parent, child = family.locator(".card").first, family.locator(".card").nth(1)
    assert tokens(child)[:8] == tokens(parent)[:8] and tokens(child) != tokens(parent)
    assert pictures(child)[0] != pictures(child)[3]
    expect(child).to_contain_text("keeps 2 of 4 groups")
    expect(child.locator(".groups .locked")).to_have_count(2)
    parent.locator(".groups button").nth(3).click()  # all tokens: other noise
    parent.locator(".branch .main").click()
    expect(page.locator(".card.done")).to_have_count(12, timeout=SECONDS)
    again = family.locator(".card").nth(1)
    assert tokens(again) == tokens(parent) and pictures(again)[3] != pictures(parent)[3]


def test_copies(page, url):
    """The link draws the same image; command and curl say all that it takes."""
    parent = page.locator(".card").nth(3)
    parent.locator(".groups button").nth(0).click()
    parent.locator(".branch .main").click()
    expect(page.locator(".card.done")).to_have_count(11, timeout=SECONDS)
    child = page.locator(".family.many .card").nth(1)
    command = copied(page, parent, "a command")
    assert command.startswith("dar-jax sample /") and "--labels 3 --seeds" in command
    assert "--prefix-tokens " + ",".join(each.split()[1] for each in tokens(child)) in copied(page, child, "a command")
    body = json.loads(copied(page, child, "curl").partition(" -d '")[2].rstrip("'"))
    assert body["prompt"] == "3" and len(body["prefix_tokens"]) == 4 and body["noise_seed"] != body["seed"]
    link = copied(page, child, "link")
    wanted = pictures(child), tokens(child)
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator(".card.done")).to_have_count(1, timeout=SECONDS)
    assert (pictures(page.locator(".card")), tokens(page.locator(".card"))) == wanted


def test_picture(page, tmp_path):
    """Its tokens, it drawn again from them, its layout under a class, and drawn over."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "picture.png")
    page.set_input_files("#file", tmp_path / "picture.png")
    expect(page.locator(".card.done")).to_have_count(11, timeout=SECONDS)
    card = page.locator(".card").first
    expect(card.locator(".original")).to_be_visible()
    expect(card.locator(".groups .locked")).to_have_count(4)
    card.locator(".groups button").nth(0).click()
    card.locator(".branch .main").click()
    expect(page.locator(".card.done")).to_have_count(12, timeout=SECONDS)
    assert tokens(page.locator(".card").nth(1))[:4] == tokens(card)[:4]
    card.get_by_role("button", name="start", exact=True).click()
    card.locator(".branch .main").click()
    expect(page.locator(".card.done")).to_have_count(13, timeout=SECONDS)


def test_edit(page):
    """A brush marks what is drawn anew; the rest of the picture stays, pixel by pixel, and the child stands beside it."""
    card = page.locator(".card").first
    before = pictures(card)[3]
    card.get_by_role("button", name="edit", exact=True).click()
    draw = card.locator(".branch .main")
    expect(draw).to_be_disabled()
    box = card.locator(".paint").bounding_box()
    x = box["x"] + 0.75 * box["width"]
    page.locator(".branch input[type=range]").fill("4")
    page.mouse.move(x, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(x, box["y"] + box["height"] - 5, steps=20)
    page.mouse.up()
    card.locator(".branch input[type=number]").nth(1).fill("4")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/edit.png")
    draw.click()
    expect(page.locator(".card.done")).to_have_count(11, timeout=SECONDS)
    child = page.locator(".family.many .card").nth(1)
    expect(child).to_contain_text("a part drawn anew")
    sources = before, pictures(child)[3]
    old, new = (np.asarray(Image.open(io.BytesIO(base64.b64decode(each.partition(",")[2])))) for each in sources)
    np.testing.assert_array_equal(new[:, :4], old[:, :4])
    assert (new != old).any()
    assert copied(page, child, "a command").startswith("dar-jax edit ")
    assert '"mask":"' in copied(page, child, "curl")
    if folder:
        page.screenshot(path=f"{folder}/edited.png")


def test_stop_and_search(page):
    """Esc ends what is under way, wherever it stands."""
    page.get_by_role("button", name="none", exact=True).click()
    expect(page.locator("#draw")).to_be_disabled()
    page.locator("#search").fill("7")
    page.locator("#search").press("Enter")
    expect(page.locator(".chip[aria-pressed=true]")).to_have_text(["7"])
    held = []
    page.route("**/generations", lambda route: held.append(route))  # the answer does not come
    page.locator("#count").fill("3")
    page.locator("#draw").click()
    expect(page.locator(".card")).to_have_count(13)
    expect(page.locator("#stop")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.locator(".card.stopped")).to_have_count(3)
    expect(page.locator("#stop")).to_be_disabled()
    page.locator("#clear").click()
    expect(page.locator(".card")).to_have_count(0)


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.locator(".card").nth(1).locator(".groups button").nth(1).click()
    inside = "node => node.scrollWidth <= innerWidth && [...document.querySelectorAll('.branch')].every("
    inside += "each => each.getBoundingClientRect().right <= innerWidth)"
    assert page.locator("html").evaluate(inside)
