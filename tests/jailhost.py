"""Hosts that a jail may meet: root's, a user's, and one that has no user namespaces.

    with device(as_user, "required") as pids:     # a device process launched by such a user
        assert jailview.facts(pids.device) ...

The launching process is a fork of the test, so the test can look at it with its own rights.
"""

from __future__ import annotations

import codecs
import json
import os
import select
import sys
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import pytest

from devices import privileges, spawner, syscalls, vioblk, viornd
from tools.viodriver.private import DeviceHost
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USER: Final = 65533  # nobody in particular
SECONDS: Final = 60.0  # for a child to come to its end

# A user who may not read the test's own files must not need to: all of this is loaded by now.
_LOADED: Final = (spawner, vioblk, viornd)
for _name in ("utf-8", "ascii", "latin-1", "unicode_escape", "utf-8-sig"):
    codecs.lookup(_name)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


class Pids(NamedTuple):
    """Processes of a VM, as the test sees their ids, and what the device said at its start."""

    vm: int
    spawner: int
    device: int
    said: list[str]


def as_is() -> None:
    """Be who the test is."""


def as_user() -> None:
    """Be an ordinary user."""
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)


def without_user_namespaces(uid: int) -> None:
    """Be `uid` on a host that lets nobody make user namespaces, and has no other ids."""
    euid, egid = os.geteuid(), os.getegid()
    syscalls.call("unshare", 0x10000000)
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {euid} 1"),
        ("gid_map", f"{uid} {egid} 1"),
        ("../sys/user/max_user_namespaces", "0"),
    ):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)
    if uid:
        privileges.drop_capabilities()


def in_child(function: Callable[[], Any]) -> Any:
    """Run a function in a fork and return its result, which is plain JSON. Fails as it does."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _answer(writer, function)
    os.close(writer)
    try:
        return _result(reader)
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


@contextmanager
def device(who: Callable[[], None], level: str, kind: str = "viornd") -> Iterator[Pids]:
    """Have a device process launched by somebody. Raises what that one got, as RuntimeError."""
    reader, writer = os.pipe()
    gate, opener = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        os.close(opener)

        def launch() -> None:
            who()
            said: list[str] = []
            log._emit = lambda level, text, who: said.append(text)
            with DeviceHost(kind, jail=level) as host:
                pids = Pids(os.getpid(), host.spawner.pid, host.process.pid, said)
                _write(writer, {"result": pids})
                os.read(gate, 1)

        _answer(writer, launch)
    os.close(writer)
    os.close(gate)
    try:
        yield Pids(*_result(reader))
    finally:
        os.close(opener)
        os.close(reader)
        os.waitpid(pid, 0)


def _answer(writer: int, function: Callable[[], Any]) -> NoReturn:
    try:
        _write(writer, {"result": function()})
    except BaseException as err:
        _write(writer, {"error": f"{type(err).__name__}: {err}", "trace": traceback.format_exc()})
    finally:
        os._exit(0)


def _write(writer: int, answer: dict[str, Any]) -> None:
    os.write(writer, json.dumps(answer).encode() + b"\n")


def _result(reader: int) -> Any:
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    assert poll.poll(SECONDS * 1e3), "the child says nothing"
    line = b""
    while not line.endswith(b"\n") and (piece := os.read(reader, 65536)):
        line += piece
    answer = json.loads(line.splitlines()[0]) if line else {"error": "the child has died"}
    if "error" in answer:
        print(answer.get("trace", ""), file=sys.stderr)
        raise RuntimeError(answer["error"])
    return answer["result"]
