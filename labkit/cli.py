"""The command line. Each method's flags are made from its knobs; torch is imported only by a command that needs it.

Exit codes: 0 done; 1 it failed, or a check did not hold; 2 the input was bad; 130 interrupted.
One sentence on stderr says why; with ``LABKIT_DEBUG=1`` the traceback is shown instead.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import io
import json
import os
import sys
import textwrap
import warnings
from pathlib import Path

from labkit import install

OVERVIEW = """\
commands:
  methods    every technique and its knobs
  show       one technique: what it does, its paper, each knob
  compress   apply a technique, or several in a row, to a model and save it
  measure    accuracy, memory and latency of a model, on this machine
  sweep      measure many settings of a technique, into the store
  reproduce  run again a sweep whose results ship with labkit
  generate   let a model write, as one graph, with its pace
  export     write a model for another runtime
  regress    run the notebooks and compare their numbers with the baselines
  fetch      download and check the model and other assets
  doctor     is everything here that labkit needs?

examples:
  labkit compress rtn --bits 4 --group-size 64 --out small
  labkit measure small --against default
  labkit sweep rtn --bits 2,3,4 --group-size 32,64,none

`labkit COMMAND --help` tells more.
"""
TAKES_METHODS = ("compress", "sweep", "generate")
QUICK = {"windows": 2}  # --quick: 2 evaluation windows per text in place of 8
MODEL_HELP = 'a folder, the id of a model on the hub, or "default": the embedded SmolLM2-135M-Instruct'


class UsageError(Exception):
    """Something on the command line is not allowed: exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence in place of the usage text, and no abbreviated flags."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UsageError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` tells more.")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    _never_stop_at_a_letter()
    try:
        with _plain_warnings():
            options = _parse(words)
            return int(options.run(options) or 0)
    except SystemExit as stop:  # argparse, after --help or --version
        return int(stop.code or 0)
    except BrokenPipeError:  # `labkit methods | head`
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        _say("interrupted", error)
        return 130
    except Exception as error:
        if os.environ.get("LABKIT_DEBUG", "") not in ("", "0"):
            raise
        bad_input = isinstance(error, UsageError | ValueError | FileExistsError)
        ours = bad_input or isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "labkit"
        text = " ".join(str(error).split())
        text = text if len(text) <= 500 else f"{text[:350]} … {text[-140:]}"  # somebody pasted a text as a word
        _say(text if ours and text else f"{type(error).__name__}: {text} (LABKIT_DEBUG=1 shows where.)", error)
        return 2 if bad_input else 1


def _never_stop_at_a_letter() -> None:
    """Into a pipe or a file Windows writes its old code page, which has no → or ₂: they come out as \\u2192, no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _say(text: str, error: BaseException) -> None:
    """Print to stderr, with what was noted on the error on its way up."""
    for line in (f"labkit: {text}", *getattr(error, "__notes__", ())):
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)  # a word may hold undecodable bytes


@contextlib.contextmanager
def _plain_warnings():
    """Show labkit's own warnings as a sentence, without the line of code that gave them."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message, category, *args, **kwargs):
            if category is UserWarning:
                print(f"labkit: {message}", file=sys.stderr)
            else:
                usual(message, category, *args, **kwargs)

        warnings.showwarning = show
        yield


# The words


def _parse(words: list[str]) -> argparse.Namespace:
    commands = _commands()
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise UsageError(
            f"There is no command {words[0]!r}{_close(words[0], commands)}. They are: {', '.join(commands)}."
        )
    if not words or words[0] not in TAKES_METHODS:
        return _parser().parse_args(words or ["--help"])
    # argparse knows nothing of knobs, chains of methods, or values such as -3: those words are taken out first.
    command = commands[words[0]](None)
    takes_value = {flag: action.nargs != 0 for action in command._actions for flag in action.option_strings}
    steps, rest = _split(words[1:], takes_value)
    if not steps and words[0] != "generate" and not {"-h", "--help"} & set(rest):
        raise UsageError(f"Name a method, as in `labkit {words[0]} rtn --bits 4`; `labkit methods` lists them.")
    knobs = "\n".join(_knob_table(cls) for cls in dict.fromkeys(cls for cls, _ in steps))
    options = _parser(knobs).parse_args([words[0], *rest])
    options.steps = steps
    return options


