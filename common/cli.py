"""The command line of a script and the end of its process: shared flags, ranges, presets, signals, one-line errors.

A script calls `ARGS = parse(Args, PRESETS, __doc__)` under its first `if __name__ == "__main__":`, before the imports
that take seconds, and ends with `start(main, ARGS)` under a second one. Importing this module needs no torch.
"""

import contextlib
import dataclasses
import errno
import inspect
import io
import os
import re
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Annotated, Any, Literal, NoReturn

from common.files import disk_full
from common.launch import Launch, Stopped, UserError, command_line, flush, launched_as, nobody_reads

OUT_OF_MEMORY = r"out of memory|not enough memory: you tried|CUBLAS_STATUS_ALLOC_FAILED"  # CUDA and MPS, CPU, cuBLAS
# The words of gloo and of the store for a process that is gone.
LOST_CONTACT = r"(closed|reset) by peer|Broken pipe|Timed out waiting|Connection was likely closed"
THE_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE}
# How long another rank waits for rank 0 to report the same error: before the processes have met, when rank 0 may still
# be importing on a busy machine, and after.
SECONDS_FOR_RANK_0 = {False: 90, True: 15}


# ---------------------------------------------------------------------------------------
# Flags: their ranges, and those that all scripts share


@dataclass(frozen=True)
class Range:
    """Limits of a field's number, or of all in its tuple. ends: "[)" for low <= x < high."""

    low: float | None = None
    high: float | None = None
    ends: str = "[]"

    def __contains__(self, x: float) -> bool:
        low = self.low is None or x > self.low or (x == self.low and self.ends[0] == "[")
        return low and (self.high is None or x < self.high or (x == self.high and self.ends[1] == "]"))

    def __str__(self) -> str:
        low = f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}" if self.low is not None else ""
        high = f"{'at most' if self.ends[1] == ']' else 'below'} {self.high}" if self.high is not None else ""
        return " and ".join(filter(None, (low, high)))


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, 1, "[)")]
Positive = Annotated[float, Range(0, ends="(]")]
NonNegative = Annotated[float, Range(0)]


@dataclass
class Frame:
    """Flags with one meaning in every script; a script's Args inherits them."""

    preset: str = "digits"
    """configuration to start from; every other flag overrides it"""
    dataset: str = "digits"
    """real data set; `folder`: your own images in data_dir"""
    data_dir: str | None = None
    """where the data set lies or is downloaded to; for `folder`: DIR/train/<class>/, DIR/test/<class>/"""
    output_dir: str | None = None
    """run folder; None: runs/<script>/<preset>-seed<seed>"""
    seed: Natural = 0
    """seed of the trainings; what is drawn has gen_seed"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: a frozen generator is bfloat16, other networks compute under autocast; what is trained, its optimizer, the
    VAE's weights, losses and the sampler's state stay in float32"""
    compile: bool = False
    """torch.compile the networks that draw (of gafi.py all): minutes of start-up, then faster on a GPU"""
    deterministic: bool = True
    """cuDNN's kernels that give equal bits in every run; --no-deterministic: the fastest, found by trial"""
    stages: tuple[str, ...] = ()
    """stages to run, in order; a finished stage is never run again"""
    resume: bool = True
    """continue in the run folder; --no-resume: refuse a folder that is not empty"""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """where scalars go besides metrics.jsonl"""
    workers: Natural = 8
    """loader processes per rank; 0: load in the training process"""
    plan: Literal["h100", "a100", "l4", "cpu"] | None = None
    """print what the run will do and cost on this accelerator, and do nothing; --plan alone: h100"""
    plan_processes: Count | None = None
    """processes that --plan counts with; None: WORLD_SIZE, else 1"""


# Flags of the frame that change no result: a run may be continued with other values.
SPEED_FLAGS = "output_dir device compile deterministic stages resume track workers plan plan_processes".split()


def flag(field: str) -> str:
    """A field of Args as it is typed: gen_micro_batch -> --gen-micro-batch."""
    return "--" + field.replace("_", "-")


def check(args: Any) -> None:
    """Raise UserError for the first number in args that is not finite or outside its field's Range."""
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            for limits in _ranges(hint):
                if number not in limits:  # so is nan
                    raise UserError(f"{flag(name)} {number}: must be {limits}")
            if not abs(number) < 2**63:
                raise UserError(f"{flag(name)} {number}: must be a finite number, below 2^63")


def _ranges(hint: Any) -> Iterator[Range]:
    """The Ranges in a field's annotation, inside X | None and tuple[X, ...] too."""
    yield from (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Range))
    for part in [hint.__origin__] if hasattr(hint, "__metadata__") else typing.get_args(hint):
        yield from _ranges(part)


