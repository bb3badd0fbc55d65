"""The chat page, driven in a real browser against a server that says what a test has written."""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from tests.server.scripted import LONG, PAGE, Fake, delta, error, said, usage

CHROMIUM = shutil.which("chromium")
slow = pytest.mark.slow
ATTACK = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


def test_the_page_is_one_small_file_that_inserts_text_only() -> None:
    source = PAGE.read_text(encoding="utf-8")
    assert source.count("\n") < 400
    assert not re.search(r"https?://|//cdn|@import|url\(", source)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie", source)
    links = re.findall(r"\b(?:src|href)=\S+", source)
    assert links == ['href="data:,">']


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    app = Starlette(routes=[Route("/{path:path}", fake.answer, methods=["GET", "POST"])])
    config = uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + LONG
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    fake.origin = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield fake
    server.should_exit = server.force_exit = True
    thread.join(LONG)


# ---- a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, fake: Fake) -> Iterator[Any]:
    """The page, whose clock stands unless a test moves it. Nothing it asks for is elsewhere, and no
    script of it fails."""
    page = browser.new_context().new_page()
    asked: list[str] = []
    failures: list[str] = []
    page.set_default_timeout(1000 * LONG)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.clock.install(time=0)
    page.goto(fake.origin)
    page.clock.pause_at(600_000)
    yield page
    page.context.close()
    assert [url for url in asked if not url.startswith((f"{fake.origin}/", "data:,"))] == []
    assert failures == []


def shows(page: Any, selector: str, text: str | re.Pattern[str]) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector).last).to_have_text(text, timeout=1000 * LONG)


def comes(page: Any, condition: Callable[[], bool], clock: int = 0) -> None:
    """Wait for a condition, moving the page's clock on by so many milliseconds at a time."""
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        page.clock.run_for(clock)
        page.wait_for_timeout(50)


def state(page: Any, text: str) -> None:
    comes(page, lambda: bool(page.inner_text("#status") == text), clock=4000)


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page: Any) -> None:
    page.locator("#send:visible").wait_for()


@slow
def test_text_comes_as_it_is_made_and_figures_are_right(fake: Fake, page: Any) -> None:
    gates = [threading.Event() for _ in range(3)]
    fake.scripts = [
        [
            *(gates[0], delta(role="assistant", content=""), delta(content="Hello"), gates[1]),
            *(*(delta(content=f" {i}") for i in range(10)), delta(content="\n!")),
            *(delta("stop"), gates[2], usage(120, 45, 96, right=33, wrong=11)),
        ]
    ]
    say(page, "Hi")
    asked = fake.asked.get(timeout=LONG)
    options = asked.pop("stream_options")
    assert options["include_usage"] is True
    messages = [{"role": "user", "content": "Hi"}]
    assert asked == {"model": "tiny", "messages": messages, "stream": True}
    shows(page, ".message.user", "Hi")
    assert page.input_value("#prompt") == "" and page.is_visible("#stop")
    page.clock.run_for(250)
    shows(page, "#rate", re.compile("waiting for the first token"))
    gates[0].set()
    shows(page, ".assistant .text", "Hello")
    assert page.is_visible("#stop") and page.get_attribute(".assistant", "aria-busy") == "true"
    page.clock.run_for(500)
    gates[1].set()
    shows(page, ".assistant .text", "Hello 0 1 2 3 4 5 6 7 8 9 !")
    page.clock.run_for(500)
    shows(page, "#rate", re.compile(r"^[\d.]+ tokens/s, 12 tokens$"))
    assert page.locator("#line").get_attribute("points").count(",") >= 3
    assert page.is_visible("#live svg")
    gates[2].set()
    answered(page)
    assert page.inner_text(".assistant .text") == "Hello 0 1 2 3 4 5 6 7 8 9\n!"
    # 44 tokens after the first, in the half second that the page's clock went on
    told = "45 tokens · 88.0 tokens/s · first after 250 ms · 96 of 120 prompt tokens cached"
    shows(page, ".figures", f"{told} · 75% of guesses accepted · finish: stop")
    assert page.get_attribute(".assistant", "aria-busy") == "false"
    assert not page.is_visible("#live svg") and page.inner_text("#rate") == ""


