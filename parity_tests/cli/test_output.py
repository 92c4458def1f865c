"""What a report looks like: a summary of few lines, right at 80 columns, in pipes, without colours; names whole."""

import json
import os
import re
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from outlook_parity import Check, Noise, Report
from outlook_parity.cli import progress
from outlook_parity.cli.app import app
from outlook_parity.cli.progress import steps
from outlook_parity.diagnose.advice import ADVICE, advice
from outlook_parity.report.summary import differing, lines
from outlook_parity.report.terminal import print_report
from outlook_parity.report.text import shortened, shortened_name, wrapped

NOISE = Noise(0.5, 2.0)
LONG = "model.encoder.layers.{}.self_attention.output_projection.dense"
PLACE = LONG.format(7)


def made(differ: int = 0, rows: int = 300) -> Report:
    """A report of so many modules with long names, the last of which differ."""
    checks = [Check("weights", "as given", f"{LONG.format(n)}.weight", "pass", 0.0, 0.0) for n in range(rows // 3)]
    checks.append(Check("forward", "float32", "output", "pass", 8.0, 2.0, NOISE, NOISE))
    for view in ("propagated", "torch"):
        for n in range(rows // 3):
            wrong = n >= rows // 3 - differ
            checks.append(
                Check(
                    "layers",
                    "float64",
                    LONG.format(n),
                    "mismatch" if wrong else "pass",
                    1e-12,
                    1e-3 if wrong else 1e-15,
                    view=view,
                )
            )
    checks += [
        Check("layers", "float64", "drop", "skipped", 0.0, note="called 0 times in torch"),
        Check("gradients", "float64", "mask_token", "skipped", 0.0, note="ignored: not in the port"),
        Check("gradients", "float64", "key.bias", "pass", 1e-10, 1.0, note="the true value is zero", excused=True),
    ]
    if not differ:
        return Report("pass", tuple(checks))
    first = LONG.format(rows // 3 - differ)
    return Report(
        "mismatch", tuple(checks), first_divergence=first, cause=f"GELU tanh in jax, exact in torch, at {first}"
    )


def printed(report: Report, *, width: int = 80, verbose: bool = False, title: str = "", **options: object) -> list[str]:
    console = Console(width=width, file=StringIO(), **options)
    print_report(report, console, title=title, verbose=verbose)
    return console.file.getvalue().splitlines()


def test_a_pass_of_300_rows_is_a_line_per_level_and_precision_and_the_verdict() -> None:
    report = made()
    shown = printed(report)
    assert len(shown) < 12
    for level, dtype in {(check.level, check.dtype): None for check in report.checks}:
        assert len([line for line in shown if re.match(rf"{level} +{dtype} ", line)]) == 1
    assert re.search(r"^weights +as given +pass +100 +equal$", "\n".join(shown), flags=re.MULTILINE)
    assert re.search(r"^forward +float32 +pass +1 +0.25 +output$", "\n".join(shown), flags=re.MULTILINE)
    assert shown[-1].startswith("PASS")


def test_a_line_names_the_row_that_is_nearest_to_its_bound_and_not_one_that_rounding_excuses() -> None:
    rows = (
        Check("gradients", "float64", "far", "pass", 1e-10, 1e-16),
        Check("gradients", "float64", "near", "pass", 1e-10, 5e-11),
        Check("gradients", "float64", "excused", "pass", 1e-10, 1.0, note="zero", excused=True),
    )
    (line,) = lines(rows)
    assert (line.verdict, line.rows, line.worst.name) == ("pass", 3, "near")
    wrong = Check("gradients", "float64", "wrong", "mismatch", 1e-10, None, note="missing in jax")
    (line,) = lines((*rows, wrong))
    assert (line.verdict, line.differing, line.worst.name) == ("mismatch", 1, "wrong")


def test_the_verdict_counts_what_was_waived_skipped_and_noted() -> None:
    counted = "(1 rows ignored; 1 rows skipped; 1 rows noted)"
    assert str(made()).endswith(counted)
    assert f"checks differ {counted}; GELU" in str(made(2))
    left_out = Report("pass", notes=("the level 'training' was left out: dropout cannot be shared",))
    assert "(training left out)" in str(left_out)
    assert "rows" not in str(Report("pass", made().checks[:100]))


def test_the_first_difference_says_what_where_why_and_what_to_try() -> None:
    report = made(4)
    text = "\n".join(printed(report, width=300))
    assert f"what    layers, float64: {report.first_divergence}, on torch's input: found 0.001, at most 1e-12" in text
    assert f"where   {report.first_divergence}\n" in text
    assert f"why     {report.cause}\n" in text
    assert "try     jax.nn.gelu(x, approximate=False)" in text
    assert "first of 8 rows that differ" in text
    assert "\n  … and 2 more: 2 layers, float64\n" in text
    assert differing(report.checks, report.first_divergence, report.cause)[0].view == "torch"


def test_a_weight_is_the_first_difference_where_it_is_the_cause() -> None:
    rows = (
        Check("forward", "float64", "output", "mismatch", 1e-12, 0.1),
        Check("weights", "as given", "head.bias", "mismatch", 0.0, 0.1),
        Check("weights", "as given", "head.weight", "mismatch", 0.0, 0.1),
    )
    first, *_ = differing(rows, "head", "weight head.weight: transposed in one of them")
    assert first.name == "head.weight"


@pytest.mark.parametrize("width", [80, 100, 132])
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("differ", [0, 4])
def test_no_line_on_a_terminal_is_wider_than_it(width: int, verbose: bool, differ: int) -> None:
    shown = printed(
        made(differ),
        width=width,
        verbose=verbose,
        title="my.torch:model and my.jax:model",
        force_terminal=True,
        no_color=True,
    )
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown]
    assert max(map(len, shown)) <= width


def test_a_pipe_has_80_columns_but_for_the_verdict_which_is_one_line() -> None:
    *others, last = printed(made(4))
    assert max(map(len, others)) <= 80
    assert last == str(made(4))


def test_verbose_has_every_row_under_its_whole_name() -> None:
    report = made(4)
    text = "\n".join(printed(report, verbose=True))
    for check in report.checks:
        assert re.search(rf"^  {re.escape(check.name)}(,| |$)", text, flags=re.MULTILINE), check.name
    assert "ignored: not in the port" in text
    assert len(printed(report)) < 30 < len(printed(report, verbose=True))


def test_a_name_that_no_line_holds_is_shortened_in_the_middle_and_keeps_whole_parts() -> None:
    assert shortened_name(PLACE, 200) == PLACE
    assert shortened_name(PLACE, 40) == "model.….output_projection.dense"
    assert shortened_name(PLACE, 14) == "model.….dense"
    assert shortened_name("SGD: momentum of blocks.0.norm.weight", 20) == "SGD: ….0.norm.weight"
    assert len(shortened_name("x" * 100, 20)) == 20
    assert list(wrapped(f"weight {PLACE}: wrong", 30)) == ["weight model.….dense: wrong"]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_there_is_no_escape_sequence_without_colours(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = "\n".join(printed(made(4), force_terminal="TERM" not in environment, color_system="auto"))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)
    assert not re.search(r"[\u2500-\u257f]", shown)  # lines of boxes


def test_a_name_is_neither_markup_nor_steers_the_terminal() -> None:
    row = Check("forward", "float64", "[bold]x[/]\x1b[2J", "mismatch", 1e-12, 0.1)
    for verbose in (False, True):
        text = "\n".join(printed(Report("mismatch", (row,)), verbose=verbose))
        assert "[bold]x[/]\\x1b[2J" in text
        assert "\x1b" not in text


def test_no_message_is_above_2000_characters_and_a_long_list_is_counted() -> None:
    for between in ("\n", "; "):
        text = between.join(f"weight {n}: missing in jax" for n in range(2000))
        short = shortened(text)
        assert 1500 < len(short) <= 2000
        kept = short.count("weight ")
        assert short.endswith(f"missing in jax{between}… and {2000 - kept} more")
    report = Report("mismatch", made(4).checks, cause="; ".join(f"weight {n} is missing in jax" for n in range(3000)))
    assert len(str(report)) <= 2000
    assert sum(map(len, printed(report))) < 8000


@pytest.mark.parametrize(
    ("cause", "tried"),
    [
        ("Block GELU tanh in jax, exact in torch, at blocks.0", "approximate=False"),
        ("LayerNorm eps 1e-06 in jax, 1e-05 in torch, at blocks.0.norm", "epsilon=1e-05"),
        ("weight head.weight: transposed in one of them", "transpose"),
        ("weight a: jax has the values of b.c there", "loaded from b.c"),
        ("BatchNorm2d momentum 0.9 in jax, 0.1 in torch, at bn", "1 minus"),
        ("the outputs agree, the gradients do not, from a.weight backwards", "stop_gradient"),
    ],
)  # fmt: skip
def test_a_known_cause_has_advice(cause: str, tried: str) -> None:
    assert tried in str(advice(cause))


def test_every_piece_of_advice_is_one_line_that_can_be_given() -> None:
    for pattern, words in ADVICE:
        assert len(words) < 120
        fields = set(re.findall(r"{(\w+)}", words))
        assert fields == set(re.compile(pattern).groupindex)
    assert advice("nothing that anybody knows") is None
    assert "blocks.0" in str(advice("nothing that anybody knows", "blocks.0"))


def test_without_a_terminal_every_step_is_a_line_on_stderr_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with steps("loading", quiet=quiet) as step:
            step("evaluation: torch in float64", 0, 12)
            step("", 12, 12)
    out, err = capsys.readouterr()
    assert out == ""
    loading, first, last = err.splitlines()
    assert loading == "loading"
    assert re.fullmatch(r"\[ 0/12\] +\d+\.\d s  evaluation: torch in float64", first)
    assert re.fullmatch(r"\[12/12\] +\d+\.\d s  done", last)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_wait_of_more_than_a_second_is_told_without_a_terminal_unless_quiet(
    quiet: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LONG", 0.05)
    with progress.waiting("reading a.pth", quiet=quiet):
        pass
    assert capsys.readouterr() == ("", "")
    with progress.waiting("reading a.pth", quiet=quiet):
        time.sleep(0.3)
    assert capsys.readouterr() == ("", "" if quiet else "reading a.pth\n")


def test_the_command_prints_a_summary_and_with_v_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = ["verify", "--model", "layer", "--dtype", "float64", "--level", "forward"]
    short, long, quiet = (CliRunner().invoke(app, [*given, *more]) for more in ([], ["-v"], ["--quiet", "--json"]))
    assert short.exit_code == long.exit_code == quiet.exit_code == 0
    assert "attn.weight" in long.stdout
    assert "attn.weight" not in short.stdout
    assert len(short.stdout.splitlines()) < 12
    assert "evaluation: torch in float64" in short.stderr
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["verdict"] == "pass"


CRASHES = """
import torch
from flax import nnx

class Model(torch.nn.Linear):
    def forward(self, x):
        raise RuntimeError("no")

def model():
    return Model(3, 3)

def twin():
    return nnx.Linear(3, 3, rngs=nnx.Rngs(0))
"""


@pytest.mark.long(reason="verifies in a process of its own")
def test_a_crash_ends_in_exit_code_2(tmp_path: Path) -> None:
    """Also one that the verifier does not expect, which here is planted into it."""
    (tmp_path / "crashes.py").write_text(CRASHES)
    inputs = "import numpy; numpy.save('x.npy', numpy.random.rand(2, 3))"
    run = inputs + "; {}; from outlook_parity.cli.app import main; main()"
    bug = "import outlook_parity.api as api; api.verify = lambda *a, **k: {}['a bug of ours']"
    for planted, words in (("pass", "error: "), (bug, "error: KeyError: 'a bug of ours'")):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                run.format(planted),
                "verify",
                "--torch",
                "crashes:model",
                "--jax",
                "crashes:twin",
                "--inputs",
                "x.npy",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2, done.stderr
        assert words in done.stderr.splitlines()[-1]
