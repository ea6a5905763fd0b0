"""The page in a headless browser: what it finds, by keyboard too, in both themes, with and without a key."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium
from serving import Running, running, toy_engine, toy_tokenizer
from toy import NoisyModel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def noisy() -> Iterator[Running]:
    """Ordinary answers change with their company."""
    with running(toy_engine(NoisyModel(), max_num_seqs=16), toy_tokenizer()) as up:
        yield up


@pytest.fixture
def tab(browser: Any, noisy: Running) -> Iterator[Any]:
    with opened(browser, noisy) as page:
        page.wait_for_selector("#go:not([disabled])")
        yield page


class opened:  # noqa: N801
    """A tab of its own, in which nothing may go wrong unseen."""

    def __init__(self, browser: Any, up: Running, **options: Any) -> None:
        self._context = browser.new_context(**options)
        self.page, self.wrong, self._url = self._context.new_page(), [], up.url
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self._url, "blob:")):
            self.wrong.append(f"a request to {request.url}")

    def __enter__(self) -> Any:
        self.page.goto(self._url)
        return self.page

    def __exit__(self, kind: Any, *_: object) -> None:
        self._context.close()
        expected = re.compile("status of 40[01]")
        if kind is None:
            assert [text for text in self.wrong if not expected.search(text)] == []


def run(tab: Any, **values: Any) -> str:
    """The verdict on runs with these values in the form."""
    for name, value in ({"runs": 5, "noise": 8, "length": 24, "temperature": 1} | values).items():
        if isinstance(value, bool):
            tab.set_checked(f"#{name}", value)
        else:
            tab.fill(f"#{name}", str(value))
    tab.click("#go")
    tab.wait_for_selector("#stop[disabled]", timeout=60_000)
    return str(tab.inner_text("#verdict"))


def digests(tab: Any) -> list[str]:
    return list(tab.locator("td.digest").all_inner_texts())


def test_runs_amid_noise_agree_and_their_receipt_holds(tab: Any) -> None:
    found = re.match(r"5 runs agree: one digest over (\d+) tokens", run(tab))
    assert found
    tokens = int(found[1])
    assert len(set(digests(tab))) == 1
    assert tab.locator(".weave i").count() == 5 * tokens
    assert tab.locator(".weave i.wrong").count() == 0
    colours = tab.evaluate("[...document.querySelectorAll('.weave i')].map(e => e.style.cssText)")
    assert len(set(colours)) > tokens // 2 > 3
    assert all(colours[i] == colours[i % tokens] for i in range(len(colours)))
    assert "one receipt" in tab.inner_text("#receipt-lead")
    tab.click("#verify")
    tab.wait_for_selector("#checked[data-kind='same']")
    assert tab.inner_text("#checked").startswith("exact")
    receipt = tab.input_value("#receipt")
    tab.fill("#receipt", receipt.replace('"seed":7', '"seed":8'))
    tab.click("#verify")
    tab.wait_for_selector("#checked[data-kind='differ']")
    assert "damaged" in tab.inner_text("#checked")


def test_ordinary_runs_amid_the_same_noise_do_not(tab: Any) -> None:
    found = [run(tab, deterministic=False, noise=16) for _ in range(2)]
    assert any("differ from token" in verdict for verdict in found), found
    assert tab.is_hidden("#receipts")
    if "differ" in found[-1]:
        assert len(set(digests(tab))) > 1
        assert tab.locator(".weave i.wrong").count() > 0


def test_broken_connections_go_on_where_they_broke(tab: Any) -> None:
    undisturbed = run(tab), digests(tab)
    verdict = run(tab, **{"break": True})
    assert verdict.startswith("5 runs agree")
    assert "over 4 broken connections" in verdict, "one of the first run, and of three streams"
    assert digests(tab) == undisturbed[1]


def test_the_keyboard_is_enough(tab: Any) -> None:
    tab.focus("#prompt")
    for _ in range(9):  # five numbers, three boxes
        tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "go"
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#stop[disabled]", timeout=60_000)
    tab.focus("#at")
    before = tab.inner_text("#at-detail")
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.input_value("#at") == "4"
    assert tab.inner_text("#at-detail") != before
    assert "in all 8 runs" in tab.get_attribute("#at", "aria-valuetext")
    outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "receipt"


def test_a_run_can_be_stopped(tab: Any) -> None:
    tab.fill("#length", "200")
    tab.fill("#runs", "16")
    tab.click("#go")
    tab.wait_for_selector("#rows tr")
    tab.click("#stop")
    tab.wait_for_selector("#stop[disabled]")
    assert tab.inner_text("#verdict") == "Stopped."


def test_what_the_server_refuses_is_said(tab: Any) -> None:
    tab.fill("#prompt", "A" * 300)
    assert "context" in run(tab, length=200)
    assert tab.get_attribute("#verdict", "data-kind") == "failed"


def test_markup_in_a_prompt_is_text(tab: Any) -> None:
    tab.evaluate("window.hurt = 0")
    tab.fill("#prompt", "ABC<img src=x onerror='hurt=1'><script>hurt=1</script>")
    tab.set_checked("#as-chat", False)
    assert run(tab).startswith("5 runs agree")
    tab.fill("#receipt", "<img src=x onerror='hurt=1'>")
    tab.click("#verify")
    tab.wait_for_selector("#checked[data-kind='differ']")
    assert tab.evaluate("window.hurt") == 0
    assert tab.locator("main img, main script").count() == 0


def test_a_digest_is_that_of_hashlib(tab: Any) -> None:
    source = (
        "async (data) => { const { hex, sha256 } = await import('/page/digest.js');"
        " return hex(sha256(new Uint8Array(data))); }"
    )
    for length in (0, 1, 44, 55, 56, 63, 64, 65, 119, 120, 500):
        data = bytes((i * 37 + length) % 256 for i in range(length))
        assert tab.evaluate(source, list(data)) == hashlib.sha256(data).hexdigest()
    tokens = [(5, -1.25), (2**31, -0.1), (0, 0.0)]
    link, wanted = bytes(32), []
    for token, logprob in tokens:
        link = hashlib.sha256(link + struct.pack("<Id", token, logprob)).digest()
        wanted.append(link.hex())
    source = (
        "async (tokens) => { const chain = new (await import('/page/digest.js')).Chain();"
        " return tokens.map(([token, logprob]) => chain.add(token, logprob)); }"
    )
    assert tab.evaluate(source, tokens) == wanted


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any) -> None:
    with (
        running(toy_engine(), toy_tokenizer(), api_keys=("alpha",)) as up,
        opened(browser, up) as tab,
    ):
        tab.wait_for_selector("#unlock:not([hidden])")
        assert tab.is_disabled("#go")
        tab.fill("#key", "beta")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#unlock-error:not(:empty)")
        tab.fill("#key", "alpha")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#unlock", state="hidden")
        assert run(tab).startswith("5 runs agree")
        tab.reload()
        tab.wait_for_selector("#go:not([disabled])")
        assert tab.is_hidden("#unlock")
        assert tab.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]


def test_numbers_come_from_the_server(tab: Any, noisy: Running) -> None:
    run(tab)
    stats = noisy.service.metrics.snapshot()
    all_of_them = sum(stats["tokens"].values())
    tab.wait_for_selector(f"#tokens:text-is('{all_of_them:,}')")
    assert tab.inner_text("#kv-pages").endswith(f"of {stats['kv']['pages']} pages")
    assert tab.inner_text("#model") == "tiny"
    assert tab.get_attribute("#contract", "title") == noisy.service.contract.hash


RATIOS = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return light(colour);
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text || !element.checkVisibility() || element.disabled || element.closest("noscript")) continue;
    const pair = [light(parts(getComputedStyle(element).color)), behind(element)].sort((a, b) => b - a);
    found.push([element.outerHTML.slice(0, 80), (pair[0] + 0.05) / (pair[1] + 0.05)]);
  }
  return found;
}"""


