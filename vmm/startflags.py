"""Flags of `pyvmctl start` that describe a VM without a file, as vmctl's do.

Each becomes a node of vm.yaml and is read as that key would be; what is wrong with it is said by
the flag's name. Nothing is noted down: with its end such a VM is as unknown as before.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.decode import Decoder
from config.errors import ConfigError, NoSuchVmError
from config.instances import inherited, refused
from config.keys import VM
from config.kinds import Int, Path
from config.model import VmConfig
from config.nodes import BAD, Report, Scalar
from config.nodes import Mapping as Object
from config.nodes import Sequence as Array
from vmm import imagename, known
from vmm.table import tell
from vmm.usage import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from config.nodes import Node

MAX_NICS: Final = 16

_REPEATABLE: Final = ("-d", "-L", "-n")
_RAW_ENDING: Final = ".img"
_DEVICE: Final = "firmware finds what to boot, a kernel is loaded directly"


class Flag(NamedTuple):
    """One flag as it was given; `value` is "" for those that take none."""

    word: str
    value: str

    def __str__(self) -> str:
        return f"{self.word} {self.value}" if self.value else self.word


class _Note(argparse.Action):
    """Keeps flags in the order of the command line: it numbers disks and interfaces."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None
    ) -> None:
        flag = Flag(self.option_strings[0], values if self.nargs is None else "")
        given = namespace.flags
        if flag.word not in _REPEATABLE and any(flag.word == other.word for other in given):
            raise UsageError(f"{flag}: {flag.word} is given twice")
        namespace.flags = (*given, flag)


def flag_arguments(to: argparse.ArgumentParser) -> None:
    """Declare the flags; all of them come together in `flags`."""
    group = to.add_argument_group("a VM without a file")
    for word, value, text in (
        ("-b", "KERNEL", "load this kernel; firmware boots from disk or cdrom if there is none"),
        ("-d", "DISK", "a disk image, as FORMAT:PATH where its ending does not tell; repeatable"),
        ("-m", "SIZE", "memory"),
        ("-r", "ISO", "the disc in the CD-ROM drive"),
        ("-L", "", "a local interface; repeatable"),
        ("-n", "SWITCH", "an interface on a switch of a known file; repeatable"),
        ("-i", "COUNT", "fill up with plain interfaces until there are so many"),
        ("-B", "DEVICE", "what firmware boots from: disk, cdrom or net"),
        ("-t", "TEMPLATE", "what is not said here is as in that VM of a known file"),
    ):
        more: dict[str, Any] = {"metavar": value} if value else {"nargs": 0}
        group.add_argument(word, action=_Note, dest="flags", default=(), help=text, **more)


def wanted(words: Sequence[str], flags: Sequence[Flag], vms: Sequence[VmConfig] = ()) -> VmConfig:
    """Return the VM that flags describe. Raises ConfigError, HostError.

    `vms` are those of a file that the command line names. A VM that a file describes takes none of
    the flags but -b, for this one run.
    """
    if not vms:
        if len(words) != 1:
            raise UsageError(f"{flags[0]}: describes one VM", hint="give one name beside it")
        try:
            vms = [known.find(words[0])[0]]
        except NoSuchVmError:
            return described(words[0], flags)
    if len(vms) != 1:
        names = ", ".join(vm.name for vm in vms)
        raise UsageError(f"{flags[0]}: is for one VM", hint=f"name one of: {names}")
    (vm,) = vms
    for flag in flags:
        if flag.word != "-b":
            hint = "change it there; only -b goes with its name, for one run"
            raise UsageError(f"{flag}: a file describes VM {vm.name!r} already", hint=hint)
    reading = _Reading(vm.name, flags)
    kernel = reading.path(flags[0])
    return vm._replace(boot=vm.boot._replace(kernel=kernel, firmware="", order=()))


def described(name: str, flags: Sequence[Flag]) -> VmConfig:
    """Return a VM that is made of flags alone. Raises ConfigError, HostError."""
    words = {flag.word for flag in flags}
    every = list(_known())
    template = _template(flags, every)
    if template is None and not words & {"-b", "-d", "-r"}:
        raise UsageError(f"VM {name!r} has nothing to boot", hint="give it -b, -d or -r")
    reading = _Reading(name, flags)
    switches = {switch.name: switch for vm in every for switch in vm.switches}
    if template:
        switches.update((switch.name, switch) for switch in template.switches)
    keys: dict[str, tuple[int, Node]] = {}
    disks: list[Object] = []
    nics: list[Object] = []
    for number, flag in enumerate(flags):
        value = Scalar(number, 0, flag.value, quoted=True)
        if flag.word == "-d":
            disks.append(_disk(number, flag))
        elif flag.word == "-m":
            keys["memory"] = number, value
        elif flag.word == "-r":
            keys["cdrom"] = number, value
        elif flag.word == "-L":
            nics.append(_object(number, local="yes"))
        elif flag.word == "-n":
            if flag.value not in switches:
                hint = f"there are: {', '.join(switches)}" if switches else "no file has any"
                raise UsageError(f"{flag}: no such switch in a known file", hint=hint)
            nics.append(_object(number, switch=flag.value))
    for number, flag in enumerate(flags):
        if flag.word == "-i":
            if template:
                hint = "it has its template's interfaces, or those that -L and -n say"
                raise UsageError(f"{flag}: does not go with -t", hint=hint)
            count = reading.count(number, flag)
            nics += [_object(number)] * (count - len(nics))
    if (boot := _boot(flags, template)) is not None:
        keys["boot"] = boot.line, boot
    for key, nodes in (("disks", disks), ("interfaces", nics)):
        if nodes:
            keys[key] = nodes[0].line, Array(nodes[0].line, 0, tuple(nodes))
    preset = inherited(template) if template else {}
    return reading.vm(keys, {**preset, "switches": tuple(switches.values())}, template)


