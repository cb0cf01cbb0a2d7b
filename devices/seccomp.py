"""seccomp filters: an allow-list of system calls, as a classic BPF program (seccomp(2)).

A filter is a list of rules in the order they are compared, so frequent calls come first. What no
rule allows ends the process with SIGSYS, or gets the default that the caller names. Calls of
another architecture (i386, x32) always end the process: their numbers mean other things.
"""

from __future__ import annotations

import ctypes
import errno
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from devices import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000  # the process, not the thread


def refuse(error: int) -> int:
    """Return the action that fails a call with `error`, a number out of the errno module."""
    return 0x00050000 | error


class Arg(NamedTuple):
    """What an argument must be: `argument & mask` is one of `values`.

    A word among the values stands for a number that only the running process knows: a descriptor,
    its own id. Compared are the low 32 bits, which are all that the kernel looks at in flags,
    commands, descriptors and process ids.
    """

    number: int  # 0 to 5
    mask: int
    values: tuple[int | str, ...]


class Rule(NamedTuple):
    """A system call, perhaps with what its arguments must be, and what becomes of it then."""

    name: str
    args: tuple[Arg, ...] = ()  # all must hold; else the next rule of that name is tried
    only: str = ""  # the same in words, for the manual
    action: int = ALLOW


# struct sock_filter (linux/filter.h): operation, jump if true, jump if false, constant.
_INSTRUCTION: Final = Struct("<HBBI")
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JEQ: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JGE: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

# struct seccomp_data (linux/seccomp.h): where its words are.
_NR: Final = 0
_ARCH: Final = 4
_ARGS: Final = 16  # 8 bytes each, low word first

_AUDIT_ARCH_X86_64: Final = 0xC000003E
_X32_BIT: Final = 0x40000000

_SET_MODE_FILTER: Final = 1
_GET_ACTION_AVAIL: Final = 2
_FLAG_TSYNC: Final = 1


def program(
    rules: Iterable[Rule], default: int = KILL, numbers: Mapping[str, int] | None = None
) -> bytes:
    """Return the filter as an array of struct sock_filter.

    `numbers` says what the words in rules stand for; a word that is not in it matches nothing.
    """
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NR),
        (_JGE, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, KILL),
    ]
    for rule in rules:
        block = _tests(rule, numbers or {})
        code += [(_JEQ, 0, len(block), syscalls.NUMBERS[rule.name]), *block]
    code.append((_RETURN, 0, 0, default))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def _tests(rule: Rule, numbers: Mapping[str, int]) -> list[tuple[int, int, int, int]]:
    """The part of a program that is run for calls of this name; falls through if a test fails."""
    # Built from its end, so that every jump knows how far the end is.
    block = [(_RETURN, 0, 0, rule.action)]
    if rule.args:
        block.append((_LOAD, 0, 0, _NR))  # the tests need the register that held it
    for arg in reversed(rule.args):
        compare: list[tuple[int, int, int, int]] = []
        values = [numbers.get(value) if isinstance(value, str) else value for value in arg.values]
        known = [value for value in values if value is not None]
        if not known:
            return []
        for later, value in enumerate(reversed(known)):
            miss = len(block) - 1 if later == 0 else 0  # to the _LOAD at the end
            compare.insert(0, (_JEQ, later, miss, value))
        head = [(_LOAD, 0, 0, _ARGS + 8 * arg.number)]
        if arg.mask != 0xFFFFFFFF:
            head.append((_AND, 0, 0, arg.mask))
        block = [*head, *compare, *block]
    return block


def install(code: bytes) -> None:
    """Apply a program to every thread of this process, for good. Raises OSError.

    Needs no_new_privs. All threads take it or none: one that has a filter of its own is EBUSY.
    """
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = Struct("<H6xQ").pack(len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
    thread = syscalls.call("seccomp", _SET_MODE_FILTER, _FLAG_TSYNC, fprog)
    if thread:
        raise OSError(errno.EBUSY, f"seccomp: thread {thread} has another filter")


def available() -> bool:
    """Tell whether this kernel can end a process that breaks its rules."""
    try:
        syscalls.call("seccomp", _GET_ACTION_AVAIL, 0, Struct("<I").pack(KILL))
    except OSError:
        return False
    return True
