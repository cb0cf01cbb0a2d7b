"""ELF kernels: the file header, segments, and notes.

A boot loader needs very little of ELF (System V ABI, chapters 4 and 5): the file header says
where the program headers are; those of type PT_LOAD say what goes where, those of type
PT_NOTE where a kernel leaves messages for its loader. Sections and symbols are for linkers.

Kernels are placed by p_paddr. p_vaddr is where the kernel will see itself once its own page
tables are on: for Linux, near -2 GiB.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vmm.loader import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.bootfile import Image
    from vmm.loader import Target

MAGIC: Final = b"\x7fELF"
EM_386: Final = 3
EM_X86_64: Final = 62
PT_LOAD: Final = 1
PT_NOTE: Final = 4

MAX_SEGMENTS: Final = 128  # Linux has 5; a bound on work, not on sense
MAX_NOTES: Final = 64 * 1024  # bytes per PT_NOTE; Linux has about 500

_IDENT: Final = Struct("<4sBBB9x")  # magic, class, data encoding, version
# e_type e_machine e_version, e_entry e_phoff e_shoff, e_flags e_ehsize e_phentsize e_phnum
_HEADER: Final = {1: Struct("<HHI 3I I3H"), 2: Struct("<HHI 3Q I3H")}
# offset vaddr paddr filesz memsz, between them p_flags: behind memsz in 32-bit ELF,
# behind type in 64-bit ELF, and of no use to a loader
_SEGMENT: Final = {1: Struct("<6I4xI"), 2: Struct("<I4x6Q")}
_NOTE: Final = Struct("<III")  # namesz descsz type
_OTHER_TYPES: Final = {1: "an object file (a kernel module?)", 4: "a core dump"}
_EXECUTABLE: Final = (2, 3)  # ET_EXEC, ET_DYN


class Segment(NamedTuple):
    """One program header, the same for both classes; bytes `filesz`..`memsz` are zero."""

    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Note(NamedTuple):
    """A message from the kernel to its loader: `name` says in whose words, `type` which."""

    name: bytes
    type: int
    desc: bytes


class Elf(NamedTuple):
    """What a loader needs of an ELF file."""

    image: Image
    machine: int
    entry: int
    segments: tuple[Segment, ...]

    def loads(self) -> list[Segment]:
        """Return the segments that take memory."""
        return [part for part in self.segments if part.type == PT_LOAD and part.memsz]

    def holds(self, gpa: int) -> bool:
        """Tell whether `gpa` lies in a segment, by physical address."""
        return any(part.paddr <= gpa < part.paddr + part.memsz for part in self.loads())

    def physical_entry(self) -> int | None:
        """Return e_entry as a GPA: as it stands, else by the segment that has it as p_vaddr."""
        if self.holds(self.entry):
            return self.entry
        for part in self.loads():
            if part.vaddr <= self.entry < part.vaddr + part.memsz:
                return self.entry - part.vaddr + part.paddr
        return None

    def notes(self) -> Iterator[Note]:
        """Walk the PT_NOTE segments; a malformed note ends its segment. Raises ConfigError."""
        for part in self.segments:
            if part.type == PT_NOTE:
                data = self.image.read(part.offset, min(part.filesz, MAX_NOTES))
                yield from _walk_notes(data, 8 if part.align == 8 else 4)


def parse(image: Image) -> Elf:
    """Read the headers of a file that begins with MAGIC. Raises ConfigError."""
    _, class_, encoding, _ = _IDENT.unpack(image.read(0, _IDENT.size))
    if class_ not in _HEADER or encoding != 1:
        raise image.wrong("ELF of a class or byte order that no PC has", "use an amd64 kernel")
    header, layout = _HEADER[class_], _SEGMENT[class_]
    kind, machine, _, entry, table, _, _, _, entry_size, count = header.unpack(
        image.read(_IDENT.size, header.size)
    )
    if machine not in (EM_386, EM_X86_64):
        raise image.wrong(f"ELF for machine {machine}, not x86", "use an amd64 kernel")
    if kind not in _EXECUTABLE:
        what = _OTHER_TYPES.get(kind, f"ELF of type {kind}")
        raise image.wrong(f"{what}, not an executable", "use a vmlinux")
    if entry_size != layout.size or not 0 < count <= MAX_SEGMENTS:
        raise image.wrong(
            f"damaged ELF: {count} program headers of {entry_size} bytes", "copy it again"
        )
    headers = image.read(table, count * entry_size)
    segments = tuple(Segment(*fields) for fields in layout.iter_unpack(headers))
    return Elf(image, machine, entry, segments)


def load_segments(target: Target, elf: Elf) -> None:
    """Put every PT_LOAD at its p_paddr and zero its bss. Raises ConfigError."""
    loads = elf.loads()
    if not loads:
        raise elf.image.wrong("ELF with nothing to load", "use a vmlinux, not its debug file")
    end = max(part.paddr + part.memsz for part in loads)
    if end > target.ram_end:  # said of the whole, not of the first segment that sticks out
        raise target.too_small(str(elf.image), end)
    for number, part in enumerate(loads):
        if part.filesz > part.memsz:
            raise elf.image.wrong(
                f"damaged ELF: segment {number} has {part.filesz} bytes for {part.memsz} of RAM",
                "copy it again",
            )
        target.claim(part.paddr, part.memsz, f"segment {number} of {elf.image}")
    for part in loads:
        target.fill(part.paddr, part.filesz, elf.image, part.offset)
        target.clear(part.paddr + part.filesz, part.memsz - part.filesz)


def _walk_notes(data: bytes, align: int) -> Iterator[Note]:
    """Yield the notes in `data`: header, name, desc, the last two padded to `align`."""
    at = 0
    while at + _NOTE.size <= len(data):
        name_size, desc_size, type_ = _NOTE.unpack_from(data, at)
        name = at + _NOTE.size
        desc = align_up(name + name_size, align)
        if desc + desc_size > len(data):
            return
        end = desc + desc_size
        yield Note(data[name : name + name_size].rstrip(b"\0"), type_, data[desc:end])
        at = align_up(end, align)
