"""What a student sees: notebooks in JupyterLab, run and moved by keyboard in a headless Chromium."""

from __future__ import annotations

import statistics
from pathlib import Path

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

HERE = Path(__file__).resolve().parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}

SETUP = f"""
import sys, tempfile
sys.path.insert(0, {str(HERE)!r})
import tiny
from labkit.results import Store
from labkit.ui.panel import Panel
store = Store(tempfile.mkdtemp() + "/results.sqlite")
tiny.fill(store)
"""
PANEL = "panel = Panel(tiny.Rounding, tiny.Tiny(), store, tiny.HOW, measure=tiny.measure, hashes=tiny.HASHES)"
EXPLORE = """
from labkit.ui import plots
from labkit.ui.explore import explore

def curve(batch, log):
    if batch == 16:
        raise ValueError("batch = 16 is not allowed: it must be 1 to 8.")
    xs = [1, 2, 4, 8]
    return plots.lines({"tokens": (xs, [x * batch for x in xs])}, "threads", "tokens/s", logy=log), f"At batch {batch}."

explorer = explore(curve, batch=[1, 2, 4, 8, 16], log=False, help={"batch": "sequences at once"})
"""

CHAT = f"""
import sys, time
sys.path.insert(0, {str(HERE.parent)!r})
from tiny_models import tiny
from labkit.talk import Talk
from labkit.ui.lessons.chat import Chat

stream = Talk._stream

def slowly(talk):
    for token in stream(talk):
        time.sleep(0.1)  # slow enough to be seen
        yield token

Talk._stream = slowly
chat = Chat(tiny(), tiny(), prompt="abc", max_new_tokens=40, names=("32 bits", "4 bits"), graph=False)
"""


def write(server, name: str, *cells: str) -> str:
    notebook = nbformat.v4.new_notebook(metadata=KERNEL, cells=[nbformat.v4.new_code_cell(c.strip()) for c in cells])
    nbformat.write(notebook, server.root / name)
    return name


@pytest.fixture
def notebook(server, lab):
    """The tiny panel, run and on the screen."""
    book = lab(write(server, "tiny.ipynb", SETUP, PANEL, "panel"))
    book.run_all()
    book.wait_for_figures(3)
    return book


def test_a_slider_move_is_answered_from_the_store(notebook, record_property):
    book = notebook
    assert "4 bits" in book.text("sentence") and "of their bytes" in book.text("sentence")
    assert "Predict: if you move bits from 4 to 3" in book.text("ask")
    before, page_ms, python_ms = book.figures(), [], []
    for key, bits in [("ArrowRight", b) for b in (5, 6, 7, 8)] + [("ArrowLeft", b) for b in (7, 6, 5, 4, 3, 2)]:
        ms = book.press("bits", key)
        if bits % 2:  # not in the store: measuring starts, and never holds up what the store can answer
            assert "Not in the store yet" in book.text("sentence")
        else:
            book.wait_for_text("status", "nswered in .* from the store")
            assert book.text("sentence").startswith(f"At {bits} bits")
            page_ms.append(ms)
            python_ms.append(book.answered_ms())
    record_property("event_to_label_ms", page_ms)
    record_property("python_ms", python_ms)
    print(f"\nfrom the key to the new sentence: {statistics.median(page_ms):.0f} ms (in Python {python_ms})")
    book.wait_for_new_figures(before)
    assert "Compared with 4 bits" in book.text("sentence")  # the last setting that was shown
    book.screenshot("panel")
    assert book.errors == []


def test_a_miss_is_measured_in_the_background_and_can_be_cancelled(notebook):
    book = notebook
    book.press("bits", "ArrowLeft")
    assert "Not in the store yet" in book.text("sentence")
    cancel = book.page.locator(".labkit-live button", has_text="Cancel")
    cancel.wait_for(state="visible")
    book.wait_for_text("progress", "perplexity on .*: [1-9]", seconds=120)
    book.screenshot("measuring")
    cancel.click()
    book.wait_for_sentence("Cancelled: 3 bits")
    cancel.wait_for(state="hidden")
    book.click("Measure here")
    book.wait_for_sentence("At 3 bits", seconds=120)
    book.wait_for_text("status", "Measured just now")
    book.press("bits", "ArrowRight")
    book.press("bits", "ArrowLeft")
    book.wait_for_sentence("At 3 bits")
    book.wait_for_text("status", "nswered in .* from the store")  # which has it now
    assert book.errors == []


def test_an_error_is_one_sentence_and_reset_recovers(server, lab):
    book = lab(write(server, "error.ipynb", SETUP, PANEL, "panel.controls['symmetric'].value = True", "panel"))
    book.run_all()
    for _ in range(3):
        book.press("bits", "ArrowRight")
    book.wait_for_sentence("bits = 7 with symmetric = True is not allowed here", seconds=120)
    book.screenshot("error")
    book.click("Reset")
    book.wait_for_sentence("At 4 bits")
    assert book.errors == []