# ---------------------------------------------------------------------------------------
# From words to Args


def parse(Args: type, presets: dict[str, dict[str, Any]], doc: str) -> Any:
    """The command line as an Args: a preset's values, overridden by flags, every number in its range.

    presets: {name: {field: value}}, the first is the default. A wrong flag ends the process with exit code 2; the last
    line then begins with "error:". From here on SIGINT and SIGTERM end the process in an orderly way. Under torchrun
    only rank 0 prints.
    """
    _listen_to_signals()
    for stream in (sys.stdout, sys.stderr):  # a terminal without "±" gets "?", not an exception at the last stage
        with suppress(AttributeError, ValueError):  # not a stream of our own, as in a test
            stream.reconfigure(errors="replace")
    try:
        _set_launch(planning=any(word.startswith("--plan") for word in sys.argv))
        return _parse(Args, presets, doc, sys.argv[1:])
    except (UserError, BrokenPipeError) as error:  # the latter: --help | head -1
        _end(error)
        raise
    except SystemExit:  # --help
        flush()
        raise


def _parse(Args: type, presets: dict[str, dict[str, Any]], doc: str, words: list[str]) -> Any:
    """As parse, for any words. UserError for what tyro refuses, SystemExit after --help."""
    import tyro

    names = {field.name for field in dataclasses.fields(Args)}
    for name, values in presets.items():
        assert set(values) <= names, f"preset {name}: {sorted(set(values) - names)} are no fields of Args"
    for cls in Args.__mro__[:-1]:  # show the ranges in --help
        cls.__annotations__ = {name: _shown(hint) for name, hint in inspect.get_annotations(cls).items()}

    chosen = next(iter(presets))
    for i, word in enumerate(words):
        if word.startswith("--preset="):
            chosen = word.partition("=")[2]
        elif word == "--preset" and i + 1 < len(words):  # a missing name is tyro's to explain
            chosen = words[i + 1]
        elif word == "--plan" and (i + 1 == len(words) or words[i + 1].startswith("-")):
            words[i] = "--plan=h100"
    if chosen not in presets:
        raise UserError(f"--preset {chosen}: unknown preset; choose one of: {', '.join(presets)}")
    default = dataclasses.replace(Args(), preset=chosen, **presets[chosen])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            talk = _state.launch.rank == 0
            args = tyro.cli(Args, args=words, default=default, description=doc, console_outputs=talk)
    except SystemExit as end:
        if not end.code:
            raise
        # tyro draws a box: title, what is wrong, a rule, perhaps flags that are meant.
        lines = "\n".join(line.strip("│ ") for line in said.getvalue().splitlines()[1:])
        problem, *more = [part for part in re.split(r"(?m)^\W*$", lines) if part.strip()] or ["unusable flags"]
        problem, near = " ".join(problem.split()).rstrip("."), re.findall(r"(?m)^(--[\w-]+)", "\n".join(more))
        if near and problem.startswith("Unrecognized"):
            problem += f" (perhaps {' or '.join(dict.fromkeys(near))})"
        raise UserError(f"{problem}; see --help") from None
    check(args)
    return args


def _shown(hint: Any) -> Any:
    """An annotation with a text for tyro if it holds a Range: "(default: 16; at least 1)"."""
    import tyro

    limits = ", ".join(dict.fromkeys(map(str, _ranges(hint))))
    if not limits or not all(isinstance(mark, Range) for mark in getattr(hint, "__metadata__", ())):
        return hint
    return Annotated[hint, tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default}; {limits})")]


# ---------------------------------------------------------------------------------------
# The end of a run

# What the handlers need to know: this process among the others; is main at work; the signal received; was its message
# printed; the exit code once the end is decided; why another thread ended the run; what fills the memory just now.
_state = SimpleNamespace(launch=Launch(), at_work=False, signal=0, told=False, exit_code=None, owner=0, reason="")
_state.stage, _state.memory_flag, _state.begun, _state.batches = "", None, False, {}


def start(main: Callable[[Any], None], args: Any) -> None:
    """main(args), ended in an orderly way.

    UserError, full disk and too little memory end with one line on stderr and exit code 2; SIGINT and SIGTERM with the
    command that continues, 130 and 143; a reader that goes away (`| head -1`) silently; all else with its traceback.
    """
    _listen_to_signals()
    _state.batches = {flag(f): value for f, value in vars(args).items() if f.endswith("_batch")}
    _state.at_work, _state.reason = True, ""
    set_stage("", None)
    try:
        _set_launch(planning=getattr(args, "plan", None) is not None)
        main(args)
        flush()
    except BaseException as error:
        _end(error)
        raise
    finally:
        _state.at_work = False


