"""record(): what a notebook writes down is what regress reads back, through a real kernel and papermill."""

import contextlib
import io
import json
import math

import nbformat
import numpy as np
import papermill
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.record import MIME, read_metrics, record


def notebook(path, *cells):
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": spec}), path)


@pytest.mark.notebook
def test_metrics_survive_papermill(tmp_path):
    notebook(
        tmp_path / "in.ipynb",
        "from labkit.record import record",
        "record('gptq4.kld', 0.144)\nkept = record('speed.ratio', 2, rel_tol=0.2, abs_tol=0.1, label='simulated')",
        "kept + 1",
        "try:\n    record('bad', float('nan'))\nexcept ValueError as error:\n    print(error)",
    )
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False, execution_timeout=120)
    assert read_metrics(tmp_path / "out.ipynb") == {
        "gptq4.kld": {"name": "gptq4.kld", "value": 0.144, "rel_tol": 0.05, "abs_tol": None, "label": "measured"},
        "speed.ratio": {"name": "speed.ratio", "value": 2.0, "rel_tol": 0.2, "abs_tol": 0.1, "label": "simulated"},
    }
    made = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    nbformat.validate(made)
    shown = [output["data"]["text/plain"] for output in made.cells[1].outputs]
    assert shown == ["gptq4.kld = 0.144 (measured)", "speed.ratio = 2 (simulated)"], "and people can read it"
    assert made.cells[2].outputs[0]["data"]["text/plain"] == "3", "record returns the value"
    assert read_metrics(tmp_path / "in.ipynb") == {}, "a notebook that has not been run"


def test_outside_a_notebook_the_line_is_printed(capsys):
    assert record("gptq4.kld", 0.144) == 0.144
    assert capsys.readouterr().out == "gptq4.kld = 0.144 (measured)\n"


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)])
def test_numbers_of_every_library_are_taken_and_returned(value):
    assert record("a", value) is value


@pytest.mark.parametrize(
    "change, says",
    [
        ({"name": "Kld"}, "name = 'Kld' is not allowed: it must be lower-case words with dots"),
        ({"name": "a..b"}, "name = 'a..b'"),
        ({"name": ".a"}, "name = '.a'"),
        ({"name": "4bit"}, "name = '4bit'"),
        ({"name": "a b"}, "name = 'a b'"),
        ({"name": "a\n"}, "name = "),
        ({"name": ""}, "name = ''"),
        ({"name": 3}, "name = 3"),
        ({"value": math.nan}, "value = nan of a.b is not allowed: it must be a finite number"),
        ({"value": math.inf}, "value = inf"),
        ({"value": "1"}, "value = '1'"),
        ({"value": True}, "value = True"),
        ({"value": None}, "value = None"),
        ({"value": 10**400}, "it must be a finite number"),
        ({"value": torch.zeros(3)}, "it must be a finite number"),
        ({"rel_tol": 0}, "rel_tol = 0 of a.b is not allowed: it must be a number above 0"),
        ({"rel_tol": None}, "rel_tol = None"),
        ({"rel_tol": -0.1}, "rel_tol = -0.1"),
        ({"rel_tol": math.nan}, "rel_tol = nan"),
        ({"abs_tol": 0}, "abs_tol = 0"),
        ({"abs_tol": math.inf}, "abs_tol = inf"),
        ({"abs_tol": "1"}, "abs_tol = '1'"),
        (
            {"label": "guessed"},
            "label = 'guessed' of a.b is not allowed: it must be one of measured, simulated, modelled",
        ),
        ({"label": None}, "label = None"),
    ],
)
def test_what_is_not_allowed_is_named(change, says, capsys):
    with pytest.raises(ValueError) as caught:
        record(**{"name": "a.b", "value": 1.0} | change)
    assert says in str(caught.value) and capsys.readouterr().out == ""


@given(name=st.text(), value=st.floats() | st.integers() | st.text() | st.none(), rel_tol=st.floats() | st.text())
def test_any_input_is_recorded_or_refused_with_a_value_error(name, value, rel_tol):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            record(name, value, rel_tol)
    except ValueError as error:
        assert "is not allowed: it must be" in str(error)
    else:
        assert math.isfinite(value) and rel_tol > 0 and name == name.lower()


def executed(path, *metrics):
    outputs = [{"output_type": "display_data", "metadata": {}, "data": {MIME: metric}} for metric in metrics]
    cells = [{"cell_type": "markdown", "source": "x"}, {"cell_type": "code", "source": "", "outputs": outputs}]
    path.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}))


GOOD = {"name": "a.b", "value": 1.0, "rel_tol": 0.05, "abs_tol": None, "label": "measured"}


def test_a_name_recorded_twice_is_refused(tmp_path):
    executed(tmp_path / "n.ipynb", GOOD, GOOD | {"value": 2.0})
    with pytest.raises(ValueError, match=r"n.ipynb records a.b twice"):
        read_metrics(tmp_path / "n.ipynb")


@pytest.mark.parametrize(
    "bad", [GOOD | {"value": "x"}, {"name": "a.b"}, GOOD | {"extra": 1}, [], 3, GOOD | {"label": []}]
)
def test_a_damaged_metric_is_named(tmp_path, bad):
    executed(tmp_path / "n.ipynb", bad)
    with pytest.raises(ValueError, match=r"n.ipynb has a damaged metric"):
        read_metrics(tmp_path / "n.ipynb")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"cells": 3}', '{"cells": [3]}', '{"cells": [{"outputs": [1]}]}']
)
def test_a_file_that_is_no_notebook_is_named(tmp_path, content):
    (tmp_path / "n.ipynb").write_text(content)
    with pytest.raises(ValueError, match=r"n.ipynb is not a Jupyter notebook"):
        read_metrics(tmp_path / "n.ipynb")
