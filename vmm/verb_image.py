"""pyvmctl image: look at, check, and change images that no VM has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE
from config.units import format_size
from devices.lines import printable
from vmm import imagename
from vmm.table import say, say_json, tell
from vmm.usage import PROGRAM, UsageError, Verb, group, json_argument, verbs
from vmm.verb_create import (
    format_argument,
    new_image_arguments,
    quiet_argument,
    shape,
    size,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from vmm.imagename import ImageName

EXIT_LEAKS: Final = 10  # `check` found clusters that nothing uses, and nothing worse
EXIT_CORRUPT: Final = 11  # `check` found damage


def _image_argument(to: ArgumentParser, metavar: str = "IMAGE") -> None:
    to.add_argument("image", metavar=metavar, help="its path, or qcow2:PATH, raw:PATH")
    format_argument(to, "-f", "format", f"the format of {metavar}")


def _name(options: Any) -> ImageName:
    return imagename.parse(options.image, options.format)


# info


def _info_arguments(to: ArgumentParser) -> None:
    _image_argument(to)
    json_argument(to)


def _info(options: Any) -> int:
    from vmm import imageinfo

    facts = imageinfo.facts(_name(options))
    if options.json:
        say_json(facts)
    else:
        say(imageinfo.text(facts))
    return EXIT_DONE


# check


def _check_arguments(to: ArgumentParser) -> None:
    _image_argument(to)
    to.add_argument("--repair", choices=("leaks", "all"), help="mend leaks, or all that can be")
    quiet_argument(to)
    json_argument(to)


def _check(options: Any) -> int:
    from vmm import imagework

    facts = imagework.check(_name(options), options.repair or "", quiet=options.quiet)
    if options.json:
        say_json(facts)
    elif not options.quiet:
        for line in facts["texts"]:
            say(printable(line))
        tell(imagework.verdict(facts))
    if facts["corruptions"]:
        return EXIT_CORRUPT
    return EXIT_LEAKS if facts["leaks"] else EXIT_DONE


# resize


def _new_size(text: str) -> tuple[int, bool]:
    """Return bytes, and whether they are to be added."""
    return size(text.removeprefix("+")), text.startswith("+")


def _resize_arguments(to: ArgumentParser) -> None:
    _image_argument(to)
    to.add_argument("size", metavar="SIZE", type=_new_size, help="as 20G, or +5G to add")
    to.add_argument("--shrink", action="store_true", help="cut off what is behind SIZE, for good")
    quiet_argument(to)
    json_argument(to)


def _resize(options: Any) -> int:
    from vmm import imagework

    number, add = options.size
    facts = imagework.resize(
        _name(options), number, add=add, shrink=options.shrink, quiet=options.quiet
    )
    if options.json:
        say_json(facts)
    elif not options.quiet:
        tell(f"{facts['path']}: {format_size(facts['size'])}")
    return EXIT_DONE


# convert


def _convert_arguments(to: ArgumentParser) -> None:
    _image_argument(to, "SOURCE")
    to.add_argument("target", metavar="TARGET", help="the new image, named in the same way")
    format_argument(to, "-O", "target_format", "the format of TARGET")
    new_image_arguments(to)
    json_argument(to)


def _convert(options: Any) -> int:
    from vmm import imagework

    name = imagename.parse(options.target, options.target_format)
    name = name._replace(format=name.format or "raw")
    how = imagework.Making(name, 0, shape(options.options), options.force)
    facts = imagework.convert(_name(options), how, quiet=options.quiet)
    if options.json:
        say_json(facts)
    elif not options.quiet:
        tell(f"{facts['path']}: {facts['format']}, {format_size(facts['size'])}")
    return EXIT_DONE


# commit


def _commit_arguments(to: ArgumentParser) -> None:
    _image_argument(to)
    to.add_argument("-d", dest="keep", action="store_true", help="do not empty IMAGE afterwards")
    quiet_argument(to)
    json_argument(to)


def _commit(options: Any) -> int:
    from vmm import imagework

    facts = imagework.commit(_name(options), empty=not options.keep, quiet=options.quiet)
    if options.json:
        say_json(facts)
    elif not options.quiet:
        tell(f"{facts['base']}: has what {facts['path']} held")
    return EXIT_DONE


# rebase


def _rebase_arguments(to: ArgumentParser) -> None:
    _image_argument(to)
    to.add_argument("-b", dest="base", metavar="BASE", help="the new base; '' for none")
    format_argument(to, "-F", "base_format", "the format of BASE")
    to.add_argument(
        "-u", dest="unsafe", action="store_true", help="change the name only; look at no data"
    )
    quiet_argument(to)
    json_argument(to)


def _rebase(options: Any) -> int:
    from vmm import imagework

    if options.base is None:
        raise UsageError("on which base? (-b BASE, or -b '' for none)")
    base = imagename.parse(options.base, options.base_format) if options.base else None
    facts = imagework.rebase(_name(options), base, unsafe=options.unsafe, quiet=options.quiet)
    if options.json:
        say_json(facts)
    elif not options.quiet:
        where = f"stands on {facts['base']}" if facts["base"] else "stands alone"
        tell(f"{facts['path']}: {where}")
    return EXIT_DONE


_IN_USE: Final = "An image that a VM has is refused."
_ACTIONS: Final = verbs(
    Verb(
        name="image info",
        summary="tell what an image is",
        arguments=_info_arguments,
        run=_info,
        example=f"{PROGRAM} image info web.qcow2",
        details="Reads headers only, locks nothing, and says who uses the image. What a running\n"
        "VM changes may have changed already when you read it.",
    ),
    Verb(
        name="image check",
        summary="find, and mend, contradictions in a qcow2 image",
        arguments=_check_arguments,
        run=_check,
        example=f"{PROGRAM} image check web.qcow2\n{PROGRAM} image check --repair leaks web.qcow2",
        details=f"""\
