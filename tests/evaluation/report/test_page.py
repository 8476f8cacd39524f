"""The page: what is in the file, and what a browser shows of it."""

import json
import re
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from evaluation.report.browser import CORRUPT, COUNT, GONE, MODELS, NAN, NEVER, ODD, WHY, Page, chromium, demo, missing, value
from PIL import Image

from seppo_fast.errors import UserError
from seppo_fast.evaluation.report.page import write_page

in_a_browser = pytest.mark.skipif(missing() is not None, reason=missing() or "")


class Reader(HTMLParser):
    """The attributes of the elements, and the scripts' texts by id, as a browser reads them."""

    def __init__(self, text: str):
        super().__init__()
        self.attributes: list[dict[str, str | None]] = []
        self.scripts: dict[str, str] = {}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append(dict(attrs))
        self.inside = dict(attrs).get("id") or tag if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def picture(self, prompt: int, model: str) -> Image.Image:
        uri, width, height = json.loads(self.scripts[f"pictures-{prompt}-0"])[model]
        assert uri.startswith("data:image/webp;base64,")
        image = Image.open(BytesIO(b64decode(uri.partition(",")[2])))
        assert image.size == (width, height)
        return image


def page_of(folder: Path, *files: str) -> Reader:
    """The page of one model with a prompt a file."""
    about = demo(folder / "other")
    write_page({**about, "models": about["models"][:1], "samples": [
        {"prompt": i, "sample": 0, "model": "base", "file": file, "values": {"pickscore": 1.0 * i}, "problem": None}
        for i, file in enumerate(files)]}, folder)
    return Reader((folder / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    assert write_page(demo(folder), folder) == folder / "index.html"
    return folder


@pytest.fixture(scope="module")
def read(folder: Path) -> Reader:
    return Reader((folder / "index.html").read_text(encoding="utf-8"))


def test_the_result_is_in_the_page_whatever_the_prompts_are(read: Reader, folder: Path, tmp_path: Path) -> None:
    held = json.loads(read.scripts["result"])
    made = demo(tmp_path)
    assert held["prompts"] == made["prompts"] and held["prompts"][1]["text"] == ODD[1]
    assert held["scores"] == made["scores"] and held["table"] == made["table"]
    assert held["samples"][COUNT + NAN]["values"] == {"pickscore": None, "lpips": None}
    assert held["samples"][COUNT + NAN + 1] == made["samples"][COUNT + NAN + 1]
    assert "<" not in read.scripts["result"]
    assert set(read.scripts) == {"style", "script", "result", "unreadable", *(f"pictures-{i}-0" for i in range(COUNT))}


def test_the_page_loads_nothing(read: Reader) -> None:
    loaded = [value for attributes in read.attributes for name, value in attributes.items() if name in ("src", "href", "action")]
    assert loaded and all(value.startswith(("#", "data:")) for value in loaded)
    ways = r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon|innerHTML"
    assert not re.search(ways, read.scripts["style"] + read.scripts["script"])
    policy = next(attributes["content"] for attributes in read.attributes if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pictures_are_small_and_tiny_ones_stay_as_they_are(tmp_path: Path) -> None:
    noise = Image.effect_noise((768, 512), 60).convert("RGB")
    noise.save(tmp_path / "large.png")
    noise.resize((100, 300)).save(tmp_path / "high.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "tiny.png")
    read = page_of(tmp_path, "large.png", "high.png", "tiny.png")
    large = read.picture(0, "base")
    assert (large.format, large.size) == ("WEBP", (256, 171))
    assert (read.picture(1, "base").size, read.picture(2, "base").size) == ((85, 256), (16, 16))
    red, green, blue = read.picture(2, "base").convert("RGB").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15
    assert len(read.scripts["pictures-0-0"]) < (tmp_path / "large.png").stat().st_size / 5


def test_clips_stay_clips(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (320, 240), (20 * i, 0, 255 - 20 * i)) for i in range(8)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], duration=[125] * 7 + [375], lossless=True)
    clip = page_of(tmp_path, "clip.webp").picture(0, "base")
    assert (clip.n_frames, clip.size) == (8, (192, 144))
    times, colours = [], []
    for i in range(8):
        clip.seek(i)
        clip.load()
        times.append(clip.info["duration"])
        colours.append(clip.convert("RGB").getpixel((90, 70)))
    assert times == [125] * 7 + [375]
    assert all(abs(red - 20 * i) < 12 and abs(blue - 255 + 20 * i) < 12 for i, (red, _, blue) in enumerate(colours))


def test_a_file_without_a_picture_is_named_with_the_reason(read: Reader, folder: Path) -> None:
    why = json.loads(read.scripts["unreadable"])
    assert why == {"tuned/corrupt.png": "the file cannot be read (cannot identify image file 'tuned/corrupt.png')",
                   "tuned/gone.png": "the file is missing"}
    assert set(json.loads(read.scripts[f"pictures-{NEVER}-0"])) == {"base", "sft"}


def test_a_cut_picture_costs_only_itself(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:400])
    read = page_of(tmp_path, "cut.png", "whole.png")
    assert list(json.loads(read.scripts["unreadable"])) == ["cut.png"] and read.picture(1, "base").size == (64, 64)


def test_a_full_disk_leaves_the_old_page(tmp_path: Path) -> None:
    page_of(tmp_path)
    before = (tmp_path / "index.html").read_bytes()
    (tmp_path / ".index.html").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*index.html: No space left on device"):
        write_page(json.loads(Reader(before.decode()).scripts["result"]), tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before and not (tmp_path / ".index.html").is_symlink()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def page(driver: Any, folder: Path) -> Iterator[Page]:
    """The page of the 300 prompts; whatever a test does with it, nothing is to complain, and nothing is to be fetched."""
    page = Page(driver, folder / "index.html")
    page.requests()
    page.open()
    yield page
    assert page.complaints() == []
    assert {address.partition("#")[0] for address in page.requests()} == {page.address}


def by_gain(model: str, score: str, sign: int) -> list[int]:
    """The prompts that have both values, the largest gain first."""
    known = [i for i in range(COUNT) if model != "tuned" or i not in (NAN, NEVER)]
    return sorted(known, key=lambda i: sign * (value("base", i, score) - value(model, i, score)))


@in_a_browser
def test_a_prompt_is_shown_as_it_is_and_does_nothing(page: Page) -> None:
    assert page.texts("#rows h3")[:2] == list(ODD[:2]) and page.driver.title == "Evaluation of tuned, sft against base"
    assert page.script("document.querySelectorAll('main b b, #rows script, img[src=x]').length") == 0
    assert page.script("document.querySelector('#rows a').getAttribute('href')") == "base/one%20%231.png"
    long = page.script("document.querySelectorAll('#rows h3')[4].textContent.length")
    page.script("document.querySelector('#rows .prompt button').click()")
    assert long < 300 and page.script("document.querySelectorAll('#rows h3')[4].textContent") == ODD[4]


@in_a_browser
def test_the_head_says_what_was_compared(page: Page) -> None:
    head = page.text("#about")
    for fact in ("base runs/base/final", "300 prompts (anime 150, photo 150), 1 sample a prompt", "steps 50", "Seed7",
                 "Commitabc123+", "torch 2.13.0", "cpu a <cpu>", "2026-01-01"):
        assert fact in head
    assert "frames" not in head


@in_a_browser
def test_the_table_has_means_intervals_and_what_is_missing(page: Page) -> None:
    assert page.texts("#table thead th") == ["Model", "PickScore ↑(higher is better)", "ImageReward ↑(higher is better)",
                                             "LPIPS ↓(lower is better)", "Vendi ↑(higher is better)"]
    rows = [page.texts(f"#table tbody tr:nth-child({i}) :is(th, td)") for i in (1, 2, 3)]
    assert rows[0] == ["base", "20.0019.50 to 20.50", "missing", "20.0019.50 to 20.50", "20.00"]
    assert rows[1] == ["tuned", "21.0020.50 to 21.5060.0 % (55.0 to 65.0)", "missing", "21.0020.50 to 21.5050.0 % (45.0 to 55.0)",
                       "21.00"]
    assert page.texts("#table strong") == ["20.00", "22.00", "22.00"]  # LPIPS of base, and PickScore and Vendi of sft
    assert page.texts("#missing li") == [f"ImageReward is missing: {WHY}"]
    judged = "better than base on PickScore; no clear difference on LPIPS; worse within anime (LPIPS)."
    assert page.texts("#verdicts li") == [f"tuned: {judged}", f"sft: {judged}"]


@in_a_browser
def test_the_group_changes_table_charts_and_samples(page: Page) -> None:
    page.choose("group", "photo")
    assert page.texts("#table tbody tr:first-child td")[0].startswith("40.00")
    assert page.texts("#bars .value")[2].startswith("70.0 %") and "150 samples" in page.texts("#histograms .name")[0]
    assert page.text("#count").startswith("150 of 150 prompts.") and page.prompts()[:3] == [1, 3, 5]
    page.choose("group", "all")
    assert page.text("#count").startswith("300 of 300 prompts.")


@in_a_browser
def test_the_search_finds_prompts_with_all_words(page: Page) -> None:
    for words, fits in {"RED cat": lambda i: i >= len(ODD) and i % 6 == 0, "number 12": lambda i: i >= len(ODD) and "12" in str(i),
                        "红色": lambda i: i == 2, '"OPEN" <B>': lambda i: i == 0, "no such words": lambda i: False}.items():
        found = [i for i in range(COUNT) if fits(i)]
        page.type(words)
        assert page.prompts() == found[:50] and page.text("#count").startswith(f"{len(found)} of 300 prompts."), words


@in_a_browser
def test_samples_are_ordered_by_gain_and_by_loss(page: Page) -> None:
    for model, label, score, sign in (("tuned", "PickScore", "pickscore", 1), ("sft", "LPIPS", "lpips", -1)):
        page.choose("model", model)
        page.choose("score", label)
        page.choose("sort", "largest gain first")
        assert page.prompts() == by_gain(model, score, sign)[:50]
        page.choose("sort", "largest loss first")
        assert page.prompts() == by_gain(model, score, sign)[::-1][:50]
        page.choose("sort", "prompt order")
        assert page.prompts() == list(range(50))


@in_a_browser
def test_what_has_no_value_comes_last_and_says_so(page: Page) -> None:
    for order in ("largest gain first", "largest loss first"):
        page.choose("sort", order)
        while page.script("!document.getElementById('more').hidden"):
            page.script("document.getElementById('more').click()")
        assert len(page.prompts()) == COUNT and set(page.prompts()[-2:]) == {NAN, NEVER}
    cells = page.texts(f"#rows li:nth-child({page.prompts().index(NAN) + 1}) figure:nth-child(2) .values div")
    assert cells == ["PickScore ↑(higher is better)no value", "LPIPS ↓(lower is better)no value"]
    assert page.text("#count").endswith("no value to compare in 2.")


@in_a_browser
def test_differences_are_signed_and_coloured_by_what_is_better(page: Page) -> None:
    for number, (score, sign) in enumerate((("pickscore", 1), ("lpips", -1)), 1):
        for prompt in range(5):
            cell = f"#rows li:nth-child({prompt + 1}) figure:nth-child(2) .values div:nth-child({number}) .difference"
            difference = value("tuned", prompt, score) - value("base", prompt, score)
            kind = "better" if sign * difference > 0 else "worse"
            assert page.text(cell) == f"{difference:+.2f} ({kind})".replace("-", "−")
            assert page.script("document.querySelector(arguments[0]).className", cell) == f"difference {kind}"


@in_a_browser
def test_samples_with_a_problem_are_listed(page: Page) -> None:
    assert page.text("#problems summary") == "4 samples with a problem"
    page.script("document.querySelector('#problems summary').click()")
    page.wait(lambda: len(page.texts("#problems li")) == 4)
    for prompt, why in ((NAN, "PickScore is nan"), (CORRUPT, "out/tuned/corrupt.png cannot be read "),
                        (GONE, "the file is missing"), (NEVER, "the model's sample is not finite")):
        assert any(f"tuned, prompt {prompt}, sample 0: {why}" in text for text in page.texts("#problems li"))
        shown = f"#rows li:nth-child({prompt + 1}) figure:nth-child(2) :is(.placeholder, .problem)"
        assert page.text(shown).startswith(why.strip())


@in_a_browser
def test_more_rows_come_on_scrolling(page: Page) -> None:
    assert len(page.prompts()) == 50 and page.text("#more") == "Show more (250 rows left)"
    page.script("document.getElementById('more').scrollIntoView()")
    page.wait(lambda: len(page.prompts()) >= 100)
    assert page.prompts() == list(range(len(page.prompts())))
    page.wait(lambda: page.script("document.querySelector('#rows img').naturalWidth") == 80)


@in_a_browser
def test_the_address_gives_the_view_back(page: Page) -> None:
    for control, text in (("group", "anime"), ("score", "LPIPS"), ("model", "sft"), ("sort", "largest loss first")):
        page.choose(control, text)
    page.type("cat 1")
    view, prompts, table = page.script("location.hash"), page.prompts(), page.text("#table")
    expected = [i for i in by_gain("sft", "lpips", -1)[::-1] if i >= len(ODD) and i % 6 in (0, 3) and "1" in str(i) and i % 2 == 0]
    assert prompts == expected[:50]
    page.open(view)
    assert (page.prompts(), page.text("#table"), page.script("document.getElementById('q').value")) == (prompts, table, "cat 1")
    page.open("#group=nowhere&score=imagereward&sort=up&model=base")  # of another evaluation
    assert page.prompts() == list(range(50)) and page.script("document.getElementById('group').value") == "all"


@in_a_browser
def test_a_win_rate_leads_to_its_samples(page: Page) -> None:
    page.script("document.querySelector('#bars article:nth-child(3) li:nth-child(1) .see button:nth-child(2)').click()")
    assert page.script("location.hash") == "#score=lpips&sort=loss" and page.prompts() == by_gain("tuned", "lpips", -1)[::-1][:50]
    assert page.script("document.activeElement.id") == "samples"
    (width,) = page.script("[document.querySelector('#bars article:nth-child(3) rect').getAttribute('width')]")
    assert width == "50.00%" and page.script("document.querySelector('#bars .half').getAttribute('x1')") == "50%"


@in_a_browser
def test_histograms_have_the_same_bins_and_their_shares_sum_to_one(page: Page) -> None:
    plots = page.script("[...document.querySelectorAll('#histograms figure:first-child .plot svg')].map("
                        "each => [each.getAttribute('viewBox'), each.querySelector('.fill').getAttribute('d')])")
    assert len({box for box, _ in plots}) == 1 and len(plots) == 3
    areas = [sum(1 - float(height) for height in re.findall(r"V([\d.]+)H", path)) for _, path in plots]
    assert min(areas) > 1 and max(areas) == pytest.approx(min(areas), rel=1e-3)
    ticks = [float(text) for text in page.texts("#histograms figure:first-child .ticks text")]
    values = [value(model, i, "pickscore") for model in MODELS for i in range(COUNT)]
    assert 3 <= len(ticks) <= 8 and min(values) - 1 < min(ticks) < max(ticks) < max(values) + 1


@in_a_browser
def test_all_controls_and_pictures_have_names(page: Page) -> None:
    assert page.script("[...document.querySelectorAll('select, input')].every(each => each.labels.length === 1)")
    assert page.script("[...document.querySelectorAll('img')].every(each => /^(base|tuned|sft), sample 0: ./.test(each.alt))")
    assert page.script("[...document.querySelectorAll('svg')].every(each => each.ariaHidden || each.ariaLabel)")
    assert page.texts("h1, h2") == ["Evaluation of tuned, sft against base", "Scores", "Win rates", "Distributions", "Samples"]


@in_a_browser
def test_the_page_is_no_wider_than_the_window(page: Page) -> None:
    try:
        for width in (400, 1280, 1920):
            page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False})
            assert page.script("document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_a_browser
def test_one_model_is_ordered_by_its_values_and_clips_play(driver: Any, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (320, 240), (20 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True)
    page_of(tmp_path, *["clip.webp"] * 3)
    page = Page(driver, tmp_path / "index.html").open()
    page.choose("sort", "best first")
    assert page.prompts() == [2, 1, 0] and page.text("#wins-note") == "There is one model, and nothing to compare it with."
    page.wait(lambda: page.script("document.querySelector('#rows img').naturalWidth") == 192)
    assert page.complaints() == []


@in_a_browser
def test_without_scores_the_pictures_come_first(driver: Any, tmp_path: Path) -> None:
    made = demo(tmp_path)
    write_page(made | {"scores": [score | {"missing": WHY} for score in made["scores"]], "table": [],
                       "samples": [sample | {"values": {}} for sample in made["samples"]]}, tmp_path)
    page = Page(driver, tmp_path / "index.html").open()
    assert page.texts("main section:not([hidden]) h2") == ["Samples", "Scores"]
    assert page.texts("nav a:not([hidden])") == ["Samples", "Scores"] and len(page.texts("#missing li")) == 4
    assert page.prompts() == list(range(50)) and page.texts("form label:not([hidden])") == ["Search prompts"]
    assert page.complaints() == []


@in_a_browser
def test_weights_and_models_of_ones_own_are_named(driver: Any, tmp_path: Path) -> None:
    made = demo(tmp_path)
    made["models"][1]["local"] = True
    made["scores"][0] |= {"weights": {"model": "/clip", "tokenizer": "a/b"}, "published": {"model": "c/d", "tokenizer": "a/b"}}
    write_page(made, tmp_path)
    page = Page(driver, tmp_path / "index.html").open()
    assert page.texts("#given li") == ["PickScore, model: /clip (published: c/d)"]
    assert page.texts("#about dd:first-of-type div")[:2] == ["base runs/base/final", "tuned runs/tuned/final (local files)"]


@in_a_browser
def test_an_improvement_is_shown_beside_what_it_improves(driver: Any, tmp_path: Path) -> None:
    made = demo(tmp_path)
    made["models"][2]["improves"] = "base"
    made["scores"][3]["kind"] = "prompt"
    made["table"][11] |= {"count": 299, "low": 21.5, "high": 22.5, "win_rate": {"mean": 0.6, "low": 0.55, "high": 0.65}}
    write_page(made, tmp_path)
    page = Page(driver, tmp_path / "index.html").open()
    assert page.texts("#rows li:first-child figcaption") == ["base", "tuned", "sft improves base"]
    assert page.script("document.querySelectorAll('#rows li:first-child img').length") == 3
    assert page.texts("#about dd:first-of-type div")[2] == "sft runs/sft/final (improves the samples of base)"
    shown = page.texts("#table tbody tr:nth-child(3) td")[3]
    assert shown == "22.0021.50 to 22.5060.0 % (55.0 to 65.0)299 of 300 prompts"
    assert "the share of samples, or of prompts, that are better" in page.text("#scores-note")
    assert page.complaints() == []


@in_a_browser
def test_the_table_scrolls_on_a_phone(page: Page) -> None:
    try:
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                    {"width": 360, "height": 640, "deviceScaleFactor": 3, "mobile": True})
        page.open()
        assert page.script("document.documentElement.scrollWidth") == page.script("innerWidth") == 360
        left, seen, most = page.script("""(box => { box.scrollLeft = 1e4;
            const side = query => box.querySelector(query).getBoundingClientRect();
            return [side("tbody td:last-child").right, side("tbody th").right, box.getBoundingClientRect().right]; }
            )(document.querySelector('.scroll'))""")
        assert left <= most + 1 and seen < most / 2  # the last column is in sight, and the models' names leave room for it
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
