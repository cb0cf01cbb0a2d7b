"""`limits` of vm.yaml: what the processes of one VM may use of the host together."""

from __future__ import annotations

from typing import Any, Final

from config.kinds import Kind, Size
from config.model import LimitsConfig
from config.tables import Key, Table

_MOST: Final = 102_400  # per cent


class Percent(Kind):
    """A share of CPU time; 100% is one CPU."""

    def expects(self) -> str:
        """Show one."""
        return "a share of CPU time such as 150%, where 100% is one CPU"

    def read(self, text: str) -> int:
        """Return per cent. Raises ValueError."""
        number = text.removesuffix("%")
        if number == text or not (number.isascii() and number.isdigit() and len(number) <= 6):
            raise self.refuse(text)
        if not 1 <= int(number) <= _MOST:
            raise self.refuse(text, f"from 1% to {_MOST}%")
        return int(number)

    def show(self, value: Any) -> str:
        """Return it with its unit."""
        return f"{value}%" if value else "none"

    def json_schema(self) -> dict[str, Any]:
        """Check the form."""
        return {"type": "string", "pattern": "^[1-9][0-9]{0,5}%$"}


LIMITS: Final = Table(
    "limits",
    (
        Key(
            "cpu",
            Percent(),
            "CPU time, `100%` for one CPU: of the vCPUs, devices and all else together.",
            absent="no limit",
        ),
        Key(
            "memory",
            Size(16 << 20, step=4096),
            "Memory, the guest's own and about 64M that the processes need. Beyond it the kernel "
            "swaps, and where it cannot, ends the VM.",
            absent="no limit",
        ),
    ),
    LimitsConfig,
)