A leak is space that nothing uses: harmless. A corruption may cost data, and
whoever writes to such an image makes it worse. --repair mends leaks, or with
`all` also refcounts and flags that contradict the tables.
{_IN_USE}

exit status: 0 clean, perhaps by --repair; {EXIT_LEAKS} leaks only; {EXIT_CORRUPT} corruptions;
1 not checked""",
    ),
    Verb(
        name="image resize",
        summary="grow or shrink an image",
        arguments=_resize_arguments,
        run=_resize,
        example=f"{PROGRAM} image resize web.qcow2 +10G\n"
        f"{PROGRAM} image resize --shrink web.img 5G",
        details=f"""\
The guest has to adapt its partitions and file systems: before an image shrinks,
after it has grown. {_IN_USE}
'{PROGRAM} disk resize' grows a disk of a running VM.""",
    ),
    Verb(
        name="image convert",
        summary="make an image of another format, or one of a whole chain",
        arguments=_convert_arguments,
        run=_convert,
        example=f"{PROGRAM} image convert web.img web.qcow2\n"
        f"{PROGRAM} image convert qcow2:cloud.img raw:/srv/web.img",
        details="TARGET gets what SOURCE and its bases hold and stands alone. Zeroes take no\n"
        "space in it.",
    ),
    Verb(
        name="image commit",
        summary="write what an overlay holds into its base",
        arguments=_commit_arguments,
        run=_commit,
        example=f"{PROGRAM} image commit web.qcow2",
        details="The base grows if the overlay is larger. Afterwards the overlay is empty and\n"
        "reads as before. Every other overlay on that base is worth nothing any more.",
    ),
    Verb(
        name="image rebase",
        summary="put an overlay on another base, or on none",
        arguments=_rebase_arguments,
        run=_rebase,
        example=f"{PROGRAM} image rebase -b new.qcow2 web.qcow2\n"
        f"{PROGRAM} image rebase -u -F raw -b moved.img web.qcow2",
        details="""\
IMAGE reads as before: what differs between old and new base is copied into it
first. With -u nothing is copied, and no base need be there: for one that has
moved, or whose format the image does not say.""",
    ),
)

VERBS = verbs(
    group(
        "image",
        "look at disk images, check and change them",
        "An image is named by its path, or as qcow2:PATH or raw:PATH where its ending\n"
        "does not say what it is.",
        {name.removeprefix("image "): action for name, action in _ACTIONS.items()},
    )
)
