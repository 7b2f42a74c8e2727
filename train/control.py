"""What the processes of a run tell each other outside of its steps: that all shall stop, and that one of them is gone.

Every process keeps a socket open to rank 0, and a thread that listens there. SIGTERM, SIGHUP or Ctrl-C may reach one
rank alone, and hosts run ahead of each other; so rank 0 asks all which step they are at, and all stop after the
furthest. A rank that asks `ends_after` waits for that answer only when somebody wants to stop: a step costs a
comparison. The kernel closes the socket of a process that is killed, at once; where a machine is gone, the lack of
answers shows within `SILENT_SECONDS`. Then the others say so and end, even while they wait in a collective that will
never be completed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from types import FrameType, TracebackType
from typing import Any, NoReturn

from train.engine import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CUT_SHORT = "the evaluation was cut short, for the run is to stop"
GRACE_SECONDS = 3.0  # in which a process that has lost another may end by itself, with its own message
SILENT_SECONDS = 40  # without an answer from the machine of another process
CONNECT_SECONDS = 60.0


class Stopped(KeyboardInterrupt):
    """Ends a run that was asked to stop; what is worth saving is saved."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {text}")
        self.status = 128 + signum
        """Exit status of the program, as a shell counts."""


class Control:
    """Of one process; use as a context manager around a run. Signals are heard where that is the main thread.

    A signal before the first step is done, or after the last, raises `Stopped` where it strikes. In between it is
    noted: `ends_after` tells when to stop. A second Ctrl-C ends the process at once. SIGHUP, of a terminal that is
    closed, is heard unless it was ignored before (nohup).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of what main thread and listener both change
        self._asked = 0  # the signal
        self._step = 0  # that the main thread is at
        self._until: int | None = None  # the step after which all stop
        self._decided = threading.Event()
        self._softly = False  # signals are noted
        self._finished = False  # no rank needs another any more
        self._interrupted = math.inf  # when Ctrl-C was pressed
        self._world: World | None = None
        self._lost = (0, "", 1)  # who is gone, why, and the status to end with
        self._noticed, self._ended = threading.Event(), threading.Event()
        self._socket: socket.socket | None = None
        self._relay: _Relay | None = None  # of rank 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Control:
        if threading.current_thread() is threading.main_thread():
            nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            heard = [signum for signum in SIGNALS if not (nohup and signum == signal.SIGHUP)]
            self._handlers = {signum: signal.signal(signum, self._on_signal) for signum in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._softly = False
        if self._socket is not None:
            own = isinstance(error, ValueError | OSError | Stopped)
            if error is not None and not own and not self._finished and self._noticed.wait(1.0):
                self._end_with_the_lost()  # what was raised here came of that
            self._ended.set()
            if error is None or self._finished:
                self._send({"done": True})
            else:
                why = f"{'' if own else type(error).__name__ + ': '}{' '.join(str(error).split())[:500]}"
                self._send({"failed": why, "status": error.status if isinstance(error, Stopped) else 1})
            if self._relay is not None:
                self._relay.heard_first.wait(2.0)  # else it ends with this process before it tells the others
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def join(self, world: World) -> None:
        """Connects the processes of a run; all call it together, once."""
        self._world = world
        if self._handlers and b"deepspeed.launcher.launch" in _command_line(os.getppid()):
            threading.Thread(target=_watch_launcher, args=(os.getppid(),), daemon=True).start()
        if world.size == 1:
            return
        listener, token = None, secrets.token_hex(16)
        if world.rank == 0:
            address = os.environ["MASTER_ADDR"]
            listener = socket.create_server(("" if not _is_local(address) else address, 0), backlog=world.size)
            self._relay = _Relay(listener, token, world.size)
            self._relay.start()
        port = listener.getsockname()[1] if listener is not None else 0
        port, token = json.loads(world.gather(json.dumps([port, token]))[0])
        self._socket = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_SECONDS)
        self._socket.settimeout(None)
        _keep_alive(self._socket)
        self._socket.sendall(f"{world.rank} {token}\n".encode())
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, step: int) -> None:
        """The main thread is at this step, the first."""
        self._step = step

    def ends_after(self, step: int) -> bool:
        """Whether the run is to stop after this step, which is done; the same on all ranks. Otherwise the next is
        begun."""
        self._softly = True
        with self._lock:
            if not self._asked:
                self._step = step + 1
                return False
        if self._socket is None:
            return True
        self._decided.wait()  # who cannot decide is gone, which ends us
        assert self._until is not None
        return step >= self._until

    def finish(self) -> None:
        """All steps are done and saved, and no process waits for another any more."""
        self._softly, self._finished = False, True

    def check(self) -> None:
        """Within an evaluation, which fails on all ranks alike: ValueError of the text `CUT_SHORT` if the run is to
        stop."""
        if self._asked:
            raise ValueError(CUT_SHORT)

    def stopped(self, step: int) -> Stopped:
        """What all ranks raise when the state after this step has been saved."""
        self.finish()
        return Stopped(self._asked or signal.SIGTERM, f"at step {step}; go on with --resume")

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _leave_terminal()
        again = signum == signal.SIGINT and time.monotonic() - self._interrupted > 1  # a launcher may pass it on too
        if again:
            print("interrupted again: ended at once, nothing more is saved", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        if signum == signal.SIGINT:
            self._interrupted = min(self._interrupted, time.monotonic())
        if self._asked:  # launchers send SIGTERM after a Ctrl-C
            return
        if not self._softly:
            self._asked = signum
            saved = "after its last step; that is saved" if self._finished else "before its first step was done"
            raise Stopped(signum, f"{saved}; go on with --resume")
        if self._socket is None:
            self._asked = signum
            _say_stopping(signum)
        else:
            self._send({"stop": signum})  # without the lock, which the main thread may hold

    def _send(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        with contextlib.suppress(OSError):  # nobody listens: then the listener sees that rank 0 is gone
            self._socket.sendall(_line(message))

    def _listen(self) -> None:
        assert self._socket is not None
        for message in _messages(self._socket):
            if "ask" in message:
                with self._lock:
                    self._asked = message["ask"]
                    step = self._step
                self._send({"at": step})
                if self._world is not None and self._world.rank == 0:
                    _say_stopping(message["ask"])
            elif "until" in message:
                self._until = message["until"]
                self._decided.set()
            elif "gone" in message:
                self._lose(message["gone"], message["why"], message["status"])
        self._lose(0, "", 1)

    def _lose(self, rank: int, why: str, status: int) -> None:
        """Ends this process, unless it does so by itself soon."""
        if self._ended.is_set() or self._finished:
            return
        self._lost = (rank, why, status)
        self._noticed.set()
        if not self._ended.wait(GRACE_SECONDS):
            self._end_with_the_lost()

    def _end_with_the_lost(self) -> NoReturn:
        """The first rank that is left says who is gone."""
        assert self._world is not None
        rank, why, status = self._lost
        if self._world.rank == (1 if rank == 0 else 0):
            cause = why or "killed, or its machine; was there too little memory?"
            print(
                f"error: rank {rank} of {self._world.size} is gone ({cause}) and the run ends: start it again with "
                "--resume, which goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(status)


class _Relay(threading.Thread):
    """In rank 0: hears all ranks, itself too, and tells all."""

    def __init__(self, listener: socket.socket, token: str, size: int) -> None:
        super().__init__(daemon=True)
        self._listener, self._token, self._size = listener, token, size
        self._ranks: dict[int, socket.socket] = {}
        self._done: set[int] = set()
        self._at: dict[int, int] = {}
        self._signal = 0
        self.heard_first = threading.Event()
        """Rank 0 has ended, and all are told."""

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        while len(self._done) < self._size:
            for key, _ in selector.select():
                if key.data is None:
                    end, _ = self._listener.accept()
                    _keep_alive(end)
                    selector.register(end, selectors.EVENT_READ, _Caller(end))
                elif not self._read(key.data):
                    selector.unregister(key.data.end)
                    key.data.end.close()
                    if key.data.rank is not None:
                        self._leave(key.data.rank, "", 1)

    def _read(self, caller: _Caller) -> bool:
        """Whether there is more to come."""
        try:
            data = caller.end.recv(2**12)
        except OSError:
            data = b""
        *lines, caller.rest = (caller.rest + data).split(b"\n")
        for line in lines:
            if caller.rank is not None:
                self._hear(caller.rank, json.loads(line))
            elif not self._admit(caller, line):
                return False
        return bool(data) and (caller.rank is not None or len(caller.rest) < 2**12)

    def _admit(self, caller: _Caller, line: bytes) -> bool:
        """Whether it is a process of this run: anybody may call."""
        rank, _, token = line.partition(b" ")
        if not secrets.compare_digest(token, self._token.encode()):
            return False
        caller.rank = int(rank)
        self._ranks[caller.rank] = caller.end
        if self._signal:
            self._tell({"ask": self._signal}, caller.rank)
        return True

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if "stop" in message and not self._signal:
            self._signal = message["stop"]
            self._tell({"ask": self._signal})
        elif "at" in message:
            self._at[rank] = message["at"]
        elif "done" in message:
            self._done.add(rank)
        elif "failed" in message:
            self._leave(rank, message["failed"], message["status"])
        if 0 in self._done:
            self.heard_first.set()
        if self._signal and len(self._at.keys() | self._done) == self._size:
            self._tell({"until": max(self._at.values(), default=0)})

    def _leave(self, rank: int, why: str, status: int) -> None:
        if rank not in self._done:
            self._done.add(rank)
            self._tell({"gone": rank, "why": why, "status": status})

    def _tell(self, message: dict[str, Any], *ranks: int) -> None:
        """Tells these ranks, or all."""
        for rank in ranks or self._ranks.keys() - self._done:
            with contextlib.suppress(OSError):
                self._ranks[rank].sendall(_line(message))


@dataclass
class _Caller:
    end: socket.socket
    rank: int | None = None
    """None: nobody of this run yet."""
    rest: bytes = b""
    """What came of a line that is not whole."""


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _say_stopping(signum: int) -> None:
    """Written past Python's buffers, which the signal may have found half filled."""
    more = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{signal.Signals(signum).name}: stopping after this step and saving{more}\n".encode())


