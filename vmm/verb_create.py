"""pyvmctl create: new disk images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE
from config.units import parse_size
from vmm import imagename
from vmm.table import say_json, tell
from vmm.usage import PROGRAM, UsageError, Verb, json_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from vmm.imagetool import Shape


def _arguments(to: ArgumentParser) -> None:
    to.add_argument("image", metavar="IMAGE", help="qcow2:PATH or raw:PATH, else by its ending")
    to.add_argument("-s", dest="size", metavar="SIZE", type=size, help="of the disk, as 10G")
    what = to.add_mutually_exclusive_group()
    what.add_argument("-b", dest="base", metavar="BASE", help="an image it stands on; qcow2 only")
    what.add_argument("-i", dest="input", metavar="INPUT", help="an image whose data it gets")
    format_argument(to, "-F", "base_format", "the format of BASE")
    format_argument(to, "-f", "input_format", "the format of INPUT")
    new_image_arguments(to)
    json_argument(to)


def format_argument(to: ArgumentParser, flag: str, name: str, help_text: str) -> None:
    """Say a format beside a name."""
    to.add_argument(flag, dest=name, choices=imagename.FORMATS, default="", help=help_text)


def new_image_arguments(to: ArgumentParser) -> None:
    """Everything about a new image that has a default."""
    to.add_argument(
        "-o",
        dest="options",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="cluster-size=64K, version=3 or refcount-bits=16 of a qcow2 image; repeatable",
    )
    to.add_argument("--force", action="store_true", help="replace an existing image")
    quiet_argument(to)


def quiet_argument(to: ArgumentParser) -> None:
    """No progress, no success."""
    to.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")


def size(text: str) -> int:
    """Return bytes, in whole sectors. Raises what argparse turns into an error."""
    try:
        number = parse_size(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r}: {err}") from err
    if not number or number % 512:
        raise argparse.ArgumentTypeError(f"{text!r}: a disk has one or more sectors of 512 bytes")
    return number


def shape(options: list[str]) -> Shape:
    """Take `-o` apart. Raises UsageError."""
    from vmm.imagetool import Shape

    numbers = {}
    for option in options:
        key, equals, value = option.partition("=")
        field = key.replace("-", "_")
        if not equals or field not in Shape._fields:
            known = ", ".join(name.replace("_", "-") for name in Shape._fields)
            raise UsageError(f"-o {option}: expected KEY=VALUE", hint=f"KEY is one of {known}")
        try:
            numbers[field] = parse_size(value)
        except ValueError as err:
            raise UsageError(f"-o {option}: {err}") from err
    return Shape(**numbers)


def _run(options: Any) -> int:
    from vmm import imagework  # with the formats' code, which other verbs never need

    if options.base is None and options.input is None and options.size is None:
        raise UsageError("how large? (-s SIZE, -b BASE or -i INPUT)")
    name = imagename.parse(options.image)
    name = name._replace(format=name.format or "raw")
    how = imagework.Making(name, options.size or 0, shape(options.options), options.force)
    if options.input is not None:
        source = imagename.parse(options.input, options.input_format)
        facts = imagework.convert(source, how, quiet=options.quiet)
    else:
        base = options.base and imagename.parse(options.base, options.base_format)
        facts = imagework.create(how, base)
    if options.json:
        say_json(facts)
    elif not options.quiet:
        tell(f"{facts['format']} imagefile created")
    return EXIT_DONE


VERBS = verbs(
    Verb(
        name="create",
        summary="make a disk image",
        arguments=_arguments,
        run=_run,
        example=f"{PROGRAM} create -s 10G web.qcow2\n"
        f"{PROGRAM} create -b debian.qcow2 web.qcow2\n"
        f"{PROGRAM} create -i qcow2:cloud.img web.qcow2",
        details="""\
An image that ends in .qcow2 is qcow2, any other raw, unless a prefix says
otherwise. Both grow with what is written to them.

With -b the new image holds only what will differ from BASE, which nobody may
write to from then on. Its size is that of BASE, unless -s says otherwise. BASE
is written down relative to IMAGE if it is given as a relative path.

With -i the image gets what INPUT holds; bases of INPUT are flattened into it.

An existing file is left alone unless --force is given, and then replaced only
when the new one is complete.""",
    )
)
