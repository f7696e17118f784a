"""The page as text: whole, self-contained, and with everything in it. test_page_in_browser.py looks at it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from ldm_deploy.eval import page as page_module
from ldm_deploy.eval.compare import Evaluation
from ldm_deploy.eval.measure import BASELINE
from ldm_deploy.eval.page import to_html
from tests.eval.states import STATES

Report = Callable[[str], Evaluation]
FP32, INT8 = "fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"


class Page(HTMLParser):
    """Tags in order, text, and the cells of every table's body; checks that tags nest."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.script = ""
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        elif not self.open or self.open[-1] != "style":
            self.text += data
            if self.rows and ("td" in self.open or "th" in self.open):
                self.rows[-1][-1] += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.mark.parametrize("state", STATES)
def test_the_page_is_whole_and_needs_no_network(report_in: Report, state: str) -> None:
    text = to_html(report_in(state))
    page = Page(text)
    assert page.open == []
    assert "http" not in text.replace("http-equiv=", "")
    assert "@import" not in text
    for address in re.findall(r"url\((.*?)\)", text):
        assert address.startswith("data:image/")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:image/") or "src" not in attributes
        target = attributes.get("href")
        assert target is None or target[1:] in identifiers, f"{target} leads nowhere"
        assert attributes.get("for") is None or attributes["for"] in identifiers


def test_only_our_own_script_may_run_and_nothing_may_be_fetched(report_in: Report) -> None:
    page = Page(to_html(report_in("all well")))
    assert len(page.all("script")) == 1
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["img-src"] == "data:"
    assert set(rules) == {"default-src", "script-src", "img-src", "style-src", "base-uri", "form-action"}


@pytest.mark.parametrize("state", STATES)
def test_what_can_be_used_can_be_used_with_a_keyboard_and_is_named(report_in: Report, state: str) -> None:
    page = Page(to_html(report_in(state)))
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if attributes.get("role") in ("img", "region"):
            assert attributes["aria-label"]
        if "scroll" in (attributes.get("class") or "").split():
            assert attributes["tabindex"] == "0"
    for index, (tag, _) in enumerate(page.tags):
        if tag == "thead":
            heads = page.tags[index + 2 :]
            while heads and heads[0][0] == "th":
                assert heads[0][1]["scope"] == "col"
                assert heads[1] == ("button", {"type": "button"}), "a head that cannot be reached with a keyboard"
                heads = heads[2:]
    assert any(attributes.get("name") == "viewport" for attributes in page.all("meta"))
    inputs = page.all("input")
    assert len([attributes for attributes in inputs if attributes["type"] == "radio"]) in (0, 4)


@pytest.mark.parametrize("state", STATES)
def test_the_choice_comes_first_and_every_variant_and_gate_is_there(report_in: Report, state: str) -> None:
    result = report_in(state)
    page = Page(to_html(result))
    title = f"Chosen: {result['chosen']}" if result["chosen"] else "No variant was chosen"
    sections = [attributes["id"] for attributes in page.all("h2")]
    always = ["variants", "images", "gates", "figures"]
    trade = ["trade"] if page.all("svg") else []
    studies = ["layers", "search", "timesteps"] if state == "studies" else []
    assert sections == [*trade, *always, *studies, "conditions"]
    places = [page.text.index(text) for text in (title, *result["why"].split(" Not chosen: "), "All variants")]
    assert places == sorted(places)
    cells = [[" ".join(cell.split()) for cell in row] for row in page.rows]
    for row in result["variants"]:
        assert any(cell[0] == row["name"] and len(cell) == 9 for cell in cells)
        for gate in row["gates"]:
            (found,) = (c for c in cells if c[0] == row["name"] and c[1].split()[0] == gate["name"])
            assert gate["result"] in found[2]
            assert (gate["reason"] or "") in found[2]
            assert found[3].startswith(gate["limit_text"])
        if row["refused"]:
            assert row["refused"] in page.text
    assert result["machine"]["cpu"] in page.text
    for name, version in result["machine"]["versions"].items():
        assert f"{name} {version}" in page.text


