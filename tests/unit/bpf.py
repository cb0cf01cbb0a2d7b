"""Runs a seccomp filter as the kernel would, so that tests can ask it about any call."""

from __future__ import annotations

from struct import Struct
from typing import Final

X86_64: Final = 0xC000003E
I386: Final = 0x40000003

_INSTRUCTION: Final = Struct("<HBBI")
_DATA: Final = Struct("<IIQ6Q")  # struct seccomp_data: nr, arch, instruction pointer, args


def run(code: bytes, number: int, *args: int, arch: int = X86_64) -> int:
    """Return what the filter says of system call `number`. IndexError if it runs off its end."""
    data = _DATA.pack(number, arch, 0, *(*args, *(0,) * (6 - len(args))))
    program = list(_INSTRUCTION.iter_unpack(code))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, constant = program[at]
        at += 1
        if operation == 0x20:  # load an absolute word
            accumulator = int.from_bytes(data[constant : constant + 4], "little")
        elif operation == 0x54:  # and
            accumulator &= constant
        elif operation == 0x15:  # jump if equal
            at += if_true if accumulator == constant else if_false
        elif operation == 0x35:  # jump if greater or equal
            at += if_true if accumulator >= constant else if_false
        elif operation == 0x06:  # return
            return int(constant)
        else:
            raise AssertionError(f"operation {operation:#x}")
