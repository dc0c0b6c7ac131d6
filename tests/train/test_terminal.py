import io

from rich.console import Console

from brumby.train.terminal import LiveLog, step_line

ROW = {
    "step": 3, "phase": "code", "stage": "align", "objective": 0.25, "loss": None, "tokens_seen": 3072,
    "tokens_per_second": 128.4, "mfu": 0.4321, "step_seconds": 2.0,
}  # fmt: skip


def test_a_step_line_says_it_all():
    expected = (
        "step 3/10  phase code  stage align  objective 0.250  loss 4.568  base 2.100  tokens 3,072  tokens/s 128  "
        "MFU 43.2%  left 0:00:14"
    )
    assert step_line(ROW, 10, 4.5678, 2.1) == expected
    assert "base -" in step_line(ROW, 10, 4.5678, None)


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=140, highlight=False)
    with LiveLog(console) as log:
        log.write("[rank 0] a warning [not markup]\n")
        for step in (3, 4):
            log.write("host1: " + step_line(ROW | {"step": step}, 10, None, None) + "\n")
    return out.getvalue()


def test_lines_pass_through_where_nothing_can_be_redrawn():
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "[rank 0] a warning [not markup]"
    assert [line.split("  ")[0] for line in lines[1:]] == ["host1: step 3/10", "host1: step 4/10"]


def test_a_terminal_shows_the_last_step_in_place():
    text = shown(terminal=True)
    assert "[not markup]" in text
    assert "4/10" in text
    assert "\x1b[1A" in text  # goes up to draw over the step before
