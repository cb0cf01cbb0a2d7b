"""The tables of system calls in docs/jail.md are those that the filters are made of.

PYVMD_UPDATE_GOLDEN=1 writes them anew; the diff is for review.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from devices import policy, seccomp
from devices.seccomp import KILL
from devices.spec import SPECS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devices.policy import Policy
    from devices.seccomp import Rule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "jail.md"
MARK = "<!-- tables -->\n"
UPDATE = os.environ.get("PYVMD_UPDATE_GOLDEN") == "1"


def test_the_manual_has_the_tables() -> None:
    """What is documented is what is enforced."""
    text = PAGE.read_text()
    written = text.partition(MARK)[0] + MARK + "\n" + tables()
    if UPDATE:
        PAGE.write_text(written)
    assert PAGE.read_text() == written, "review with PYVMD_UPDATE_GOLDEN=1 and git diff"


def test_every_condition_is_in_words() -> None:
    """A rule about arguments says in the manual what it wants of them."""
    rows = (
        *policy.DEVICES.values(),
        policy.VHOST,
        policy.SPAWNER,
        policy.VM_PROCESS,
        policy.CONNECTOR,
    )
    for rule in (rule for row in rows for rule in row.calls):
        assert bool(rule.only) == bool(rule.args or rule.action != seccomp.ALLOW), rule


def test_descriptors_can_come_where_there_is_room() -> None:
    """A kind that can be given descriptors has the call for it, and no other kind has."""
    takers = {kind for kind, row in policy.DEVICES.items() if set(policy.TAKES) <= set(row.calls)}
    assert takers == {kind for kind, spec in SPECS.items() if spec.descriptors}


def tables() -> str:
    """All tables, in Markdown."""
    base = {rule.name for rule in policy.BASE}
    parts = [f"### Every device process: {len(base)}", listing(policy.BASE), limits(policy.LIMITS)]
    for kind, row in sorted(policy.DEVICES.items()):
        own = [rule for rule in row.calls if rule not in policy.BASE]
        total = len({rule.name for rule in row.calls})
        parts += [f"### {kind}: {total}, of them its own", listing(own), limits(row.limits)]
        parts.append(room(SPECS[kind].descriptors))
    front = policy.VHOST
    parts += ["### Behind a vhost-user socket, beside that", listing(front.calls)]
    parts += [limits({**front.limits, "NOFILE": policy.VHOST_DESCRIPTORS})]
    for title, row in (
        ("The VM process", policy.VM_PROCESS),
        ("The spawner", policy.SPAWNER),
        ("The connector", policy.CONNECTOR),
    ):
        count = len({rule.name for rule in row.calls})
        parts += [f"### {title}: {count}", listing(row.calls), limits(row.limits), files(row)]
        if row.otherwise != KILL:
            parts.append("Any other call fails with EPERM.")
    return "\n\n".join(filter(None, parts)) + "\n"


def listing(rules: Iterable[Rule]) -> str:
    """System calls by name, each with what it is held to."""
    conditions: dict[str, list[str]] = {}
    for rule in rules:
        conditions.setdefault(rule.name, []).extend([rule.only] if rule.only else [])
    return ", ".join(
        f"`{name}` ({'; '.join(words)})" if words else f"`{name}`"
        for name, words in sorted(conditions.items())
    )


def limits(found: dict[str, int]) -> str:
    """Resource limits, with sizes in MiB."""
    words = [
        f"{name} {value >> 20} MiB" if value >= 1 << 20 else f"{name} {value}"
        for name, value in sorted(found.items())
    ]
    return f"Limits: {', '.join(words)}." if words else ""


def room(descriptors: int) -> str:
    """What NOFILE is raised for."""
    return f"Room for {descriptors} descriptors that come while it runs." if descriptors else ""


def files(row: Policy) -> str:
    """Accesses beneath the runtime directory."""
    names = [str(access.name) for access in row.files]
    return f"Beneath the runtime directory (Landlock): {', '.join(names)}." if names else ""