def _known() -> Iterator[VmConfig]:
    """Yield the VMs of all known files that can be read; of two with one name the last counts."""
    for file in known.read():
        yield from file.config.vms if file.config else ()


def _template(flags: Iterable[Flag], vms: Iterable[VmConfig]) -> VmConfig | None:
    """Return the VM that -t names, None without it. Raises UsageError."""
    every = {vm.name: vm for vm in vms}
    for flag in flags:
        if flag.word == "-t":
            if flag.value not in every:
                hint = "'pyvmctl load -n FILE' makes those of a file known"
                raise UsageError(f"{flag}: no such VM in a known file", hint=hint)
            return every[flag.value]
    return None


def _boot(flags: Sequence[Flag], template: VmConfig | None) -> Object | None:
    """Return what `boot` of vm.yaml would say; None if it is the template's. Raises UsageError."""
    given = {flag.word: (number, flag) for number, flag in enumerate(flags)}
    firmware = template.boot.firmware if template else "seabios"
    if device := given.get("-B"):
        if "-b" in given or not firmware:
            raise UsageError(f"{device[1]}: does not go with a kernel", hint=_DEVICE)
        number = device[0]
        order = Array(number, 0, (Scalar(number, 0, device[1].value, quoted=True),))
        return _object(number, firmware=firmware, order=order)
    if kernel := given.get("-b"):
        return _object(kernel[0], kernel=kernel[1].value)
    return None if template else _object(0, firmware=firmware)


def _disk(number: int, flag: Flag) -> Object:
    """Return an item of `disks`. Raises UsageError if its format is not said."""
    name = imagename.parse(flag.value)
    image = name.format or ("raw" if name.path.lower().endswith(_RAW_ENDING) else "")
    if not image:
        hint = f"say raw:{name.path} or qcow2:{name.path}; it is never guessed"
        raise UsageError(f"{flag}: which format?", hint=hint)
    return _object(number, path=name.path, format=image)


def _object(number: int, **keys: str | Node) -> Object:
    """Return a mapping whose every part stands at flag `number`."""
    pairs = (
        (
            Scalar(number, 0, key),
            Scalar(number, 0, value, quoted=True) if isinstance(value, str) else value,
        )
        for key, value in keys.items()
    )
    return Object(number, 0, tuple(pairs))


class _FlagReport(Report):
    """Names the flag where Report names file and line."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__("")
        self._words = words

    def _line(self, line: int, column: int, path: str, text: str) -> str:
        return f"{self._words[line]}: {text}"


class _Reading:
    """Values being read by the rules of vm.yaml. Every method raises UsageError."""

    def __init__(self, name: str, flags: Sequence[Flag]) -> None:
        self._name = name
        self._last = len(flags)  # where the name stands in for a flag
        self._report = _FlagReport([*map(str, flags), f"VM name {name}"])
        self._decoder = Decoder(self._report, os.getcwd())

    def path(self, flag: Flag) -> str:
        """Return the absolute path that a flag names."""
        found = str(self._decoder.scalar(Path(), Scalar(0, 0, flag.value, quoted=True), ""))
        self._check()
        return found

    def count(self, number: int, flag: Flag) -> int:
        """Return a number of interfaces."""
        found = self._decoder.scalar(Int(0, MAX_NICS), Scalar(number, 0, flag.value, True), "")
        self._check()
        return int(found)

    def vm(
        self,
        keys: Mapping[str, tuple[int, Node]],
        preset: dict[str, Any],
        template: VmConfig | None,
    ) -> VmConfig:
        """Return the VM of these keys of vm.yaml, each with the number of its flag.

        `preset` holds values of keys that are not given.
        """
        here, name = self._last, Scalar(self._last, 0, self._name, quoted=True)
        pairs = [(Scalar(line, 0, key), node) for key, (line, node) in keys.items()]
        node = Object(here, 0, ((Scalar(here, 0, "name"), name), *pairs))
        made = self._decoder.table(VM, node, "", preset)
        if template and made is not BAD:
            for word, _ in pairs:
                before, after = (getattr(vm, word.text) for vm in (template, made))
                if why := refused(template, word.text, before, after):
                    self._decoder.error(word, "", why)
        self._check()
        vm: VmConfig = made
        return vm._replace(instance=template.name) if template else vm

    def _check(self) -> None:
        try:
            self._report.check()
        except ConfigError as err:
            raise UsageError(str(err)) from err
        for warning in self._report.warnings():
            tell(warning)