def test_text_stands_out_in_both_themes_and_a_chosen_one_stays(browser: Any, noisy: Running) -> None:
    def paper() -> str:
        return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))

    def faint() -> list[Any]:
        ratios = tab.evaluate(RATIOS)
        assert len(ratios) > 40
        return [(what, ratio) for what, ratio in ratios if ratio < 4.5]

    with opened(browser, noisy, color_scheme="dark") as tab:
        tab.wait_for_selector("#go:not([disabled])")
        dark = paper()
        run(tab)
        assert faint() == []
        tab.check("#theme input[value=light]", force=True)
        light = paper()
        assert light != dark
        assert faint() == []
        tab.reload()
        assert paper() == light
        tab.check("#theme input[value=auto]", force=True)
        assert paper() == dark


def test_every_control_has_a_name_and_small_screens_do_not_scroll_sideways(
    browser: Any, noisy: Running
) -> None:
    with opened(browser, noisy, viewport={"width": 360, "height": 700}) as tab:
        tab.wait_for_selector("#go:not([disabled])")
        run(tab)
        tree = tab.locator("body").aria_snapshot()
        for role in ("textbox", "spinbutton", "checkbox", "button", "slider", "radio"):
            lines = [line.strip() for line in tree.splitlines() if line.strip().startswith(f"- {role}")]
            assert lines, role
            assert all(line.startswith(f'- {role} "') for line in lines), lines
        assert "status" in tree
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
