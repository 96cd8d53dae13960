"""The playground page in a real Chromium, against an endpoint in this process."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from transformers import AutoModelForCausalLM, Qwen3Config

from nesa_ray.serving.blueprint import capture_served
from tests.unit.serving.conftest import Model, byte_tokenizer, listening, start
from tests.unit.serving.test_adapters import save_trained

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "a-key"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield running
        running.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory, adapter = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("trained") / "sql"
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    reference = AutoModelForCausalLM.from_config(config)
    reference.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    save_trained(reference, adapter, ("q_proj",), 4)
    options = {"name": "tiny-model", "api_keys": [KEY], "adapters": {"sql": str(adapter)}}
    with (
        start(Model(directory, reference), capture_served, **options) as engine,
        listening(engine) as port,
    ):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    broken: list[str] = []
    page.on("pageerror", lambda e: broken.append(str(e)))
    page.goto(address)
    yield page
    context.close()
    assert broken == []


def test_a_chat_streams_and_the_stages_are_seen_at_work(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text("ready")
    expect(page.locator("#model")).to_have_text("tiny-model")
    expect(page.get_by_role("progressbar")).to_have_count(2)
    page.get_by_label("Message").fill("Hello <b>there</b>")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("log")).to_contain_text("Incorrect API key")
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("Most tokens").fill("400")
    expect(page.get_by_label("Message")).to_have_value("Hello <b>there</b>")  # what was refused can be sent again
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".assistant small")).to_contain_text("400 tokens", timeout=20_000)
    expect(page.locator(".user").last).to_contain_text("Hello <b>there</b>")  # as text, not as HTML
    expect(page.locator("#rate")).not_to_have_text("0.0")
    expect(page.get_by_label("Load of stage 0")).not_to_have_attribute("value", "0")


def test_an_answer_can_be_stopped_and_a_completion_asked_for(page: Page) -> None:
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("Form").select_option("Plain completion")
    page.get_by_label("Most tokens").fill("500")
    page.get_by_label("Message").fill("def main():")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("log")).to_contain_text("Say something")


def test_an_adapter_can_be_asked(page: Page) -> None:
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("Most tokens").fill("5")
    for chosen, model in (("sql", "sql"), ("none", "tiny-model")):
        page.get_by_label("Adapter").select_option(chosen)
        page.get_by_label("Message").fill("Hello")
        with page.expect_response("**/v1/chat/completions") as answer:
            page.get_by_role("button", name="Send").click()
        assert answer.value.request.post_data_json["model"] == model
        expect(page.locator(".assistant small").last).to_contain_text("5 tokens")


def test_what_is_typed_before_the_first_status_stays(page: Page) -> None:
    held: list[Route] = []
    page.route("**/status", lambda route: held.append(route))
    with page.expect_request("**/status"):
        page.reload()
    page.get_by_label("Most tokens").fill("5")
    held[0].continue_()
    page.unroute("**/status")
    expect(page.locator("#model")).to_have_text("tiny-model")
    expect(page.get_by_label("Most tokens")).to_have_value("5")


def test_light_and_dark_have_enough_contrast_and_everything_has_a_name(page: Page) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for pair in (("--ink", "--page"), ("--soft", "--card"), ("--on-accent", "--accent"), ("--bad", "--card")):
            assert contrast(*(colour(page, name) for name in pair)) >= 4.5, (scheme, pair)
    named = "e => e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim()"
    for control in page.locator("button, input, select, textarea, progress").all():
        assert control.evaluate(named), control
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def colour(page: Page, name: str) -> tuple[float, ...]:
    value = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()")
    return tuple(int(value[i : i + 2], 16) / 255 for i in (1, 3, 5))


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_page_needs_nothing_from_elsewhere(browser: Browser, address: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "nesa_ray/serving/playground.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    answer = page.goto(address, wait_until="networkidle")
    assert answer is not None
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert {u.removeprefix(address) for u in asked if not u.startswith("data:")} == {"", "status"}
    page.close()
