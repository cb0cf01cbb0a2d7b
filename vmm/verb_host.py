"""The verbs that ask about this host and this program: doctor, schema, version."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, EXIT_FAILED
from vmm.table import Paint, say, say_json, wants_colour
from vmm.usage import PROGRAM, Verb, colour_argument, json_argument, verbs
from vmm.version import VERSION

if TYPE_CHECKING:
    from argparse import ArgumentParser

_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "red"}


def _doctor_arguments(to: ArgumentParser) -> None:
    json_argument(to)
    colour_argument(to)


def _doctor(options: Any) -> int:
    from vmm import doctor  # the whole KVM side, which only this verb and start need

    report = doctor.examine()
    ready = doctor.can_start(report)
    if options.json:
        say_json(
            {
                "can_start": ready,
                "stock_kernels": report["stock_kernels"].value,
                "checks": {name: check._asdict() for name, check in report.items()},
            }
        )
        return EXIT_DONE if ready else EXIT_FAILED
    paint = Paint(wants_colour(options.color, sys.stdout))
    for name, check in report.items():
        remedy = f" -> {check.remedy}" if check.remedy else ""
        mark = paint(f"{check.state:<4}", _STYLES[check.state])
        say(f"{mark}  {name:<17}  {check.text}{remedy}")
    return EXIT_DONE if ready else EXIT_FAILED


def _no_arguments(_to: ArgumentParser) -> None:
    pass


def _schema(_options: Any) -> int:
    from config import schema  # reads the tables of every key

    say_json(schema.json_schema())
    return EXIT_DONE


def _version(options: Any) -> int:
    host = os.uname()
    facts = {
        "version": VERSION,
        "python": sys.version.split()[0],
        "kernel": host.release,
        "machine": host.machine,
    }
    if options.json:
        say_json(facts)
    else:
        say(f"{PROGRAM} {VERSION} (Python {facts['python']}, Linux {facts['kernel']})")
    return EXIT_DONE


VERBS = verbs(
    Verb(
        name="doctor",
        summary="report what this host has for running VMs, and what to do about the rest",
        arguments=_doctor_arguments,
        run=_doctor,
        example=f"{PROGRAM} doctor\n{PROGRAM} doctor --json | jq .stock_kernels",
        details="Exit status 0 if a VM can be started here, else 1.",
    ),
    Verb(
        name="schema",
        summary="print the JSON Schema of vm.yaml, for editors",
        arguments=_no_arguments,
        run=_schema,
        example=f"{PROGRAM} schema > pyvmd.schema.json",
    ),
    Verb(
        name="version",
        summary="print the version of pyvmd, Python and the kernel",
        arguments=json_argument,
        run=_version,
        example=f"{PROGRAM} version --json",
    ),
)