def test_the_dark_theme_is_readable(server, lab):
    book = lab(write(server, "dark.ipynb", SETUP, PANEL, "panel"), dark=True)
    book.run_all()
    book.wait_for_figures(3)
    book.screenshot("dark")
    # The text in the figures has the page's own colour, far from the page's background.
    color, page = book.page.evaluate(
        """() => [getComputedStyle(document.querySelector('.labkit-live .js-plotly-plot text')).fill,
                  getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor]"""
    )
    assert abs(_lightness(color) - _lightness(page)) > 0.5
    assert book.errors == []


def test_explore_redraws_and_shows_errors(server, lab, record_property):
    book = lab(write(server, "explore.ipynb", EXPLORE, "explorer"))
    book.run_all()
    book.wait_for_figures(1)
    book.wait_for_sentence("At batch 1.")
    before = book.figures()
    record_property("event_to_label_ms", book.press("batch", "ArrowRight"))
    assert book.text("sentence") == "At batch 2."
    book.wait_for_new_figures(before)
    for _ in range(3):
        book.press("batch", "ArrowRight")
    book.wait_for_sentence("batch = 16 is not allowed")
    book.press("batch", "ArrowLeft")
    book.wait_for_sentence("At batch 8.")
    book.screenshot("explore")
    assert book.errors == []


def test_the_chat_streams_on_enter_and_stops(server, lab):
    book = lab(write(server, "chat.ipynb", CHAT, "chat"))
    book.run_all()
    box = book.page.locator(".labkit-live .widget-text input")
    box.wait_for(state="visible", timeout=60_000)
    box.fill("xyz")
    box.press("Enter")
    book.wait_for_text("column", r"\b[3-9] tokens, [\d.]+ tokens/s", seconds=120)  # not all at once, but as they come
    book.screenshot("chat")
    book.click("Stop")
    book.wait_for_sentence("Stopped.")
    assert "40 tokens" not in book.text("column")
    book.click("Go")
    book.wait_for_sentence("Both wrote the same text.", seconds=120)
    assert "40 tokens" in book.text("column")
    assert book.errors == []


SHIPPED = [  # notebook, its live figures, a slider to move, which way, and how its sentence starts afterwards
    ("00_start_here.ipynb", 3, "bits", "ArrowLeft", "At "),
    ("01_find_the_bottleneck.ipynb", 2, "batch", "ArrowRight", "Decode, batch "),
    ("02_number_formats.ipynb", 3, "bits", "ArrowLeft", "self_attn.q_proj of block"),
    ("03_post_training_quantization.ipynb", 7, "column", "ArrowRight", "self_attn.q_proj of block"),
    ("05_zeroing_weights.ipynb", 10, "sparsity", "ArrowRight", "self_attn.q_proj of block"),
    ("07_kv_cache.ipynb", 6, "texts", "ArrowRight", "At "),
]
QUICK = {row[0] for row in SHIPPED[2:]}  # these run in the quick profile here: the full one takes minutes


@pytest.mark.model
@pytest.mark.parametrize("name, figures, label, key, start", SHIPPED, ids=[row[0] for row in SHIPPED])
def test_a_shipped_notebook_opens_runs_and_moves(server, lab, name, figures, label, key, start, record_property):
    assert (server.root / name).is_file(), f"notebooks/{name} is missing"
    if name in QUICK:
        path, full, quick = server.root / name, r"PROFILE = \"full\"", r"PROFILE = \"quick\""
        source = path.read_text(encoding="utf-8")
        assert full in source
        path.write_text(source.replace(full, quick), encoding="utf-8")
    book = lab(name)
    book.run_all(timeout=600)
    book.wait_for_figures(figures, seconds=400)
    before, drawn = book.text("sentence"), book.figures()
    ms = book.press(label, key)
    record_property("event_to_label_ms", ms)
    print(f"\n{name}: from the key to the new sentence {ms:.0f} ms")
    book.wait_for_sentence(start, seconds=600)
    assert book.text("sentence") != before
    book.wait_for_new_figures(drawn)
    book.screenshot(Path(name).stem)
    # An exercise that was left open asks for an answer, and nothing more.
    notes = [t for t in _said(book) if t.startswith(("Right.", "Not yet.", "No answer yet."))]
    assert len(notes) >= 2 and all(t.startswith("No answer yet.") for t in notes)
    assert book.errors == []


def _said(book) -> list[str]:
    """The plain text of every output in the notebook."""
    return book.page.evaluate(
        "() => [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code')"
        ".flatMap(c => c.outputs.toJSON()).map(o => [].concat(o.data?.['text/plain'] ?? []).join(''))"
    )


def _lightness(color: str) -> float:
    """``"rgb(255, 255, 255)" -> 1.0``, the mean of the channels."""
    channels = color[color.index("(") + 1 : -1].split(",")[:3]
    return sum(float(c) for c in channels) / 765
