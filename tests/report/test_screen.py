"""Where the text for a person goes: to a stream, to the program's log, or to nobody."""

import json
import logging

import nbclient
import nbformat
import pytest

from mixlab.report.screen import Screen
from mixlab.report.tables import show_recipes
from tests.forked import mixlab

ROW = {"name": "one", "purpose": "Dots", "result": "98 %", "is_measured": True}


def speak(screen: Screen) -> None:
    screen.say("a line\x07")
    show_recipes([ROW], screen)
    with screen.progress("steps", 2) as bar:
        bar.update(1)


def test_a_log_gets_lines_and_tables_and_nothing_is_printed(caplog, capsys):
    caplog.set_level(logging.INFO, logger="mixlab")
    speak(Screen(to_log=True))
    assert caplog.record_tuples[0] == ("mixlab", logging.INFO, "a line\\x07")
    assert "Dots" in caplog.records[1].message
    assert capsys.readouterr() == ("", "")


def test_a_long_piece_of_work_takes_some_twenty_lines_and_says_its_end(capsys):
    with Screen().progress("training", 5000) as bar:
        for step in range(1, 5001):
            bar.update(step, "fine", is_news=True)
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 25
    assert lines[0].startswith("training 1/5,000")
    assert lines[-1] == "training 5,000/5,000  fine"


@pytest.mark.parametrize("options", [{"quiet": True}, {"quiet": True, "to_log": True}])
def test_a_quiet_screen_tells_nobody(options, caplog, capsys):
    caplog.set_level(logging.INFO, logger="mixlab")
    speak(Screen(**options))
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_a_screen_prints_and_does_not_log(caplog, capsys):
    caplog.set_level(logging.INFO, logger="mixlab")
    speak(Screen())
    assert "a line" in capsys.readouterr().out
    assert not caplog.records


def test_a_quiet_command_says_nothing_but_errors_and_its_object(tmp_path):
    done = mixlab("recipes", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = mixlab("recipes", "--quiet", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["recipes"]
    assert done.stderr == ""
    done = mixlab("recipes", "nothing", "--quiet", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no recipe called 'nothing'" in done.stderr
    assert mixlab("recipes", cwd=tmp_path).stdout, "quiet stayed on"


def test_a_notebook_has_one_line_that_moves(tmp_path):
    code = """
from mixlab.report import screen
with screen.Screen().progress("steps", 2) as bar:
    bar.update(1)
screen.Screen().say("done")
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(book, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [output["data"]["text/plain"] for output in book.cells[0].outputs]
    assert texts == ["", "done\n"], "the line is gone, and what was said stays"
