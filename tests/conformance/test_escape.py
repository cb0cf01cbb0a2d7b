"""From inside each kind of device process: what it must not do is tried, and does not work.

The processes are real ones, from a real spawner, ready to serve; an attempt that the kernel answers
by ending the process costs a new one. See `tests.escape` for the attempts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices import policy, seccomp, syscalls
from devices.spec import SPECS, Block
from tests import escape
from tests.jaillab import KILLED, Prison, without_filters
from tests.unit import bpf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devices.seccomp import Rule

X32_BIT = 0x40000000
# What the kernel's own probes call (Linux 6.11, 6.18); seccomp lets it through, and it does nothing
# for who is not at a probe.
UNFILTERED = (335, 336)
# Goes wherever the stack says; every other test that sees a timer or a signal needs it.
UNPREDICTABLE = (15,)
NUMBERS = (
    *(number for number in range(480) if number not in UNFILTERED + UNPREDICTABLE),
    *(1 << 20, X32_BIT - 1),
    *(X32_BIT + number for number in (0, 1, 59, 512, 520, 547)),
)


@pytest.fixture(params=sorted(policy.DEVICES))
def prison(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Prison]:
    """A jailed device of each kind."""
    with Prison(request.param, monkeypatch, str(tmp_path)) as prison:
        yield prison


@pytest.fixture(params=sorted(policy.DEVICES))
def unfiltered(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Prison]:
    """The same without seccomp."""
    without_filters(monkeypatch)
    with Prison(request.param, monkeypatch, str(tmp_path)) as prison:
        yield prison


def test_the_suite_is_what_it_claims_to_be() -> None:
    """Sixty attempts at the least, and most of them have a second wall to meet."""
    assert len(escape.ATTEMPTS) >= 60
    assert sum(attempt.deep for attempt in escape.ATTEMPTS.values()) >= 60


def test_every_attempt_is_blocked(prison: Prison) -> None:
    """Each ends in SIGSYS or in an error, and no other process is the worse for it."""
    outcomes = {name: prison.attempt(name) for name in escape.ATTEMPTS}
    if SPECS[prison.kind].hands_over:
        # To give guest memory to its back end is what it is for; it can reach nobody else.
        assert outcomes.pop("pass_a_descriptor") == "returned"
    escaped = {
        name: outcome
        for name, outcome in outcomes.items()
        if outcome != KILLED and not outcome.startswith("refused: ")
    }
    assert escaped == {}
    assert prison.sibling.read(Block.ISR_PEEK, 1) == 0  # it lives, and serves


def test_what_stands_behind_the_filters(unfiltered: Prison) -> None:
    """Without any seccomp filter, namespaces, Landlock and limits hold by themselves."""
    deep = [name for name, attempt in escape.ATTEMPTS.items() if attempt.deep]
    outcomes = {name: unfiltered.attempt(name) for name in deep}
    escaped = {
        name: outcome for name, outcome in outcomes.items() if not outcome.startswith("refused: ")
    }
    assert escaped == {}
    assert unfiltered.sibling.read(Block.ISR_PEEK, 1) == 0


def test_the_real_profile_equals_the_table(prison: Prison) -> None:
    """Every system call there is, allowed and forbidden, in turn, with zeroes for arguments."""
    row = policy.DEVICES[prison.kind]
    code = seccomp.program(row.calls, row.otherwise)
    differs = {}
    for number in NUMBERS:
        outcome = prison.system_call(number)
        allowed = bpf.run(code, number) == seccomp.ALLOW
        if allowed == (outcome == KILLED):
            differs[number] = outcome
    assert differs == {}


def test_arguments_are_held_to_the_table(prison: Prison) -> None:
    """Where a call is allowed for some arguments only: each of them, and others beside them."""
    row = policy.DEVICES[prison.kind]
    code = seccomp.program(row.calls, row.otherwise)
    differs = {}
    seen = set()
    for rule in row.calls:
        number = syscalls.NUMBERS[rule.name]
        for args in arguments(rule):
            outcome = prison.system_call(number, *args)
            allowed = bpf.run(code, number, *args) == seccomp.ALLOW
            seen.add(allowed)
            if allowed == (outcome == KILLED):
                differs[rule.name, args] = outcome
    assert differs == {}
    assert seen == {True, False}


def arguments(rule: Rule) -> Iterator[tuple[int, ...]]:
    """Yield arguments on both sides of what a rule wants."""
    for arg in rule.args:
        known = [value for value in arg.values if isinstance(value, int)]
        for value in known:
            for wanted in (value, value ^ arg.mask, value ^ (arg.mask & -arg.mask)):
                args = [0] * 6
                for other in rule.args:
                    first = other.values[0]
                    args[other.number] = first if isinstance(first, int) else 0
                args[arg.number] = wanted
                yield tuple(args)