def test_gates_that_did_not_pass_come_first(case: Any) -> None:
    case.found.latency_ms[INT8] = [2 * value for value in case.found.latency_ms[BASELINE]]
    page = Page(to_html(case.report()))
    results = [row[2].split()[0] for row in page.rows if len(row) == 5 and row[2][:1] in "✗?✓"]
    assert results == sorted(results, key="✗?✓".index)
    assert results[0] == "✗"
    assert results[-1] == "✓"


def test_prompts_are_text_not_markup(report_in: Report) -> None:
    text = to_html(report_in("all well"))
    assert "<b>sun" not in text
    assert "<b>sun</b> & co, seed 1" in Page(text).text


def decoded(uri: str) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image)


def test_every_image_is_in_the_page_once_and_unchanged(report_in: Report) -> None:
    result = report_in("all well")
    text = to_html(result)
    page = Page(text)
    # fp32 draws what the baseline draws: it is not embedded again.
    uris = re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", text)
    assert len(uris) == len(set(uris)) == 4 * 2
    shown = {str(image["alt"]): image["src"] for image in page.all("img")}
    for index, (prompt, seed) in enumerate(result.grid.pairs):
        label = f"{prompt}, seed {seed}, drawn by"
        np.testing.assert_array_equal(decoded(str(shown[f"{label} {INT8}"])), result.images[INT8][index])
        samples = [figure for figure in page.all("figure") if figure.get("class") == "sample"]
        places = [attributes.get("aria-label") for attributes in page.all("div")]
        assert f"{label} {BASELINE}" in places
        assert f"{label} {FP32}" in places
    references = [re.findall(r"url\((.*)\)", str(figure["style"]))[0] for figure in samples]
    for expected in result.images[BASELINE]:
        assert any(np.array_equal(decoded(uri), expected) for uri in references)