@slow
def test_counts_in_the_chunks_are_believed(fake: Fake, page: Any) -> None:
    """A step may bring several tokens in one chunk."""
    gate = threading.Event()
    first = {**usage(5, 3), **delta(content="a b c")}
    second = {**usage(5, 5), **delta(content=" d e")}
    fake.scripts = [[first, gate, second, delta("length"), usage(5, 5)]]
    say(page, "Hi")
    shows(page, ".assistant .text", "a b c")
    page.clock.run_for(1000)
    shows(page, "#rate", re.compile("3 tokens$"))
    gate.set()
    told = "5 tokens · 2.0 tokens/s · first after 0 ms · 0 of 5 prompt tokens cached"
    shows(page, ".figures", f"{told} · finish: length")


@slow
@pytest.mark.parametrize("way", ["button", "escape", "new"])
def test_stop_keeps_what_was_said_and_leaves(fake: Fake, page: Any, way: str) -> None:
    fake.scripts = [[delta(content="Once"), threading.Event()], said("Yes")]
    say(page, "Tell")
    shows(page, ".assistant .text", "Once")
    if way == "escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop" if way == "button" else "#new")
    assert fake.left.wait(LONG)
    answered(page)
    if way == "new":
        assert page.locator(".message").count() == 0 and not page.is_visible("#retry")
    else:
        shows(page, ".figures", "about 1 token · first after 0 ms · finish: stopped")
        shows(page, ".assistant .text", "Once")
    assert page.evaluate("document.activeElement.id") == "prompt"
    fake.messages()
    say(page, "Again")
    kept = [] if way == "new" else [("user", "Tell"), ("assistant", "Once")]
    assert fake.messages() == [*kept, ("user", "Again")]
    shows(page, ".assistant .text", "Yes")


@slow
def test_stop_before_the_first_token(fake: Fake, page: Any) -> None:
    fake.scripts = [[threading.Event()], said("Yes")]
    say(page, "Tell")
    assert fake.messages() == [("user", "Tell")]
    page.click("#stop")
    assert fake.left.wait(LONG)
    shows(page, ".figures", "finish: stopped")
    shows(page, ".unanswered + .assistant .text", "(nothing)")
    say(page, "Well?")
    assert fake.messages() == [("user", "Well?")]


@slow
def test_a_conversation_is_sent_whole_with_its_settings(fake: Fake, page: Any) -> None:
    fake.key, fake.scripts = "secret", [said("One."), said("Two."), said("Two, again.")]
    settings = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 64}
    page.click("#open_settings")
    for name, value in {**settings, "system": "Be brief.", "api_key": "secret"}.items():
        page.fill(f"#{name}", str(value))
    assert page.get_attribute("#api_key", "type") == "password"
    page.keyboard.press("Escape")
    say(page, "First")
    shows(page, ".assistant .text", "One.")
    answered(page)
    page.focus("#prompt")
    page.keyboard.type("Second")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line")
    page.click("#send")
    shows(page, ".assistant .text", "Two.")
    answered(page)
    fake.messages()
    assert {name: fake.asked.queue[0][name] for name in settings} == settings
    sent = [("system", "Be brief."), ("user", "First"), ("assistant", "One.")]
    sent += [("user", "Second\nline")]
    assert fake.messages() == sent
    page.click("#retry")
    shows(page, ".assistant .text", "Two, again.")
    assert fake.messages() == sent
    assert page.locator(".message").count() == 4
    page.reload()
    assert page.input_value("#api_key") == "" and page.input_value("#system") == ""


@slow
def test_a_wrong_setting_is_not_sent(fake: Fake, page: Any) -> None:
    page.click("#open_settings")
    page.fill("#top_p", "2")
    page.keyboard.press("Escape")
    say(page, "Hi")
    page.locator("#top_p:visible").wait_for()
    assert page.locator(".message").count() == 0 and page.input_value("#prompt") == "Hi"


@slow
def test_errors_are_shown_and_the_turn_can_be_retried(fake: Fake, page: Any) -> None:
    failed = [delta(content="Par"), error("the server failed")]
    fake.scripts = [(400, error("too long")), (502, "Bad gateway"), failed, said("Good.")]
    say(page, "Hi")
    shows(page, ".error", "too long")
    shows(page, ".figures", "finish: error")
    page.click("#retry")
    shows(page, ".error", "the server answered 502 Bad Gateway")
    page.click("#retry")
    shows(page, ".error", "the server failed")
    shows(page, ".assistant .text", "Par")
    path = "**/v1/chat/completions"
    for break_off, shown in (
        (lambda route: route.fulfill(), "ended before the answer was complete"),
        (lambda route: route.abort(), "fetch"),
    ):
        page.route(path, break_off)
        page.click("#retry")
        shows(page, ".error", re.compile(shown))
        page.unroute(path)
    page.click("#retry")
    shows(page, ".assistant .text", "Good.")
    assert page.locator(".assistant").count() == 1 and page.inner_text(".error") == ""


