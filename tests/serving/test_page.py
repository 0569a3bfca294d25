"""The page of `tpad serve`, driven in a real browser as a person would. Skipped where there is no Chromium."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from helpers.processes import CHROMIUM
from helpers.server import HOSTILE, Server, serving, write_shop

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install the package chromium to run this")
KEY = "a key of some length"


@pytest.fixture(scope="module")
def server(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    run = write_shop(tmp_path_factory.mktemp("page") / "run", tiny_data)
    with serving(run, TPAD_API_KEY=KEY) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page after the key was given; whatever it complains about is an error."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.set_default_timeout(60_000)  # a busy machine is slow, not wrong
    expect.set_options(timeout=60_000)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
    opened.goto(server.url)
    opened.get_by_label("Key", exact=True).last.fill(KEY)
    opened.keyboard.press("Enter")
    expect(opened.locator("#grid .item")).to_have_count(40)
    yield opened
    assert complaints == []
    opened.close()


def test_a_wrong_key_is_said_where_it_was_given(browser: Browser, server: Server) -> None:
    opened = browser.new_page()
    opened.goto(server.url)
    key = opened.get_by_label("Key", exact=True).last
    expect(key).to_be_focused()
    expect(opened.locator("#wrong-key")).to_be_hidden()
    key.fill("quite another key")
    opened.keyboard.press("Enter")
    expect(opened.get_by_role("alert").filter(has_text="This key is wrong")).to_be_visible()
    expect(key).to_be_focused()
    opened.keyboard.type(KEY)  # the wrong one is selected
    opened.keyboard.press("Enter")
    expect(opened.locator("#grid .item")).to_have_count(40)
    expect(opened.locator("#login")).to_be_hidden()
    opened.close()


def test_an_error_of_a_proxy_is_shown_by_its_status(page: Page) -> None:
    page.route("**/recommend", lambda route: route.fulfill(status=502, content_type="text/html", body="<h1>Bad Gateway</h1>"))
    page.locator("#grid .item").first.click()
    expect(page.locator("#trouble")).to_have_text("no answer from the service: 502 Bad Gateway")
    page.unroute("**/recommend")
    page.locator("#grid .item").first.click()
    expect(page.locator("#trouble")).to_be_hidden()


def test_the_focus_stays_near_what_is_gone(page: Page, server: Server) -> None:
    for n in range(3):
        page.locator("#grid .item").nth(n).click()
        expect(page.locator("#session button")).to_have_count(n + 1)
    chips = page.locator("#session button")
    chips.last.focus()
    page.keyboard.press("Backspace")
    expect(chips).to_have_count(2)
    expect(chips.last).to_be_focused()
    chips.first.press("Enter")
    expect(chips).to_have_count(1)
    expect(chips.first).to_be_focused()
    page.get_by_role("button", name="Clear").press("Enter")
    expect(page.get_by_label("Search the catalogue")).to_be_focused()
    page.locator("#grid .item").first.focus()
    page.keyboard.press("s")
    expect(page.locator("#near .item")).to_have_count(12)
    title = page.locator("#near .name").first.inner_text()
    page.locator("#near .like").first.press("Enter")
    expect(page.locator("#like")).to_have_text(f"Similar to {title}")
    expect(page.locator("#like")).to_be_focused()
    page.keyboard.press("Escape")
    page.route("**/items?limit=60&offset=0*", lambda route: route.continue_(url=f"{server.url}/items?limit=25"))
    page.get_by_label("Search the catalogue").fill(" ")
    expect(page.locator("#grid .item")).to_have_count(25)
    page.get_by_role("button", name="More").press("Enter")
    expect(page.locator("#grid .item")).to_have_count(40)
    expect(page.locator("#grid .item").nth(25)).to_be_focused()


def ranking(page: Page) -> list[str]:
    return page.locator("#next .item").evaluate_all("items => items.map(item => item.dataset.item)")


def test_a_session_is_built_by_clicks_and_the_ranking_changes(page: Page) -> None:
    expect(page.locator("#kind")).to_have_text("Popular")
    expect(page.locator("#next .item")).to_have_count(10)
    popular = ranking(page)
    page.locator("#grid .item").nth(12).click()
    expect(page.locator("#kind")).to_have_text("What next?")
    expect(page.locator("#session button")).to_have_count(1)
    first = ranking(page)
    assert first != popular
    expect(
        page.get_by_role("status").filter(has_text=f"Next: {', '.join(page.locator('#next .name').all_inner_texts()[:3])}")
    ).to_have_count(1)
    seen = page.locator("#grid .name").nth(12).inner_text()
    assert {f"similar to {seen}", f"next after {seen}"} == {*page.locator("#next .why").all_inner_texts()}
    page.locator("#next .item").nth(4).click()
    expect(page.locator("#session button")).to_have_count(2)
    expect(page.locator("#next .item").first).not_to_have_attribute("data-item", first[0])
    page.get_by_label("leave out seen items").check()
    expect(page.locator(f"#next [data-item={first[4]}]")).to_have_count(0)
    page.locator("#session button").first.click()
    expect(page.locator("#session button")).to_have_count(1)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#kind")).to_have_text("Popular")
    expect(page.locator("#took")).to_contain_text("ms")
    expect(page.locator("#about")).to_have_text("version v0001")


def test_new_items_are_raised_and_lowered_by_a_dial(page: Page) -> None:
    requests: list[dict[str, object]] = []
    page.on("request", lambda request: requests.append(request.post_data_json) if request.url.endswith("/recommend") else None)
    page.locator("#grid .item").first.click()
    expect(page.locator("#kind")).to_have_text("What next?")
    assert "new_items" not in requests[-1]  # the setting of the service holds
    dial, output = page.get_by_label("new items"), page.locator("#shift")
    expect(output).to_have_text("as trained")
    dial.focus()
    for key, shown, shift in (("ArrowRight", "+0.5", 0.5), ("ArrowLeft", "as trained", 0), ("End", "+4", 4), ("Home", "\u22124", -4)):
        with page.expect_response("**/recommend"):
            page.keyboard.press(key)
        expect(output).to_have_text(shown)
        assert requests[-1]["new_items"] == shift
    page.keyboard.press("Backspace")  # takes back the last item of the session, as anywhere but in a text
    expect(page.locator("#session button")).to_have_count(0)


def test_the_keyboard_does_it_too(page: Page) -> None:
    page.keyboard.press("/")
    page.keyboard.type("chair")
    expect(page.locator("#grid .item")).not_to_have_count(40)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    second = page.locator("#grid .item").nth(1)
    expect(second).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#session button")).to_have_count(1)
    page.keyboard.press("s")
    expect(page.locator("#similar")).to_be_visible()
    expect(page.locator("#near .item")).to_have_count(12)
    by_knowledge = page.locator("#near").inner_text()
    page.get_by_role("button", name="next items", pressed=False).press("Enter")
    expect(page.get_by_role("button", name="next items", pressed=True)).to_be_focused()
    expect(page.locator("#near")).not_to_have_text(by_knowledge, use_inner_text=True)
    page.keyboard.press("Escape")
    expect(page.locator("#similar")).to_be_hidden()
    page.keyboard.press("Backspace")
    expect(page.locator("#session button")).to_have_count(0)


def test_images_are_shown_and_a_letter_for_an_item_without_one(page: Page) -> None:
    for number in (0, 4, 9):
        expect(page.locator("#grid img").nth(number)).not_to_have_js_property("naturalWidth", 0)
    page.get_by_label("Search the catalogue").fill("p0008")
    expect(page.locator("#grid .item")).to_have_count(1)
    expect(page.locator("#grid .image")).to_have_text(page.locator("#grid .name").inner_text()[0])


def test_a_title_with_a_script_is_text(page: Page) -> None:
    page.get_by_label("Search the catalogue").fill("script")
    expect(page.locator("#grid .item")).to_have_count(1)
    page.locator("#grid .item").click()
    expect(page.locator("#grid .name")).to_have_text(HOSTILE)
    page.keyboard.press("s")
    expect(page.locator("#like")).to_have_text(f"Similar to {HOSTILE}")
    expect(page).to_have_title("tpad: what next?")


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("#grid .item").first.click()
    expect(page.locator("#kind")).to_have_text("What next?")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_new_ranking_on_a_phone_is_seen_from_its_beginning(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 800})
    expect(page.get_by_label("Search the catalogue")).to_have_css("font-size", "16px")  # of less, a phone zooms in
    page.locator("#next .item").last.click()
    expect(page.locator("#kind")).to_have_text("What next?")
    assert page.locator("#next").evaluate("list => list.scrollLeft") == 0
