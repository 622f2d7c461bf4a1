"""What a start looks like, with and without a terminal."""

from __future__ import annotations

import io
import os
import re

from xllm.cli.screen import LaunchScreen


def test_lines_where_there_is_no_terminal():
    out = io.StringIO()
    screen = LaunchScreen(out)
    for done in range(0, 101, 5):
        screen.bar("w", done << 20, 100 << 20, "bytes")
    screen.line("after")
    screen.close_bars()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["25%", "50%", "75%", "100%"]
    assert "100.0 MiB" in lines[0]
    assert lines[-1] == "after"


def test_a_bar_on_a_terminal():
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        screen = LaunchScreen(terminal)
        screen.line("before")
        for done in range(5):
            screen.bar("weights", done << 20, 4 << 20, "bytes")
        screen.line("between [brackets] {and} so on")
        screen.close_bars()
        screen.line("after")
        shown = ""
        while "after" not in shown:
            shown += os.read(leader, 1 << 16).decode()
    os.close(leader)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "weights" in plain
    assert "between [brackets] {and} so on" in plain
    assert plain.index("before") < plain.index("between") < plain.index("after")


def test_a_reader_that_left_is_no_failure():
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w", buffering=1)
    screen = LaunchScreen(stream)
    screen.line("nobody reads this")
    screen.line("nor this")
    try:
        stream.close()
    except BrokenPipeError:
        pass  # what was buffered could not leave either
