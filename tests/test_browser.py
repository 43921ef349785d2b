"""The page of scripts/web_demo.py and SwanLab's dashboard, in a headless browser."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import eval_llm
from model.generation import generating_model
from scripts import web_demo
from scripts.web_demo import Continuer
from tests.helpers import ROOT, shipped_tokenizer, tiny_model
from tests.running import tiny_flags
from trainer.errors import SettingsError
from trainer.samples import encode_prompt
from trainer.weights import read_weights, save_weights

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium, chromedriver")
QUIET = (  # no first-run page, no requests to the network
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1400,1600",
)


# Whether a canvas contains a colour other than black, white and grey.
HAS_LINE = """
const canvas = arguments[0];
const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
for (let i = 0; i < data.length; i += 4)
  if (data[i + 3] > 200 && Math.abs(data[i] - data[i + 1]) > 30) return true;
return false;
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A selenium driver of chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (*QUIET, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(word)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@contextlib.contextmanager
def serving(folder: Path, *words: object, **variables: str) -> Iterator[str]:
    """Start a server on a free port, in an environment with these ``variables``; yields its address
    once it accepts connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "server.log").open("w")
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    process = subprocess.Popen(
        [sys.executable, *map(str, words), "--port", str(port)],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        env=env | {"PYTHONUNBUFFERED": "1"} | variables,
    )
    try:
        until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        log.close()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def until(found: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until ``found()`` is true, since pages continue to build after loading; returns it."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)
    return value


# -------------------------------------------------------------------------- without a browser


def test_text_grows_piece_by_piece_to_the_generated_text() -> None:
    model = tiny_model(vocab_size=6400, max_position_embeddings=256)
    continuer = Continuer(generating_model(model), shipped_tokenizer())
    pieces = list(continuer.text("Paris is", 20, 0, 1.0, 1))
    assert len(pieces) > 3 and all(b.startswith(a) for a, b in itertools.pairwise(pieces))
    assert pieces[-1] == list(continuer.text("Paris is", 20, 0, 1.0, 2))[-1]
    drawn = {list(continuer.text("Paris is", 20, 1.0, 1.0, seed))[-1] for seed in (1, 1, 2)}
    assert len(drawn) == 2, "the seed decides what is drawn"


def test_a_closed_page_stops_generation_and_errors_reach_the_page() -> None:
    model = tiny_model(vocab_size=6400, max_position_embeddings=4096)
    text = Continuer(generating_model(model), shipped_tokenizer()).text("a", 4000, 1.0, 1.0, 1)
    next(text)
    text.close()  # returns only after the model has stopped
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(Continuer(generating_model(model), shipped_tokenizer()).text("a", -1, 1.0, 1.0, 1))


def test_any_seed_is_taken_or_refused_at_once() -> None:
    model = tiny_model(vocab_size=6400, max_position_embeddings=256)
    continuer = Continuer(generating_model(model), shipped_tokenizer())

    def drawn(seed: Any) -> str:
        return list(continuer.text("Paris is", 20, 1.0, 1.0, seed))[-1]

    for seed, same in ((None, 0), ("", 0), (2**64, 0), (10**30, 10**30 % 2**63), (7.0, 7)):
        assert drawn(seed) == drawn(same), seed
    assert drawn(-(2**63) - 1) == drawn(2**63 - 1)
    for seed in ("x", float("inf"), [1]):
        with pytest.raises(SettingsError, match=r"^The seed is .*, expected a whole number.$"):
            drawn(seed)


def test_a_prompt_that_is_too_long_is_refused_and_an_empty_one_does_no_harm() -> None:
    model = tiny_model(vocab_size=6400, max_position_embeddings=64)
    continuer = Continuer(generating_model(model), shipped_tokenizer())
    num = 64 - len(list(encode_prompt(shipped_tokenizer(), "Paris is")[0]))
    assert list(continuer.text("Paris is", num, 0, 1.0, 1))
    turns = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "yes"}]
    for prompt, most, before in (("Paris is", num + 1, None), ("b", 1, turns)):
        with pytest.raises(SettingsError, match=r"^The prompt has \d+ tokens, .* than the 64 that"):
            list(continuer.text(prompt, most, 0, 1.0, 1, before))
    for prompt, before in (("a" * 2**18 + "b", None), ("b", [turns[0] | {"content": "a" * 2**18}])):
        with pytest.raises(SettingsError, match=r"^The prompt has 262,145 characters, expected"):
            list(continuer.text(prompt, 1, 0, 1.0, 1, before))
    for before in (None, []):
        assert list(continuer.text("", 8, 0, 1.0, 1, before)) == list(
            continuer.text(None, 8, 0, 1.0, 1, before)
        )


def test_the_page_is_for_this_machine_alone_whatever_the_environment(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    path, secret = tmp_path / "pretrain_32.pth", tmp_path / "elsewhere" / "secret.txt"
    save_weights(path, tiny_model(vocab_size=6400), {})
    secret.parent.mkdir()
    secret.write_text("secret")
    hostile = {
        "GRADIO_SHARE": "True",
        "GRADIO_ALLOWED_PATHS": str(secret.parent),
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_ROOT_PATH": "/elsewhere",
    }
    words = ["-m", "scripts.web_demo", "--weight", path, "--device", "cpu"]
    with serving(tmp_path, *words, **hostile) as address:
        port = address.rpartition(":")[2]
        for host in ("localhost", "127.0.0.1", f"localhost:{port}", f"[::1]:{port}"):
            assert status_of(address, host) == 200, host
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}"):
            assert status_of(address, host) == 400, host
        assert status_of(f"{address}/gradio_api/file={secret}", "localhost") == 403
        assert b"/elsewhere" not in opened(address, "localhost").read()
        log = (tmp_path / "server.log").read_text()
    assert "public URL" not in log and "share link" not in log, log


def test_a_page_shows_why_a_prompt_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    path = tmp_path / "pretrain_32.pth"
    save_weights(path, tiny_model(vocab_size=6400, max_position_embeddings=64), {})
    words = ["-m", "scripts.web_demo", "--weight", path, "--device", "cpu"]
    with serving(tmp_path, *words) as address:
        call = f"{address}/gradio_api/call/text"
        asked = json.dumps({"data": ["Paris is", 100, 0, 1.0, 1]}).encode()
        event = json.load(opened(call, "localhost", asked))["event_id"]
        said = opened(f"{call}/{event}", "localhost").read().decode()
    assert "event: error" in said and "more than the 64 that the model can hold" in said
    assert "Traceback" not in (tmp_path / "server.log").read_text()


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_that_is_none_is_one_line(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert web_demo.main(["--port", port]) == 2
    assert capsys.readouterr().err == f"error: --port is {port}, expected 1 to 65,535.\n"


def opened(address: str, host: str, data: bytes | None = None) -> Any:
    """The answer to a request that gives this host, without a proxy."""
    headers = {"Host": host, "Content-Type": "application/json"}
    request = urllib.request.Request(address, data, headers)
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)


def status_of(address: str, host: str) -> int:
    try:
        return opened(address, host).status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_gradio_one_line_says_what_to_install(tmp_path: Path) -> None:
    save_weights(tmp_path / "pretrain_32.pth", tiny_model(vocab_size=6400), {})
    code = (
        "import sys; sys.modules['gradio'] = None; from scripts.web_demo import main; "
        f"sys.exit(main(['--save_dir', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the page needs gradio: pip install gradio\n"


# ------------------------------------------------------------------------------- in the browser


@needs_browser
def test_the_page_continues_a_prompt(tmp_path: Path, browser: Any) -> None:
    pytest.importorskip("gradio")
    model = tiny_model(vocab_size=6400, max_position_embeddings=512)
    path = tmp_path / "pretrain_32.pth"
    save_weights(path, model, {})
    model.load_state_dict(read_weights(path))
    expected = list(
        Continuer(generating_model(model), shipped_tokenizer()).text(
            "Berlin ist", 100, eval_llm.TEMPERATURE, 0.9, 42
        )
    )[-1]
    words = ["-m", "scripts.web_demo", "--weight", path, "--device", "cpu"]
    with serving(tmp_path, *words) as address:
        browser.get(address)
        by = "css selector"
        prompt, text = until(lambda: browser.find_elements(by, "textarea") or None)[:2]
        prompt.clear()
        prompt.send_keys("Berlin ist")
        buttons = browser.find_elements(by, "button")
        next(button for button in buttons if button.text == "Continue").click()
        seen: list[str] = []

        def complete() -> bool:
            seen.append(text.get_property("value"))
            return len(seen) > 1 and seen[-1] == expected

        until(complete)
        browser.save_screenshot(tmp_path / "page.png")
    assert all(expected.startswith(part) for part in seen), "the text only grows"


@needs_browser
def test_the_page_of_a_fine_tuned_model_is_a_conversation(tmp_path: Path, browser: Any) -> None:
    pytest.importorskip("gradio")
    model, tokenizer = tiny_model(vocab_size=6400, max_position_embeddings=512), shipped_tokenizer()
    path = tmp_path / "full_sft_32.pth"
    save_weights(path, model, {"settings": {"program": "full_sft"}})
    model.load_state_dict(read_weights(path))
    continuer, turns, answers = Continuer(generating_model(model), tokenizer), [], []
    for question in ("Hello?", "Again?"):
        answer = list(
            continuer.text(question, 100, eval_llm.TEMPERATURE, 0.9, 42, before=list(turns))
        )[-1]
        answers.append(" ".join(answer.split()))
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    words = ["-m", "scripts.web_demo", "--weight", path, "--device", "cpu"]
    with serving(tmp_path, *words) as address:
        browser.get(address)
        by = "css selector"
        box = until(lambda: browser.find_elements(by, "textarea") or None)[0]
        for number, question in enumerate(("Hello?", "Again?")):
            until(box.is_displayed)  # the page goes on building once the box is there
            box.send_keys(question)
            box.send_keys("\n")

            def complete(number: int = number) -> bool:
                bots = browser.find_elements(by, "[data-testid=bot]")
                said = [" ".join(bot.text.split()) for bot in bots]
                return len(said) > number and plain(said[number]) == plain(answers[number])

            until(complete)


def plain(text: str) -> str:
    """Without what a page makes of a text: it is shown as Markdown."""
    return "".join(char for char in text if char.isalnum())


@needs_browser
def test_swanlab_s_dashboard_shows_the_loss_of_a_run(tmp_path: Path, browser: Any) -> None:
    pytest.importorskip("swanboard")
    words = [sys.executable, "train_pretrain.py", *tiny_flags(tmp_path), "--use_wandb"]
    env = {k: v for k, v in os.environ.items() if k != "SWANLAB_API_KEY"} | {"HOME": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    watch = ["-c", "from swanlab.cli import cli; cli()", "watch", tmp_path / "out" / "swanlog"]
    with serving(tmp_path, *watch) as address:
        browser.get(address)
        run = until(
            lambda: [
                link
                for link in browser.find_elements("css selector", "a")
                if "pretrain" in link.text
            ]
        )[0]
        run.click()
        chart = "//*[normalize-space(text())='loss']/ancestor::*[.//canvas][1]"
        drawn = until(lambda: browser.find_elements("xpath", f"{chart}//canvas"))[0]
        until(lambda: browser.execute_script(HAS_LINE, drawn))
        browser.save_screenshot(tmp_path / "dashboard.png")