def set_stage(stage: str, memory_flag: str | None, begun: bool = False) -> None:
    """What runs now, and the flag to name when the memory does not suffice. begun: it can no longer be changed."""
    _state.stage, _state.memory_flag, _state.begun = stage, memory_flag, begun


def end_with(line: str) -> None:
    """End the run with this error, from any thread."""
    _state.reason = line
    os.kill(os.getpid(), signal.SIGTERM)


def _set_launch(planning: bool) -> None:
    # A plan is one process's work, whatever WORLD_SIZE says.
    _state.launch = launched_as() if "RANK" in os.environ or not planning else Launch()


def _listen_to_signals() -> None:
    _state.owner, _state.signal, _state.told = os.getpid(), 0, False

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != _state.owner:  # a forked data loader: its parent ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if _state.exit_code is not None:
            os._exit(_state.exit_code)
        again, _state.signal = _state.signal, _state.signal or number
        if again or not _state.at_work:  # leave at once; atomic writes make that safe
            _farewell()
            os._exit(128 + _state.signal)
        raise Stopped

    def dropped(found: Any, usual: Any = sys.__unraisablehook__) -> None:
        if not isinstance(found.exc_value, Stopped) or os.getpid() != _state.owner:
            return usual(found)
        _farewell()  # the signal came inside a __del__, where Python drops what is raised
        os._exit(128 + _state.signal)

    sys.unraisablehook = dropped
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _farewell() -> None:
    if _state.launch.rank == 0 and not _state.told:
        _state.told = True
        how = "submit the job again, or continue with" if os.environ.get("ENVIRONMENT") == "BATCH" else "continue with"
        with suppress(OSError, UserError):  # print is not allowed in a handler
            os.write(2, f"\nstopped; {how}: {command_line()}\n".encode(errors="surrogateescape"))


def _end(error: BaseException) -> None:
    """Leave the process with a message; returns when the error should end it with its traceback."""
    if _state.reason:
        error, _state.signal = UserError(_state.reason), 0
    if _state.signal:  # a signal in the middle of library code may arrive here as that library's error
        _farewell()
        _quit(128 + _state.signal)
    if isinstance(error, BrokenPipeError) and nobody_reads():
        _quit(128 + signal.SIGPIPE)
    rank, line = _state.launch.rank, _explain(error)
    if line is None:
        if _state.launch.world == 1:
            return
        sys.stderr.write(f"rank {rank}: {traceback.format_exc()}")
        _quit(1)
    if "--no-resume" in sys.argv:
        line = line.replace("run the same command again", "run the same command again, without --no-resume")
    if rank != 0:
        _let_rank_0_speak()
    print("error:" if rank == 0 else f"error on rank {rank}:", line, file=sys.stderr)
    _quit(2)


def _explain(error: BaseException) -> str | None:
    """The one line for an error that needs no traceback, else None."""
    text, place = str(error), getattr(error, "filename", None)
    if isinstance(error, UserError):  # perhaps from a torch DataLoader, which wraps it into the worker's traceback
        return text.rpartition("UserError: ")[2].strip() if "Original Traceback" in text else text
    if disk_full(error):
        return f"disk full{f' at {place}' if place else ''}; free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in THE_DISK and place:
        return f"{place}: {error.strerror}; put that right and run the same command again"
    if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, text):
        micro = {name: n for name, n in _state.batches.items() if name.endswith("micro-batch")}
        values = {_state.memory_flag: _state.batches.get(_state.memory_flag, "?")} if _state.memory_flag else micro
        advice = "halve " + (" or ".join(f"{k} (now {n})" for k, n in values.items() if n != 1) or "the batch size")
        if values and set(values.values()) == {1}:
            advice = "start more processes, which share a batch, or choose a smaller batch, resolution or model"
        where = f" in stage {_state.stage}" if _state.stage else ""
        advice += " in a new --output-dir" if _state.begun else " and run the same command again"
        first = "free some of it and run the same command again, or " if _state.begun else ""
        return f"out of memory{where}; {first}{advice}"
    if _state.launch.world > 1 and isinstance(error, RuntimeError) and re.search(LOST_CONTACT, text):
        return f"lost contact with another process, whose own message tells why ({text.splitlines()[0]})"
    return None


def _let_rank_0_speak() -> None:
    """Most errors hit every rank; rank 0 reports them, and the launcher then ends this process quietly."""
    _state.exit_code = 2
    td = sys.modules.get("torch.distributed")
    time.sleep(SECONDS_FOR_RANK_0[bool(td and td.is_available() and td.is_initialized())])


def _quit(code: int) -> NoReturn:
    flush()
    if _state.launch.world == 1:
        sys.exit(code)
    os._exit(code)  # an orderly exit could wait for the others in a collective for ever