def _split(words: list[str], own: dict[str, bool]) -> tuple[list[tuple[type, dict[str, str]]], list[str]]:
    """Sort words into methods with the texts of their knobs, and the command's own flags (flag -> takes a value)."""
    steps, rest, words = [], [], list(words)
    due = True  # the next bare word is a method's name
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag in own:
            rest.append(word)
            if own[flag] and not equals and words:
                rest.append(words.pop(0))
        elif word == "+" and not due:
            due = True
        elif due and word != "+" and not word.startswith("-"):
            steps.append((find_method(word), {}))
            due = False
        elif word.startswith("--") and not due:
            cls, texts = steps[-1]
            name = flag[2:].replace("-", "_")
            knobs = cls.knobs()
            if name not in knobs:
                known = [_flag(k) for k in knobs] + [f for f in own if f.startswith("--")]
                raise UsageError(
                    f"{cls.__name__} has no flag {flag}{_close(flag, known)}. There are: {', '.join(known)}."
                )
            if name in texts:
                raise UsageError(f"{flag} is given twice for {cls.__name__}.")
            if not equals:
                if knobs[name].type is bool and (not words or words[0] == "+" or words[0].startswith("--")):
                    value = "true"  # --symmetric alone
                elif not words:
                    raise UsageError(f"{flag} needs a value: {knobs[name].allowed}.")
                else:
                    value = words.pop(0)
            texts[name] = value
        else:
            due_text = "a method's name" if due else "a flag, or + and another method"
            raise UsageError(f"{word!r} is not expected here, but {due_text}. `labkit methods` lists the methods.")
    if steps and due:
        raise UsageError("After the last + a method's name is missing.")
    return steps, rest


def find_method(word: str) -> type:
    """The method with this name, in any case; UsageError with close matches where there is none."""
    import labkit

    known = labkit.methods()
    name = {name.lower(): name for name in known}.get(word.lower().replace("-", "").replace("_", ""))
    if name is None:
        raise UsageError(f"There is no method {word!r}{_close(word, known)}. `labkit methods` lists all {len(known)}.")
    return known[name]


def _close(word: str, known) -> str:
    """``": did you mean RTN?"`` or nothing."""
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(word.lower(), lower, n=2)
    return f": did you mean {' or '.join(lower[n] for n in near)}?" if near else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _method(cls: type, texts: dict[str, str]):
    """An instance of a method from its knobs' texts; UsageError that names knob, value and what is allowed."""
    knobs = cls.knobs()
    try:
        return cls(**{name: knobs[name].parse(text) for name, text in texts.items()})
    except ValueError as error:
        raise UsageError(_owned(cls, error)) from error


def _owned(cls: type, error: ValueError) -> str:
    """Knob.parse does not know whose knob it is."""
    text = str(error)
    return text if text.startswith(cls.__name__) else f"{cls.__name__}.{text}"


def _knob_table(cls: type) -> str:
    lines = [f"knobs of {cls.__name__}:"]
    for name, k in cls.knobs().items():
        head = f"  {_flag(name)} {'none' if k.default is None else k.default}"
        lines.append(f"{head:<24}  {k.allowed}")
        lines += textwrap.wrap(k.help, 110, initial_indent=" " * 26, subsequent_indent=" " * 26)
    return "\n".join(lines) + "\n"


# The parsers


