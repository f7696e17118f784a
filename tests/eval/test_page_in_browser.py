"""The page in a real browser: layout, keys, sorting, the comparison of images, and that it asks nobody for anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_deploy.eval.measure import BASELINE
from ldm_deploy.eval.page import to_html
from tests.eval.browser import NAMES, Browser, find_browser
from tests.eval.conftest import Case
from tests.eval.states import prepare

INT8 = "int8-onnxruntime-cpu"
PHONE, DESKTOP = (390, 844), (1280, 1600)
TAB, ENTER, SPACE, RIGHT = ("Tab", 9), ("Enter", 13), (" ", 32), ("ArrowRight", 39)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_browser()
    if executable is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(NAMES)} is on PATH")
    with Browser(executable, tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A report with all a page can show; int8 is chosen, and differs by a few grey levels, in some pixels by 40."""
    case = Case(tmp_path_factory.mktemp("toy"))
    rng = np.random.default_rng(1)
    reference = case.found.images[BASELINE].astype(int)
    changed = reference + rng.integers(-6, 7, reference.shape)
    changed[:, :2, :4] += 40
    case.found.images[INT8] = np.clip(changed, 0, 255).astype(np.uint8)
    found = prepare(case, "studies")
    assert found["chosen"] == INT8
    return found


@pytest.fixture(scope="module")
def page(result: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(result), encoding="utf-8")
    return path


def reach(browser: Browser, condition: str) -> None:
    """Press Tab until `condition` holds of `focused`."""
    for _ in range(200):
        browser.press(*TAB)
        if browser.run(f"(focused => Boolean({condition}))(document.activeElement)"):
            return
    pytest.fail(f"the Tab key does not reach: {condition}")


def box(browser: Browser, selector: str) -> dict[str, float]:
    """Where an element is on the page, for `screenshot`."""
    found: dict[str, float] = browser.run(
        f"(r => ({{x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}}))"
        f"(document.querySelector('{selector}').getBoundingClientRect())"
    )
    return found