def test_the_worst_images_come_first_and_stay_when_not_all_fit(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = case.found.images
    images[INT8][2] ^= 15  # the third pair: <b>sun</b> & co, seed 0
    result = case.report()
    assert result["chosen"] == INT8
    full = Page(to_html(result))
    assert str(full.all("img")[0]["alt"]).startswith("<b>sun</b> & co, seed 0")
    assert "left out" not in full.text
    monkeypatch.setattr(page_module, "IMAGE_BYTES", 1)
    small = Page(to_html(result))
    assert [image["alt"] for image in small.all("img")] == [full.all("img")[0]["alt"]]
    assert "3 of 4 prompts and seeds are left out" in small.text


def test_without_a_baseline_there_is_nothing_to_compare_with(report_in: Report) -> None:
    page = Page(to_html(report_in("baseline failed")))
    assert len(page.all("img")) == 4 * 2
    assert page.all("input") == []
    assert "the reference" not in page.text


def test_studies_are_shown_where_they_are_and_not_mentioned_where_they_are_not(report_in: Report) -> None:
    before = Page(to_html(report_in("all well")))
    assert "Sensitivity" not in before.text
    assert "trajectory" not in before.text
    page = Page(to_html(report_in("studies")))
    layers = [row for row in page.rows if len(row) == 8 and row[2] == "Conv"]
    # The most sensitive first; what was not measured last, with its reason.
    assert [row[0] for row in layers] == ["conv_in", "mid.attention", "mid.conv", "conv_out", "mid.norm"]
    assert [row[1] for row in layers] == ["1", "2", "3", "5", "4"]
    assert layers[0][3:] == ["31.5 (30.5 to 32.5)", "27.5", "0.100", "no", ""]
    assert layers[4][3:] == ["–", "–", "–", "–", "no int8 kernel"]
    charts = [svg["aria-label"] for svg in page.all("svg")]
    assert any("time won" in str(label) for label in charts)
    assert any("unet-int8-onnxruntime-cpu against fp32-torch-cpu" in str(label) for label in charts)
    assert "Timestep 0: the last step predicts nothing" in page.text
    # One mark for every figure, hollow where the layer was left as it was.
    circles = [circle["class"] for circle in page.all("circle")]
    assert len(circles) == 4 + 3 + (2 + 3)
    assert circles.count("dot first hollow") == 2 + 2
    marks = ["■ missed", "◆ chosen", "● kept", "✕ failed"]
    tried = [row for row in page.rows if len(row) == 7 and row[1] in marks]
    assert [row[1] for row in tried] == marks
    assert tried[1][2:] == ["2", "36.0", "1.40 (1.35 to 1.45)", "yes", ""]
    assert tried[3][-1] == "it differs from the reference"


def test_figures_that_the_page_does_not_know_are_shown_as_they_are(report_in: Report) -> None:
    result = json.loads(json.dumps(report_in("all well")))
    row = result["variants"][1]
    row["energy"] = {"joules": 812.25, "stable": True, "note": "<first>", "nothing": None}
    row["tries"] = [{"batch": 1, "images_per_s": 2.5}, {"batch": 4, "images_per_s": 3.25}]
    figure = {"mean": 0.125, "worst": 0.5, "ci95": [0.1, 0.2], "n": 4, "reason": None}
    row["quality"]["moon_phase"] = {**figure, "tile": [16, 32]}
    page = Page(to_html(result))
    text = " ".join(page.text.split())
    for expected in ("energy", "812.25", "<first>", "tries", "3.25"):
        assert expected in text
    for expected in ("moon_phase", "0.1000 to 0.2000", "tile: 16, 32"):
        assert expected in text


def test_charts_are_left_out_where_there_are_no_figures(report_in: Report) -> None:
    page = Page(to_html(report_in("baseline failed")))
    assert page.all("svg") == []
    assert "Pareto" not in page.text


def test_a_shift_of_colour_has_a_row_for_each_channel(case: Any) -> None:
    case.found.images[INT8][..., 2] ^= 3  # of blue alone
    result = case.report()
    row = next(row for row in result["variants"] if row["name"] == INT8)
    expected = dict(zip(("red", "green", "blue"), row["quality"]["colour_shift"]["mean"], strict=True))
    assert len({f"{value:.3f}" for value in expected.values()}) > 1
    cells = [line for line in Page(to_html(result)).rows if line[0].startswith("colour shift, ")]
    found = {line[0].removeprefix("colour shift, "): line[1] for line in cells[3:]}  # fp32 comes first
    assert found == {name: f"{value:.3f}" for name, value in expected.items()}
    assert all(" to " in line[2] for line in cells)


def test_a_reconstruction_has_a_table_of_its_own_and_the_file_that_is_worst(report_in: Report) -> None:
    result = json.loads(json.dumps(report_in("all well")))
    figure = {"mean": 31.25, "worst": 20.5, "ci95": [30.0, 32.0], "n": 3, "reason": None}
    figure["worst_image"] = {"file": "a.png"}
    done = {"images": 3, "size": [64, 48], "reason": None, "quality": {"psnr_db": figure}}
    result["baseline"]["reconstruction"] = done
    result["variants"][0]["reconstruction"] = done | {"quality": None, "reason": "it returned NaN"}
    page = Page(to_html(result))
    assert page.text.count("Reconstruction of 3 images of 64x48") == 2
    (cells,) = (row for row in page.rows if row[5:6] == ["a.png"])
    assert cells[:5] == ["PSNR, dB", "31.2", "30.0 to 32.0", "20.5", "3"]
    assert "not measured: it returned NaN" in page.text


def test_latency_by_batch_cold_start_memory_and_noise_have_their_places(case: Any) -> None:
    rng = np.random.default_rng(0)
    case.found.latency_ms[INT8] = list(40 * np.exp(3 * rng.standard_normal(4)))  # too noisy to judge
    report = case.report()
    text = " ".join(Page(to_html(report)).text.split())
    for expected in (
        "1: 10, 4: 12.5 per second",
        "rows at once, unet1: 800, 8: 1000 per second",
        "cold start1310 ms: process 100, import 200, load 210, first image 800",
        "libraries 50.0 MiB, weights 30.0 MiB, activations 10.0 MiB; GPU: it runs on the processor",
        "too noisy: the 95 % interval",
        "2400 2400 MHz; 1.5 s given to other machines",
    ):
        assert expected in text
    assert report["chosen"] == FP32
    old = json.loads(json.dumps(dict(report)))  # as written before these figures were taken
    for row in old["variants"]:
        for key in ("cold_start_ms", "memory", "throughput"):
            del row[key]
        for part in row["components"]:
            del part["throughput"]
    del old["machine"]["conditions"], old["protocol"]["cold_start"]
    assert "cold start–" in " ".join(Page(to_html(old)).text.split())