def _parser(knobs: str = "") -> Parser:
    """All of it; ``knobs`` is shown in the help of the commands that take methods."""
    parser = Parser(
        prog="labkit",
        description="What is the bottleneck of a language model, and which compression technique shifts it?",
        epilog=OVERVIEW,
        usage="labkit COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"labkit {install.version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS, required=True)
    for name, make in _commands().items():
        made = make(subparsers)
        if knobs and name in TAKES_METHODS:
            made.epilog = f"{knobs}\n{made.epilog}"
    return parser


def _commands() -> dict:
    """Command -> function that makes its parser, under ``labkit`` or (given None) alone."""
    return {
        "methods": _methods_parser,
        "show": _show_parser,
        "compress": _compress_parser,
        "measure": _measure_parser,
        "sweep": _sweep_parser,
        "reproduce": _reproduce_parser,
        "generate": _generate_parser,
        "export": _export_parser,
        "regress": _regress_parser,
        "fetch": _fetch_parser,
        "doctor": _doctor_parser,
    }


def _command(subparsers, name: str, run, help: str, examples: str, usage: str | None = None) -> Parser:
    text = "examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")
    kwargs = {"prog": f"labkit {name}", "description": help, "epilog": text, "usage": usage}
    parser = Parser(**kwargs) if subparsers is None else subparsers.add_parser(name, **kwargs)
    parser.set_defaults(run=run)
    return parser


def _no_progress(parser: Parser) -> None:
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="draw no progress bars")


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be a number above 0")
    return value


# labkit methods, labkit show


def _methods_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "methods",
        _run_methods,
        "Every technique that labkit has, and its knobs with their defaults.",
        "labkit methods\nlabkit methods --json",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, with what each knob allows")
    form.add_argument("--markdown", action="store_true", help="as the README's table")
    return parser


def _run_methods(options) -> None:
    import labkit

    found = labkit.methods()
    if options.json:
        print(json.dumps({name: _described(cls) for name, cls in found.items()}, indent=1))
        return
    if options.markdown:
        print(markdown(found))
        return
    rows = [("method", "kind", "calibrated", "knobs and their defaults")]
    for name, cls in found.items():
        knobs = "  ".join(f"{_flag(n)} {'none' if k.default is None else k.default}" for n, k in cls.knobs().items())
        rows.append((name, cls.kind, "yes" if cls.calibrated else "no", knobs))
    print(_columns(rows))
    print("\n`labkit show METHOD` tells what a method does and what each knob allows.")


def markdown(found: dict[str, type]) -> str:
    """The methods as a table in Markdown."""
    rows = ["| method | kind | what it does | knobs and their defaults | source |", "|---|---|---|---|---|"]
    for name, cls in found.items():
        knobs = ", ".join(f"`{n}={k.default!r}`" for n, k in cls.knobs().items())
        cells = (f"**{name}**", cls.kind, cls.summary(), knobs or "none", cls.paper)
        rows.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(rows)


def _described(cls: type) -> dict:
    fields = ("default", "low", "high", "choices", "none", "allowed", "help")
    knobs = {n: {"type": k.type.__name__} | {f: getattr(k, f) for f in fields} for n, k in cls.knobs().items()}
    return {
        "summary": cls.summary(),
        "kind": cls.kind,
        "paper": cls.paper,
        "calibrated": cls.calibrated,
        "knobs": knobs,
    }


