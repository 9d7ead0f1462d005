"""Starts the processes of a run, looks after them, and is each of them: ``python -m alignkit.processes FILE``."""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit import unread
from alignkit.errors import Stopped, UserError

GRACE = 15.0  # seconds that the others have to stop by themselves once one has ended
LEFT = 3  # exit code of a process whose others are gone
ERRORS = {"UserError": UserError, "Stopped": Stopped}
NOTHING = "nothing is saved yet, so it starts from the beginning."
met = False  # whether this process has gone to meet the others: until then each finds the same mistakes


def several() -> bool:
    """Whether this process was started as one of several, by ``run``, torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether it is the first of them, or alone."""
    return not several() or os.environ.get("RANK", "0") == "0"


@contextmanager
def ending() -> Iterator[None]:
    """All that a process does. One that has met others ends here, with the exit code that it would have had, and without the rest of
    Python's own end: a group of processes that FSDP2 has used is never let go, and one of its threads that still holds a tensor by
    then aborts (pytorch issue 190489). Threads, exit handlers and open files come to theirs as ever."""
    code = 0
    try:
        yield
    except BaseException as e:
        if not met:
            raise
        if isinstance(e, SystemExit) and (e.code is None or isinstance(e.code, int)):
            code = e.code or 0
        else:
            code = 1
            if isinstance(e, SystemExit):
                print(e.code, file=sys.stderr)
            else:
                sys.excepthook(type(e), e, e.__traceback__)
    if met:
        try:
            threading._shutdown()  # type: ignore[attr-defined]  # waits for those that are no daemons, and for executors
            atexit._run_exitfuncs()
            opened = [x for x in gc.get_objects() if issubclass(type(x), io.IOBase)]  # a reward may keep its log open
            for stream in (*opened, sys.stdout, sys.stderr):
                with suppress(Exception):  # closed, or no one reads it
                    stream.flush()
        finally:
            os._exit(code)


def left(e: RuntimeError) -> bool:
    """Whether a process has failed only because another one is gone."""
    from alignkit.ranks import Elsewhere

    return isinstance(e, Elsewhere) or "gloo" in str(e).lower() or "nccl" in str(e).lower()


def how_to_go_on(cfg: DictConfig) -> str:
    """What repeating the command of a run that has ended early will do."""
    home = Path(cfg.run.dir)
    saved = any(home.glob("checkpoint-*[1-9]*/state/run.json")) or (home / "parts" / "run.json").exists()
    repeat = f"Repeat the command{' without run.overwrite=true' if cfg.run.overwrite else ''}"
    if cfg.stage == "pipeline":
        inside = [*home.glob("*/result.json"), *home.glob("*/checkpoint-*[0-9]"), *home.glob("*/parts/run.json")]
        return f"{repeat} to go on from what its steps have saved." if inside else f"{repeat}: {NOTHING}"
    return f"{repeat} to go on from the last checkpoint." if saved else f"{repeat}: {NOTHING}"


def run(cfg: DictConfig, count: int) -> None:
    """Run a configuration in ``count`` processes of this machine, which meet as torchrun's would; returns when all are through.

    Raises:
        UserError, Stopped: what the processes have raised, or that one of them was killed.
    """
    with tempfile.TemporaryDirectory(prefix="alignkit-", ignore_cleanup_errors=True) as folder:
        given = Path(folder) / "given.json"
        told = {"cfg": OmegaConf.to_yaml(cfg), "argv": sys.argv, "given": unread.given(cfg), "starter": os.getpid()}
        given.write_text(json.dumps(told), encoding="utf-8")
        given.chmod(0o600)
        os.chmod(folder, 0o711)  # a server of another user may be given a folder of weights in it
        command = [sys.executable, "-m", "alignkit.processes", str(given)]
        shared = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
            "TMPDIR": folder,  # what they leave behind when they are killed goes with it
        }  # fmt: skip
        if cfg.run.threads is None:
            shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // count))
        children = [  # in sessions of their own: Ctrl-C at a terminal comes to this process alone, which hands it on
            subprocess.Popen(command, env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}, start_new_session=True)
            for i in range(count)
        ]
        codes, asked = _look_after(children)
        errors = [Path(folder) / f"error-{i}.json" for i in range(count)]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in errors if file.exists()]
    for kind, message in found:
        if kind in ERRORS:
            raise ERRORS[kind](message)
    if not any(codes):
        return
    if asked:
        raise Stopped("stopped at once.")
    i, code = next(((i, code) for i, code in enumerate(codes) if code not in (0, LEFT)), (0, LEFT))
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    if code == 1:
        how += f" (where it says Timeout, it had waited for another one, which hangs, for run.patience={cfg.run.patience} seconds)"
    if code == LEFT:
        how = f"was left by the others ({found[0][1] if found else 'they are gone'})"
    raise UserError(f"process {i + 1} of {count} {how}; the others were stopped. {how_to_go_on(cfg)}")


def _look_after(children: list[subprocess.Popen[bytes]]) -> tuple[list[int], bool]:
    """(exit codes, 0 also of those that were stopped because another one had failed; whether a signal came). Ctrl-C and SIGTERM are
    handed on: all save and stop by themselves."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        for child in children:
            child.send_signal(number)

    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not any(codes := [child.poll() for child in children]) and None in codes:
            time.sleep(0.05)
        until = time.monotonic() + GRACE  # after an error, a stop, or when one is gone, the others end by themselves
        while None in [child.poll() for child in children] and time.monotonic() < until:
            time.sleep(0.05)
        return [child.returncode or 0 for child in children], asked
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for number, handler in old.items():
            signal.signal(number, handler)


def _cores() -> int:
    """Those that this process may use: a scheduler gives a job some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _end_with(parent: int, folder: Path) -> None:
    """End when the process that started this one is gone, however it went, and take its folder along."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main() -> None:
    """One of the processes; a stop while it still imports is no fault."""
    with ending():
        try:
            _take_part()
        except KeyboardInterrupt:
            sys.exit(130)


def _take_part() -> None:
    """Run; a mistake or a stop is left in a file for the one that has started it."""
    file = Path(sys.argv[1])
    given = json.loads(file.read_text(encoding="utf-8"))
    # not os.getppid(): it may be gone already, and then this would go on without its lock
    threading.Thread(target=_end_with, args=(given["starter"], file.parent), daemon=True).start()
    sys.argv = given["argv"]
    from alignkit.config import Config, register
    from alignkit.launch import share_in
    from alignkit.ranks import Elsewhere

    register()
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(given["cfg"]))
        share_in(cfg, given["given"])  # type: ignore[arg-type]
    except (UserError, Stopped) as e:
        _leave(file, e)
        sys.exit(130 if isinstance(e, Stopped) else 2)
    except SystemExit as e:  # of a reward or a library: with 0 it would pass for one that is through
        raise RuntimeError(f"the run left the process with exit code {e.code}") from e
    except RuntimeError as e:
        if not left(e):
            raise
        if not isinstance(e, Elsewhere):
            _leave(file, e)
        sys.exit(LEFT)  # mostly another one is gone, and tells why, or is told of by the one that has started it


def _leave(file: Path, e: Exception) -> None:
    """Tell the one that has started this process what has happened."""
    text = str(e) if isinstance(e, UserError | Stopped) else (str(e).splitlines() or [type(e).__name__])[0]
    (file.parent / f"error-{os.environ['RANK']}.json").write_text(json.dumps([type(e).__name__, text]))


if __name__ == "__main__":
    from alignkit import processes  # not this copy of it: ``met`` is set in the one that all others know

    processes.main()