@slow
def test_a_key_is_asked_for(fake: Fake, page: Any) -> None:
    fake.key, fake.scripts = "secret", [said("Open.")]
    state(page, "serving · wants an API key")
    looks = fake.looks
    for _ in range(3):
        page.clock.run_for(4000)
        page.wait_for_timeout(50)
    assert fake.looks == looks  # not asked again with what it refused
    say(page, "Hi")
    shows(page, ".error", re.compile("wants a key.*Settings", re.DOTALL))
    page.click("#open_settings")
    page.fill("#api_key", "secret")
    page.keyboard.press("Escape")
    page.click("#retry")
    shows(page, ".assistant .text", "Open.")
    state(page, "serving · 1 running")


@slow
def test_the_footer_tells_the_state_and_is_quiet_when_it_cannot(fake: Fake, page: Any) -> None:
    fake.info = {"model": "big", "target": "npu", "draft": 2, "running": 3, "waiting": 0}
    state(page, "serving · npu · draft 2 · 3 running · 0 waiting")
    shows(page, "#model", "big")
    page.route("**/health", lambda route: route.abort())
    state(page, "no word from the server")
    page.unroute("**/health")
    fake.info = {}
    state(page, "serving")


@slow
def test_markup_is_shown_as_text(fake: Fake, page: Any) -> None:
    fake.info = {"model": ATTACK, "target": ATTACK}
    call = {"index": 0, "id": "c", "function": {"name": ATTACK, "arguments": ATTACK}}
    fake.scripts = [
        [delta(reasoning_content=ATTACK), *said(ATTACK)],
        [delta(tool_calls=[call]), delta("tool_calls"), usage(1, 1)],
        (400, error(ATTACK)),
    ]
    say(page, ATTACK)
    for selector in (".assistant .text", ".thought", ".user .bubble"):
        shows(page, selector, ATTACK)
    answered(page)
    say(page, "call")
    shows(page, ".calls", f"{ATTACK}({ATTACK})")
    answered(page)
    say(page, "fail")
    shows(page, ".error", ATTACK)
    state(page, f"serving · {ATTACK}")
    assert page.title() == "qnext"
    assert page.locator("img, #conversation script").count() == 0
    [made] = fake.asked.queue[2]["messages"][3]["tool_calls"]
    assert made == {"id": "c", "type": "function", "function": call["function"]}


@slow
def test_reasoning_folds_when_the_answer_begins(fake: Fake, page: Any) -> None:
    gate = threading.Event()
    thoughts = [delta(reasoning_content="Hm,"), delta(reasoning_content=" 4.")]
    fake.scripts = [[*thoughts, gate, *said("Four.")], said("Five.")]
    say(page, "2 + 2?")
    shows(page, ".thought", "Hm, 4.")
    assert page.is_visible(".thought") and page.inner_text("summary") == "Thinking…"
    page.clock.run_for(1500)
    gate.set()
    shows(page, "summary", "Thought for 1.50 s")
    assert not page.is_visible(".thought")
    page.click("summary")
    assert page.is_visible(".thought")
    answered(page)
    fake.messages()
    say(page, "2 + 3?")
    assert fake.messages()[1] == ("assistant", "Four.")


@slow
def test_long_answers_are_followed_until_the_reader_scrolls_up(fake: Fake, page: Any) -> None:
    gate = threading.Event()
    lines = [delta(content=f"line {i}\n") for i in range(100)]
    fake.scripts = [[*lines, gate, *said("more\n" * 50)]]
    page.clock.resume()
    left = "(e) => e.scrollHeight - e.clientHeight - e.scrollTop"
    main = page.locator("main")
    say(page, "Count")
    shows(page, ".assistant .text", re.compile("line 99"))
    comes(page, lambda: main.evaluate(left) < 10)
    main.hover()
    page.mouse.wheel(0, -300)
    comes(page, lambda: main.evaluate(left) > 200)
    gate.set()
    answered(page)
    page.wait_for_timeout(100)
    assert main.evaluate(left) > 1000


@slow
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(fake: Fake, page: Any, width: int) -> None:
    fake.info, fake.scripts = {"model": "m" * 200, "running": 0}, [said("x" * 500)]
    page.set_viewport_size({"width": width, "height": 700})
    state(page, "serving · 0 running")
    say(page, "y" * 500)
    answered(page)
    page.click("#open_settings")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("main", "#settings"):
        assert page.locator(selector).evaluate("(e) => e.scrollWidth - e.clientWidth") <= 0
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