def _columns(rows: list[tuple[str, ...]]) -> str:
    """A plain text table: columns as wide as their widest cell; the last one unpadded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows)


def _show_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "show",
        _run_show,
        "What a technique does, where it comes from, and what each of its knobs allows.",
        "labkit show rtn",
    )
    parser.add_argument("method", metavar="METHOD", help="its name, in any case; `labkit methods` lists them")
    return parser


def _run_show(options) -> None:
    cls = find_method(options.method)
    made = cls()
    flags = " ".join(f"{_flag(n)} {'none' if v is None else v}" for n, v in made.values().items())
    print(f"{cls.__name__} ({cls.kind})\n")
    print(inspect.getdoc(cls) + "\n")
    if cls.paper:
        print(f"paper: {cls.paper}")
    print(f"calibration text: {'needed' if cls.calibrated else 'not needed'}\n")
    print(_knob_table(cls))
    print(f"in Python:  labkit.{made!r}(lm)")
    print(f"here:       labkit compress {cls.__name__.lower()} {flags} --out DIR")


# labkit compress


def _compress_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "compress",
        _run_compress,
        "Compress a model with one technique, or with several one after the other, and save it to a new folder.",
        """
        labkit compress rtn --bits 4 --group-size 64 --out small
        labkit compress rtn --bits 8 + rtn --bits 4 --group-size none --out smaller
        labkit compress rtn --help
        """,
        usage="labkit compress METHOD [--KNOB VALUE ...] [+ METHOD ...] --out DIR [--model MODEL]",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="the new folder; labkit.load(DIR) reads it back")
    parser.add_argument("--model", default="default", help=MODEL_HELP)
    parser.add_argument(
        "--calib", metavar="TEXT", help='calibrate on "mixed" (default), "manual", "self" or a text file'
    )
    _no_progress(parser)
    return parser


def _run_compress(options) -> None:
    import labkit
    from labkit.measure.memory import bits_per_weight
    from labkit.results import calibrated

    parts = [_method(cls, texts) for cls, texts in options.steps]
    method = parts[0] if len(parts) == 1 else labkit.Recipe(*parts)
    out = _place("--out", options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # known before an hour of work, not after
        raise UsageError(f"{out} exists and is not an empty folder: name a new one with --out.")
    lm = load_model(options.model)
    calib = None
    if options.calib and calibrated(method):
        calib = labkit.text.calibration(lm, source=options.calib)
    elif options.calib:
        print(f"labkit: {method!r} uses no calibration text; --calib is not needed.", file=sys.stderr)
    small = method(lm, calib, options.progress)
    small.save(out)
    print(f"{method!r} on {lm.name}")
    print(f"  weights held: {lm.nbytes / 1e6:.1f} MB -> {small.nbytes / 1e6:.1f} MB")
    print(f"  bits per linear weight: {bits_per_weight(lm):.2f} -> {bits_per_weight(small):.2f}")
    print(f"  saved in {out}: labkit.load({str(out)!r}), or `labkit measure {out} --against {options.model}`")


def _place(flag: str, text: str) -> Path:
    """The path that a word names; UsageError for a word that can be none, now and not after an hour of work."""
    try:
        Path(text).lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{flag} {text!r} cannot be a path here ({reason}).") from error
    return Path(text)


def load_model(name: str):
    """labkit.load for a MODEL of the command line."""
    import labkit

    with contextlib.suppress(OSError):  # too long for the name of a file: then it is none
        if name != "default" and Path(name).is_file():
            raise UsageError(f"{name} is a file: MODEL is {MODEL_HELP}.")
    return labkit.load(None if name == "default" else name)


# labkit measure


def _measure_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "measure",
        _run_measure,
        "Measure accuracy, memory and latency of a model, now and on this machine.",
        """
        labkit measure default --quick
        labkit measure small --against default
        labkit measure small --against default --text manual --text my_essay.txt --json
        """,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--against", metavar="MODEL", help="the uncompressed model: adds KL, agreement and speed ratios"
    )
    parser.add_argument(
        "--text", action="append", help="a corpus or a text file; may be repeated (default: manual, prose)"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK['windows']} windows of each text in place of 8")
    parser.add_argument("--no-latency", dest="latency", action="store_false", help="leave the timing out")
    parser.add_argument("--json", action="store_true", help="as JSON")
    _no_progress(parser)
    return parser


def _run_measure(options) -> None:
    import labkit

    settings = {"latency": options.latency, "progress": options.progress} | (QUICK if options.quick else {})
    if options.text:
        settings["texts"] = tuple(options.text)
    # What is said on the way goes to stderr, so that stdout is the result and nothing else.
    with contextlib.redirect_stdout(sys.stderr):
        lm = load_model(options.model)
        against = load_model(options.against) if options.against else None
        found = labkit.measure(lm, against=against, **settings)
    print(json.dumps(found.to_dict(), indent=1) if options.json else found)


# labkit sweep


def _sweep_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "sweep",
        _run_sweep,
        "Measure every combination of the given knob values and keep the results in the store. What is there already "
        "is not measured again, so an interrupted sweep goes on where it stopped.",
        """
        labkit sweep rtn --bits 2,3,4 --group-size 32,64,none
        labkit sweep rtn --bits 2,3,4,5,6,7,8 --quick --no-latency --export rtn.jsonl
        labkit sweep rtn --help
        """,
        usage="labkit sweep METHOD [--KNOB VALUE,VALUE,... ...] [--model MODEL] [--quick] [--export FILE]",
    )
    parser.add_argument("--model", default="default", help=MODEL_HELP)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK['windows']} windows of each text in place of 8")
    parser.add_argument("--no-latency", dest="latency", action="store_false", help="leave the timing out")
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="then write all rows of this model, these texts and this machine, as JSON lines",
    )
    _no_progress(parser)
    return parser


def _run_sweep(options) -> None:
    import labkit
    from labkit.measure.reading import Reading
    from labkit.results import Key
    from labkit.sweep import parse_grid, sweep, text_hashes

    if len(options.steps) > 1:
        raise UsageError("sweep takes one method; `labkit compress` can chain several.")
    cls, texts = options.steps[0]
    try:
        settings = parse_grid(cls, texts)
    except ValueError as error:
        raise UsageError(_owned(cls, error)) from error
    if options.export and not _place("--export", options.export).absolute().parent.is_dir():
        raise UsageError(f"--export {options.export}: there is no such folder. Make it, or name another file.")
    lm, store = load_model(options.model), labkit.Store()
    quick = QUICK if options.quick else {}
    found = sweep(lm, settings, store, latency=options.latency, progress=options.progress, **quick)
    print(_columns([_HEAD, *map(_row, found)]))
    if options.export:
        reading = Reading.of(lm, settings[0], **quick)
        key = Key.of(lm, None, text_hashes(lm, ("manual", "prose"), **vars(reading)))
        same = {name: getattr(key, name) for name in ("model", "texts", "machine", "versions")}
        print(f"{store.export(options.export, **same)} rows written to {options.export}.")


_HEAD = ("method", "KL manual", "KL prose", "perplexity manual", "prose", "bits/weight", "MB held", "decode ms")


def _row(m) -> tuple[str, ...]:
    def number(value, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    texts = [m.quality[t] for t in ("manual", "prose")]
    return (
        m.method,
        *(number(t.kl, 4) for t in texts),
        *(number(t.perplexity, 2) for t in texts),
        number(m.memory.bits_per_weight, 2),
        number(m.memory.weights / 1e6, 1),
        number(m.latency and m.latency.decode_ms, 1),
    )


# labkit reproduce


def _reproduce_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "reproduce",
        _run_reproduce,
        "Run again a sweep whose results ship with labkit (data/sweeps.toml lists them), on this machine, and write its "
        "rows. What this machine has measured already is kept; what was interrupted goes on.",
        "labkit reproduce --list\nlabkit reproduce rtn --out mine.jsonl",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", metavar="NAME", nargs="?", help="the sweep's name")
    what.add_argument("--list", action="store_true", help="list the sweeps")
    parser.add_argument("--model", default="default", help=MODEL_HELP)
    parser.add_argument("--out", metavar="FILE", help="where the rows go (default: data/results/NAME.jsonl)")
    parser.add_argument(
        "--missing", action="store_true", help="measure only what no machine has: rows that ship are kept as they are"
    )
    _no_progress(parser)
    return parser


def _run_reproduce(options) -> None:
    from labkit import reproduce

    known = reproduce.sweeps()
    if options.list:
        print(_columns([(name, f"{len(s.methods())} settings", s.what) for name, s in known.items()]))
        return
    if options.name not in known:
        raise UsageError(
            f"There is no sweep {options.name!r}{_close(options.name, known)}. They are: {', '.join(known)}."
        )
    out = Path(options.out) if options.out else None
    if out and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {options.out}: there is no such folder. Make it, or name another file.")
    path = reproduce.reproduce(
        options.name, load_model(options.model), out=out, progress=options.progress, missing=options.missing
    )
    print(f"written to {path}")


# labkit generate


def _generate_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "generate",
        _run_generate,
        "Let a model write, token by token, and say how fast. The model runs as one graph where it can be one.",
        """
        labkit generate --prompt "The river rose in the night"
        labkit generate gptq --bits 4 --prompt "What is a bridge?" --chat
        labkit generate --model small --prompt "Salt" --max-new-tokens 200 --eager
        """,
        usage="labkit generate [METHOD --KNOB VALUE ...] --prompt TEXT [--model MODEL] [--chat] [--eager] [--kv-bits 8]",
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what to continue, or with --chat to answer")
    parser.add_argument("--model", default="default", help=MODEL_HELP)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens to write (64)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's template for questions")
    parser.add_argument("--eager", action="store_true", help="run through transformers, not as one graph")
    parser.add_argument(
        "--kv-bits", type=int, choices=(8, 4), help="keep the graph's KV cache as codes (default: fp32)"
    )
    _no_progress(parser)
    return parser


def _run_generate(options) -> None:
    from labkit.talk import Talk, fastest

    if options.eager and options.kv_bits:
        raise UsageError("--kv-bits is about the graph's cache: leave --eager out.")

    with contextlib.redirect_stdout(sys.stderr):
        lm = load_model(options.model)
        for cls, texts in options.steps:
            lm = _method(cls, texts)(lm, None, options.progress)
        model = lm if options.eager else fastest(lm, options.kv_bits)
        talk = Talk(model, options.prompt, options.max_new_tokens, options.chat)
    for piece in talk:
        print(piece, end="", flush=True)
    way = "eager" if talk.model is lm else "one graph"
    print(f"\n{talk.tokens} tokens, {talk.rate:.1f} tokens/s ({way})", file=sys.stderr)


# labkit export


def _export_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "export",
        None,
        "Write a model so that another runtime loads it: it leaves the lab.",
        "labkit export onnx small --out phone\nlabkit export onnx --help",
        usage="labkit export FORMAT [MODEL] --out PATH ...",
    )
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True, help="onnx")
    _onnx_parser(formats)
    return parser


def _export_command(formats, name: str, run, help: str, examples: str) -> Parser:
    """The parser of one format, with what all have in common: MODEL, --out and --force."""
    parser = _command(formats, name, run, help, examples)
    parser.prog = f"labkit export {name}"
    parser.add_argument("model", metavar="MODEL", nargs="?", default="default", help=MODEL_HELP)
    parser.add_argument("--out", metavar="PATH", required=True, help="where it goes")
    parser.add_argument("--force", action="store_true", help="replace what was exported there before")
    return parser


def _onnx_parser(formats) -> None:
    parser = _export_command(
        formats,
        "onnx",
        _run_export_onnx,
        "A folder for onnxruntime-genai: the model as one graph, its weights, its tokenizer and genai_config.json.",
        """
        labkit export onnx --out folder
        labkit compress gptq --bits 4 --out small && labkit export onnx small --out phone
        labkit export onnx small --out phone --head-bits 4 --context 2048 --force
        """,
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="most tokens, prompt and answer together (what the model was made for)"
    )
    for end in ("head", "embedding"):
        parser.add_argument(
            f"--{end}-bits",
            choices=("8", "4", "none"),
            default="8",
            help=f"bits of {'an' if end == 'embedding' else 'a'} {end} that is not packed yet; none: fp32 (8)",
        )


def _run_export_onnx(options) -> None:
    from labkit.export.onnx import onnx, vacant

    out = _place("--out", options.out)
    vacant(out, options.force)  # known before the work, not after
    bits = {"head_bits": options.head_bits, "embedding_bits": options.embedding_bits}
    bits = {name: None if text == "none" else int(text) for name, text in bits.items()}
    with contextlib.redirect_stdout(sys.stderr):
        lm = load_model(options.model)
        onnx(lm, out, context=options.context, overwrite=options.force, **bits)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{lm.name} ({' -> '.join(lm.history) or 'uncompressed'}): {size / 1e6:.1f} MB in {out}")
    print(f"  onnxruntime-genai loads it: onnxruntime_genai.Model({str(out)!r})")


# labkit regress


def _regress_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "regress",
        _run_regress,
        "Run notebooks with papermill, compare the numbers they record with tests/baselines, and check their budgets of "
        "time and memory. Exit code 1 on drift, a missing number, an error, a timeout or a budget that is exceeded.",
        """
        labkit regress
        labkit regress 00 01 --max-seconds 180
        labkit regress notebooks/01_find_the_bottleneck.ipynb --profile full --timeout 900
        labkit regress --update          # these numbers are the baselines from now on
        """,
    )
    parser.add_argument(
        "notebooks",
        metavar="NOTEBOOK",
        nargs="*",
        help="a file, or how a name in notebooks/ begins (default: all there)",
    )
    parser.add_argument("--profile", choices=("quick", "full"), default="quick", help="the parameter PROFILE (quick)")
    parser.add_argument(
        "--timeout", type=_above_zero, metavar="S", help="seconds for a notebook (quick 1500, full 3600)"
    )
    parser.add_argument("--cell-timeout", type=_above_zero, metavar="S", help="seconds for a cell (half of --timeout)")
    parser.add_argument("--max-seconds", type=_above_zero, metavar="S", help="budget of time (quick 90, full 360)")
    parser.add_argument("--max-gb", type=_above_zero, metavar="GB", help="budget of peak memory (quick 2, full none)")
    parser.add_argument(
        "--update", action="store_true", help="make this run's numbers the baselines, if nothing failed"
    )
    parser.add_argument(
        "--out", default="reports", metavar="DIR", help="for the reports and executed notebooks (reports/)"
    )
    parser.add_argument("--baselines", metavar="DIR", help="where the baselines are (tests/baselines)")
    return parser


def _run_regress(options) -> int:
    from labkit import regress

    for name in options.notebooks:
        _place("NOTEBOOK", name)
    report = regress.run(
        regress.find(options.notebooks),
        profile=options.profile,
        out=options.out,
        timeout=options.timeout,
        cell_timeout=options.cell_timeout,
        max_seconds=options.max_seconds,
        max_gb=options.max_gb,
        update=options.update,
        baselines=options.baselines,
    )
    print(f"\n{report}")
    return 0 if report.ok else 1


# labkit fetch


def _fetch_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "fetch",
        _run_fetch,
        "Download the model and other assets that labkit does not ship, check their sha256, and convert the model, once. "
        "What is there already is kept; what was interrupted goes on.",
        "labkit fetch\nlabkit fetch smollm2-135m-instruct --no-progress",
    )
    parser.add_argument("assets", metavar="ASSET", nargs="*", help="names in data/manifest.toml (default: all)")
    _no_progress(parser)
    return parser


def _run_fetch(options) -> None:
    from labkit import assets

    known = assets.assets()
    for name in options.assets:
        if name not in known:
            raise UsageError(f"There is no asset {name!r}{_close(name, known)}. They are: {', '.join(known)}.")
    names = options.assets or list(known)
    for name in names:
        path = assets.fetch(name, progress=options.progress)
        print(f"{name}: {path.stat().st_size / 1e6:.1f} MB, checked, in {path}")
    import labkit
    from labkit import embedded

    if embedded.ASSET in names:
        lm = labkit.load()
        print(
            f"{lm.name}: converted and ready ({lm.nbytes / 1e6:.1f} MB in memory); labkit.load() needs no network now."
        )


# labkit doctor


def _doctor_parser(subparsers) -> Parser:
    parser = _command(
        subparsers,
        "doctor",
        _run_doctor,
        "Look at this machine and say what works, what does not, and what to do. Exit code 1 where something must be done.",
        "labkit doctor\nlabkit doctor --no-network\nlabkit doctor --forget-choices   # measure the engine's threads again",
    )
    parser.add_argument("--no-network", dest="network", action="store_false", help="do not ask whether the hub answers")
    parser.add_argument(
        "--forget-choices",
        action="store_true",
        help="only throw away what was measured once for the engine: how many threads, and which prompts with dense weights",
    )
    return parser


def _run_doctor(options) -> int:
    if options.forget_choices:
        from labkit.engine import threads

        count = threads.forget()
        print(f"{count} choice{'s' * (count != 1)} forgotten; the next model that is compiled is measured again.")
        return 0
    from labkit import doctor

    found = doctor.report(network=options.network)
    print(found)
    return 0 if found.ok else 1