def _leave_terminal() -> None:
    """Output that goes to no file goes nowhere from now on: writing to a terminal or pipe that is gone would end the
    run before it is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if not S_ISREG(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)


def _watch_launcher(launcher: int) -> None:
    """The program `deepspeed` ends at a SIGTERM and leaves the launcher and us running: then it is for us too."""
    starter = _parent(launcher)
    while os.getppid() == launcher and _parent(launcher) == starter:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def typed_launcher(command: Sequence[str]) -> list[str]:
    """What stood before `command`, which begins with the script, when it was typed for DeepSpeed, as far as that can be
    known; nothing without it."""
    if b"deepspeed.launcher.launch" not in _command_line(os.getppid()):
        return []
    words = _command_line(_parent(os.getppid())).decode(errors="replace").split("\0")
    first = next((i for i, word in enumerate(words) if Path(word).name in ("deepspeed", "ds")), None)
    if first is None or command[0] not in words[first:]:  # another machine's
        return ["deepspeed"]
    return ["deepspeed", *words[first + 1 : words.index(command[0], first)]]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    """0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _messages(end: socket.socket) -> Iterator[dict[str, Any]]:
    """What arrives, until the other end closes."""
    with contextlib.suppress(OSError), end.makefile("rb") as lines:
        for line in lines:
            yield json.loads(line)


def _keep_alive(end: socket.socket) -> None:
    """A machine that is gone closes nothing: the kernel asks after 10 s, and then every 10."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        end.setsockopt(socket.IPPROTO_TCP, option, value)


def _is_local(address: str) -> bool:
    return address in ("localhost", "127.0.0.1")
