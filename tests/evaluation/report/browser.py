"""What the page's tests need: a result to show, and Chromium, where one is installed, asked what it shows of it."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900")
MODELS, COUNT = ("base", "tuned", "sft"), 300
ODD = ('a sign that says "open" & <b>bold</b>', "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>",
       "一只戴着红色帽子的猫", "قطة ترتدي قبعة", "very " + "long, " * 400, "$result ${style} $pictures", "<!--<script>")
WHY = "ImageReward.pt is not there; it is published at https://huggingface.co/x: give it by --weights imagereward=PATH"
NAN, CORRUPT, GONE, NEVER = 10, 11, 12, 13  # prompts whose sample of tuned has something amiss


def value(model: str, prompt: int, score: str) -> float:
    """Any, but the same in every test."""
    return random.Random(f"{model} {prompt} {score}").gauss({"base": 20, "tuned": 21, "sft": 20.2}[model], 1)


def demo(folder: Path, per_prompt: int = 1) -> dict[str, Any]:
    """A result of 3 models and 300 prompts in 2 groups, and its samples; one score is missing."""
    texts = [*ODD, *(f"a {('red', 'blue')[i % 2]} {('Cat', 'dog', 'house')[i % 3]}, number {i}" for i in range(len(ODD), COUNT))]
    prompts = [{"index": i, "text": text, "group": ("anime", "photo")[i % 2], "id": str(i)} for i, text in enumerate(texts)]
    samples = []
    for model, colour in zip(MODELS, ("grey", "blue", "orange"), strict=True):
        (folder / model).mkdir(parents=True)
        Image.new("RGB", (80, 60), colour).save(folder / model / "one #1.png")
        samples += [{"prompt": i, "sample": j, "model": model, "file": f"{model}/one #1.png", "problem": None,
                     "values": {score: value(model, i, score) for score in ("pickscore", "lpips")}}
                    for i in range(COUNT) for j in range(per_prompt)]
    amiss = {sample["prompt"]: sample for sample in samples if sample["model"] == "tuned"}
    amiss[NAN] |= {"values": {"pickscore": float("nan"), "lpips": None}, "problem": "PickScore is nan"}
    (folder / "tuned" / "corrupt.png").write_bytes(b"no picture")
    amiss[CORRUPT] |= {"file": "tuned/corrupt.png", "problem": "out/tuned/corrupt.png cannot be read"}
    amiss[GONE] |= {"file": "tuned/gone.png"}
    amiss[NEVER] |= {"file": None, "values": {}, "problem": "the model's sample is not finite"}
    scores = [{"name": name, "label": label, "better": better, "kind": kind, "weights": {}, "missing": why}
              for name, label, better, kind, why in (
                  ("pickscore", "PickScore", "higher", "sample", None), ("imagereward", "ImageReward", "higher", "sample", WHY),
                  ("lpips", "LPIPS", "lower", "sample", None), ("vendi", "Vendi", "higher", "set", None))]
    groups = ["all", "anime", "photo"]
    table = [row(model, group, score, g, m) for g, group in enumerate(groups) for score in scores for m, model in enumerate(MODELS)]
    about = {"machine": {"cpu": "a <cpu>"}, "versions": {"torch": "2.13.0"}, "commit": "abc123+", "date": "2026-01-01",
             "settings": {"seed": 7, "per_prompt": per_prompt, "steps": 50, "frames": None}, "seconds": {"scores": 1.5}}
    return {"about": about, "models": [{"name": model, "path": f"runs/{model}/final"} for model in MODELS], "scores": scores,
            "groups": groups, "table": table, "prompts": prompts, "samples": samples}


def row(model: str, group: str, score: dict[str, Any], g: int, m: int) -> dict[str, Any]:
    """Means 20, 21, 22 of the models, ten more in each next group; all win by 60 %, and within anime lose in LPIPS."""
    mean = None if score["missing"] else 20.0 + 10 * g + m
    one = score["kind"] == "set" or mean is None
    rate = {"pickscore": 0.6, "lpips": (0.5, 0.3, 0.7)[g]}.get(score["name"])
    won = {"mean": rate, "low": rate and rate - 0.05, "high": rate and rate + 0.05, "count": COUNT} if m and not one else None
    return {"model": model, "group": group, "score": score["name"], "mean": mean, "low": None if one else mean - 0.5,
            "high": None if one else mean + 0.5, "count": COUNT, "win_rate": won,
            "best": mean is not None and m == (0 if score["better"] == "lower" else 2)}


def missing() -> str | None:
    """Why there is no browser to test in, or None where there is one."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if absent:
        return f"{' and '.join(absent)} not on PATH (Debian: apt-get install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install seppo-fast[test])"
    return None


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A WebDriver with an empty profile; its console and network logs are kept. Both programs are named, so none is looked for."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with patch.dict(os.environ, {"no_proxy": "*"}):  # the driver is a server on this machine
        driver = Chrome(options=options, service=ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


class Page:
    """One page in the browser, by what a person sees and does."""

    def __init__(self, driver: Any, path: Path):
        self.driver, self.address = driver, path.as_uri()

    def open(self, view: str = "") -> "Page":
        """From nothing: an address that differs in its view alone would not load anew."""
        self.driver.get("about:blank")
        self.driver.get(self.address + view)
        # The driver may be back before the page's own script has drawn the rows.
        self.wait(lambda: self.script("location.protocol === 'file:' && document.readyState === 'complete'"))
        return self

    def script(self, expression: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {expression}", *arguments)

    def texts(self, selector: str) -> list[str]:
        """What stands in the elements, with plain spaces."""
        texts = self.script("[...document.querySelectorAll(arguments[0])].map(each => each.textContent)", selector)
        return [" ".join(text.split()) for text in texts]

    def text(self, selector: str) -> str:
        (text,) = self.texts(selector)
        return text

    def prompts(self) -> list[int]:
        """The rows on show, by their prompts' numbers."""
        return [int(text.split()[1]) for text in self.texts("#rows .prompt p")]

    def choose(self, control: str, text: str) -> None:
        self.driver.find_element("xpath", f"//select[@id='{control}']/option[.='{text}']").click()

    def type(self, text: str) -> None:
        """Into the search box, in place of what is there; the page takes it up a moment after the last key."""
        box = self.driver.find_element("id", "q")
        box.clear()
        box.send_keys(text)
        self.wait(lambda: self.script("new URLSearchParams(location.hash.slice(1)).get('q')") == text)

    def wait(self, fact: Callable[[], bool]) -> None:
        """For what does not happen at once."""
        until = time.monotonic() + 10
        while not fact():
            assert time.monotonic() < until, "it has not happened within 10 s"
            time.sleep(0.02)

    def complaints(self) -> list[str]:
        """The console's messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call, without what pages have in themselves and the browser's own."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith(("data:", "chrome:", "chrome-untrusted:", "about:"))]
