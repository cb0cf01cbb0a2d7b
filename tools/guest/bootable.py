"""Makes a disk that a PC's firmware can start: debian.img in a partition, a kernel in it, GRUB.

    sector 0     GRUB's boot.img and the partition table
           1     its core.img, up to 1 MiB: finds kernel and initramfs, and starts them
        2048     partition 1: the file system of debian.img, with /boot/vmlinuz and initrd.img

No loop devices and no root: files get into the file system by debugfs. Needs grub-pc-bin,
grub-common and e2fsprogs.
"""

from __future__ import annotations

import os
import tempfile
from struct import pack
from typing import Final

from tools.guest.debian import run
from tools.guest.kernel import GuestImageError

SECTOR: Final = 512
PARTITION: Final = 2048  # first sector of partition 1
BOOT_IMG: Final = "/usr/lib/grub/i386-pc/boot.img"
CODE: Final = 440  # bytes of boot.img before disk signature and partition table
TABLE: Final = 446
LINUX: Final = 0x83  # partition type
NO_CHS: Final = b"\xfe\xff\xff"  # the sectors' numbers count

MODULES: Final = "biosdisk part_msdos ext2 serial terminal linux boot echo"
CONFIG: Final = """\
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
echo pyvmd-guest: GRUB
set root=(hd0,msdos1)
linux /boot/vmlinuz root=/dev/vda1 console=ttyS0 quiet systemd.show_status=false
initrd /boot/initrd.img
boot
"""
FSTAB: Final = "/dev/vda1 / ext4 defaults 0 1\n"


def build(image: str, debian: str, kernel: str, initramfs: str) -> None:
    """Write the disk to `image`; the other three are files. Raises GuestImageError."""
    size = os.path.getsize(debian)
    with tempfile.TemporaryDirectory(prefix="bootable-", dir=os.path.dirname(image)) as scratch:
        core = core_image(scratch)
        if len(core) > (PARTITION - 1) * SECTOR:
            raise GuestImageError(f"GRUB's core.img has {len(core)} bytes, too many for its gap")
        with open(BOOT_IMG, "rb") as file:
            boot = file.read(SECTOR)
        with open(image, "wb") as file:
            file.write(boot_sector(boot, size // SECTOR) + core)
        run("dd", f"if={debian}", f"of={image}", "bs=1M", "seek=1", "conv=sparse,notrunc")
        os.truncate(image, PARTITION * SECTOR + size)
        install(image, scratch, {"/boot/vmlinuz": kernel, "/boot/initrd.img": initramfs})


def boot_sector(boot: bytes, nr_sectors: int) -> bytes:
    """Return GRUB's first sector with a table of one active Linux partition."""
    entry = pack("<B3sB3sII", 0x80, NO_CHS, LINUX, NO_CHS, PARTITION, nr_sectors)
    return boot[:CODE] + bytes(TABLE - CODE) + entry + bytes(3 * len(entry)) + b"\x55\xaa"


def core_image(scratch: str) -> bytes:
    """Return GRUB with its configuration inside."""
    config, core = f"{scratch}/grub.cfg", f"{scratch}/core.img"
    with open(config, "w", encoding="ascii") as file:
        file.write(CONFIG)
    command = f"grub-mkimage -O i386-pc -p (hd0,msdos1)/boot/grub -o {core} -c {config} {MODULES}"
    run(*command.split())
    with open(core, "rb") as file:
        return file.read()


def install(image: str, scratch: str, files: dict[str, str]) -> None:
    """Write files to the file system in partition 1, and an fstab. Raises GuestImageError."""
    fstab, script = f"{scratch}/fstab", f"{scratch}/debugfs"
    with open(fstab, "w", encoding="ascii") as file:
        file.write(FSTAB)
    with open(script, "w", encoding="utf-8") as file:
        file.write("rm /etc/fstab\n")
        for name, source in {"/etc/fstab": fstab, **files}.items():
            file.write(f'write "{source}" {name}\n')
    partition = f"{image}?offset={PARTITION * SECTOR}"
    run("debugfs", "-w", "-f", script, partition)
    for name, source in files.items():  # debugfs ends with status 0 whatever happened
        copy = f"{scratch}/copy"
        run("debugfs", "-R", f"dump {name} {copy}", partition)
        run("cmp", source, copy)
    run("e2fsck", "-fn", partition)