def column(browser: Browser, index: int) -> list[str]:
    body = "document.querySelector('#variants + .scroll table').tBodies[0]"
    cells: list[str] = browser.run(f"[...{body}.rows].map(row => row.cells[{index}].textContent)")
    return cells


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 640)])
def test_the_page_fits_its_window_and_asks_nobody(
    browser: Browser, page: Path, size: tuple[int, int], dark: bool
) -> None:
    browser.requests.clear()
    browser.messages.clear()
    browser.open(page, *size, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == size[0]
    assert browser.run("getComputedStyle(document.body).overflowX") == "visible"  # it fits, and is not cut off
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.messages == []
    pixels = browser.screenshot()
    assert pixels.shape == (size[1], size[0], 3)
    background = pixels[0, 0]
    assert (background.mean() < 60) == dark
    assert 0.02 < (pixels != background).any(axis=-1).mean() < 0.9  # something is drawn, and not everywhere


def test_a_page_that_did_fetch_would_be_caught(browser: Browser, page: Path, tmp_path: Path) -> None:
    address = "http://127.0.0.1:9/pixel.png"
    planted = tmp_path / "report.html"
    planted.write_text(page.read_text().replace("<main", f'<img src="{address}" alt="planted"><main', 1))
    browser.requests.clear()
    browser.messages.clear()
    browser.open(planted)
    assert any("Content Security Policy" in message and address in message for message in browser.messages)


def test_an_injected_script_does_not_run(browser: Browser, page: Path, tmp_path: Path) -> None:
    planted = tmp_path / "report.html"
    planted.write_text(page.read_text().replace("<main", "<script>document.title = 'taken'</script><main", 1))
    browser.open(planted)
    assert browser.run("document.title") != "taken"


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, page: Path, dark: bool) -> None:
    """WCAG 2.2: a contrast of 4.5 for text (1.4.3)."""
    browser.open(page, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    pairs = browser.run(
        """[...document.querySelectorAll('body *')]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length)
        .map(e => {
          const back = e => getComputedStyle(e).backgroundColor;
          let behind = e;
          while (behind.parentElement && back(behind) === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
          const style = getComputedStyle(e);
          return [e instanceof SVGElement ? style.fill : style.color, back(behind),
                  e.tagName + '.' + (e.getAttribute('class') ?? '')];
        })"""
    )
    assert len(pairs) > 100
    for text, behind, name in pairs:
        lighter, darker = sorted((luminance(text), luminance(behind)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{name}: {text} on {behind}"


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, WCAG 2.2."""
    values = np.array([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_tables_sort_by_click_and_by_key_and_what_is_missing_stays_last(browser: Browser, page: Path) -> None:
    browser.open(page)
    heads = "#variants + .scroll th[scope=col]"
    names = column(browser, 0)
    assert names[0] == BASELINE
    browser.run(f"document.querySelector('{heads} button').click()")
    assert column(browser, 0) == sorted(names)
    assert browser.run(f"document.querySelector('{heads}').ariaSort") == "ascending"

    reach(browser, "focused.textContent === 'PSNR dB'")
    browser.press(*ENTER)
    psnr = column(browser, 3)
    assert psnr[-1] == "–"  # of the baseline
    assert [float(value) for value in psnr[:-1]] == sorted(float(value) for value in psnr[:-1])
    browser.press(*SPACE)
    assert column(browser, 3) == [*reversed(psnr[:-1]), "–"]
    sorts = browser.run(f"[...document.querySelectorAll('{heads}')].map(h => h.ariaSort)")
    assert sorts == [None, None, None, "descending", None, None, None, None, None]


def test_numbers_sort_as_numbers(browser: Browser, result: Any, tmp_path: Path) -> None:
    result, page = copy.deepcopy(dict(result)), tmp_path / "report.html"
    for row, latency in zip(result["variants"], (1000.0, 9.0), strict=True):
        row["latency_ms"]["median"] = latency
    result["baseline"]["latency_ms"]["median"] = 45.0
    page.write_text(to_html(result))
    browser.open(page)
    browser.run("document.querySelectorAll('#variants + .scroll th[scope=col] button')[1].click()")
    assert column(browser, 1) == ["9.00", "45.0", "1000"]


def test_every_stop_of_the_tab_key_shows_its_focus(browser: Browser, page: Path) -> None:
    browser.open(page)
    stops = set()
    for _ in range(200):
        browser.press(*TAB)
        found = browser.run(
            "(e => e === document.body ? null : [e.tagName, e.id || e.ariaLabel || e.textContent.trim().slice(0, 20),"
            " getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)])(document.activeElement)"
        )
        if found is None:
            break
        tag, name, style, width = found
        assert style != "none", f"{tag} {name} does not show that it has the focus"
        assert width >= 2
        stops.add(tag)
    else:
        pytest.fail("the Tab key never leaves the page")
    assert stops == {"A", "BUTTON", "DIV", "INPUT", "SUMMARY"}


def picture(browser: Browser, index: int = 1, scale: int = 4) -> np.ndarray:
    """One shown picture of the first prompt, 32x32 pixels, of which each is `scale` wide: uint8 (32, 32, 3)."""
    side = 32 * scale
    browser.run(f"document.querySelectorAll('.picture').forEach(e => e.style.width = e.style.height = '{side}px')")
    # On whole pixels, so that each pixel of the image is a square of pixels of the screen.
    browser.run(
        f"(e => {{ e.style.position = 'fixed'; e.style.left = e.style.top = '8px'; e.style.zIndex = 9; }})"
        f"(document.querySelectorAll('.sample:first-child .picture')[{index}])"
    )
    shot = browser.screenshot()[8 : 8 + side, 8 : 8 + side]
    return shot[scale // 2 :: scale, scale // 2 :: scale]


def pair(result: Any) -> tuple[np.ndarray, np.ndarray]:
    """(reference, candidate) of the prompt that is shown first: the one on which int8 is worst."""
    row = next(row for row in result["variants"] if row["name"] == INT8)
    worst = int(np.argmin([image["psnr_db"] for image in row["images"]]))
    return result.images[BASELINE][worst], result.images[INT8][worst]


def choose(browser: Browser, view: str) -> None:
    """With the keyboard: to the group of views, then along it."""
    reach(browser, "focused.name === 'view'")
    while browser.run("document.activeElement.id") != f"view-{view}":
        browser.press(*RIGHT)


def test_side_by_side_shows_the_images_themselves(browser: Browser, result: Any, page: Path) -> None:
    reference, candidate = pair(result)
    for index, expected in ((0, reference), (1, reference), (2, candidate)):  # baseline, fp32 that equals it, int8
        browser.open(page)
        np.testing.assert_array_equal(picture(browser, index), expected)


@pytest.mark.parametrize("script", [True, False])
def test_the_difference_is_amplified_as_stated(browser: Browser, result: Any, page: Path, script: bool) -> None:
    reference, candidate = pair(result)
    difference = np.abs(candidate.astype(int) - reference)
    browser.open(page, script=script)
    choose(browser, "difference")
    gain = 8
    if script:
        reach(browser, "focused.id === 'gain'")
        browser.press(*RIGHT)
        gain = 9
    assert browser.run("document.querySelector('output[for=gain]').value") == str(gain)
    expected = np.minimum(gain * difference, 255)
    assert np.abs(picture(browser, 2) - expected).max() <= 1  # the browser may round
    assert expected.max() == 255
    assert (expected < 255).any()


def test_the_slider_shows_the_reference_on_its_left(browser: Browser, result: Any, page: Path) -> None:
    reference, candidate = pair(result)
    browser.open(page)
    choose(browser, "slider")
    reach(browser, "focused.id === 'split'")
    browser.run("document.activeElement.value = 24")
    browser.press(*RIGHT)  # to 25 %, an eighth pixel of 32
    shown = picture(browser, 2)
    np.testing.assert_array_equal(shown[:, :7], reference[:, :7])
    np.testing.assert_array_equal(shown[:, 9:], candidate[:, 9:])


def test_flicker_shows_the_one_and_then_the_other(browser: Browser, result: Any, page: Path) -> None:
    reference, candidate = pair(result)
    for moment, expected in ((100, reference), (700, candidate), (1300, reference)):
        browser.open(page)
        choose(browser, "flicker")
        browser.run(f"document.getAnimations().forEach(a => {{ a.pause(); a.currentTime = {moment}; }})")
        assert browser.run("document.getAnimations().length") > 0
        np.testing.assert_array_equal(picture(browser, 2), expected)


def test_without_a_script_all_is_there_to_read(browser: Browser, page: Path) -> None:
    browser.open(page, script=False)
    assert browser.run("document.documentElement.className") == ""
    assert browser.run("document.querySelectorAll('.needs-script').length") == 2
    assert browser.run("[...document.querySelectorAll('.needs-script')].every(e => !e.getClientRects().length)")
    shown = browser.run("document.body.innerText")
    for text in (f"Chosen: {INT8}", "All variants", "psnr_db_min", "Sensitivity of each layer", "Conditions"):
        assert text in shown
    browser.run("document.querySelector('#layers ~ details summary').focus()")
    browser.press(*ENTER)
    assert "no int8 kernel" in browser.run("document.body.innerText")


def test_the_charts_marks_and_words_are_inside_their_drawing(browser: Browser, page: Path) -> None:
    for size in (DESKTOP, PHONE):
        browser.open(page, *size)
        outside = browser.run(
            """[...document.querySelectorAll('svg')].flatMap(svg => {
              const frame = svg.getBoundingClientRect();
              return [...svg.querySelectorAll('text, path, circle')].filter(e => {
                const r = e.getBoundingClientRect();
                return r.left < frame.left - 1 || r.right > frame.right + 1
                  || r.top < frame.top - 1 || r.bottom > frame.bottom + 1;
              }).map(e => e.textContent);
            })"""
        )
        assert outside == []
        assert box(browser, "svg")["width"] > 300
