"""The control socket of a VM: QMP commands in, replies and events out (design §9).

Commands are rows of `COMMANDS`. How one client is kept from disturbing the others and the VM is
in `qmpsession`; what the bytes mean is in `qmp`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from config.errors import PyvmError
from vmm import log, qmp
from vmm.qmpsession import Session
from vmm.sockets import Listener, flush_and_close, leaver

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from devices.loop import Loop
    from vmm.qmpfds import Descriptors
    from vmm.qmpsession import Later
    from vmm.sockets import Peer

CLIENTS: Final = 32

# Values of "reason" in RESET and SHUTDOWN events (ShutdownCause in QEMU's schema).
CAUSE_QUIT: Final = "host-qmp-quit"
CAUSE_HOST_RESET: Final = "host-qmp-system-reset"
CAUSE_SIGNAL: Final = "host-signal"
CAUSE_HOST_ERROR: Final = "host-error"
CAUSE_GUEST_SHUTDOWN: Final = "guest-shutdown"
CAUSE_GUEST_RESET: Final = "guest-reset"
CAUSE_GUEST_PANIC: Final = "guest-panic"


class VmOperations(Protocol):
    """What a control client can do to a VM. Called on the loop's thread; must not block it.

    Each may raise PyvmError, whose text goes to the client, and the ones that change something
    may return a Later. The VM sends the events itself, by Control.emit().
    """

    @property
    def name(self) -> str:
        """The VM's name."""

    def status(self) -> str:
        """Return the run state in QEMU's words: prelaunch, running, paused, shutdown, ..."""

    def info(self) -> Mapping[str, Any]:
        """Return the facts of `status --json`: values that JSON can hold."""

    def pause(self) -> Later | None:
        """Park every vCPU. No error if it is paused."""

    def resume(self) -> Later | None:
        """Let the vCPUs go on. No error if it is running."""

    def reset(self, cause: str) -> Later | None:
        """Reset the machine in place, without asking the guest."""

    def power_button(self) -> Later | None:
        """Press the ACPI power button."""

    def ctrl_alt_del(self) -> Later | None:
        """Type Ctrl-Alt-Del on the guest's keyboard."""

    def send_break(self) -> Later | None:
        """Send a BREAK on the serial line."""

    def set_device(self, device: str, setting: str, value: Any, fd: int = -1) -> Any:
        """Change something about a virtio device at run time; the device says what and how.

        A device that wants a descriptor for it gets a copy of `fd`.
        """

    def ask(self, goal: str) -> dict[str, Any]:
        """Ask the guest to "stop" or "reboot", and see to it that it does; return what is tried."""

    def move_tray(
        self, device: str, action: str, *, force: bool = False, fd: int = -1, path: str = ""
    ) -> Any:
        """Do one of eject, insert, load to a CD-ROM drive; return where disc and tray are now.

        `fd` is the disc at `path`, to be copied. By `force` also if the guest has locked it.
        """

    def quit(self, cause: str) -> Later | None:
        """End the VM without asking the guest; the end itself comes after this returns."""


class Command(NamedTuple):
    """One row: what to call, and its arguments' names, each with its type and whether needed."""

    run: Callable[[VmOperations, dict[str, Any]], Any]
    arguments: Mapping[str, tuple[type, bool]] = {}
    told: bool = False  # the log says who wanted that


class ClientCommand(NamedTuple):
    """A row whose command uses the descriptors that its client has handed over."""

    run: Callable[[VmOperations, dict[str, Any], Descriptors], Any]
    arguments: Mapping[str, tuple[type, bool]] = {}
    told: bool = False


def _negotiated(_vm: VmOperations, _arguments: dict[str, Any]) -> None:
    what = "capabilities negotiation is already complete, command ignored"
    raise qmp.QmpError(what, error_class="CommandNotFound")


def _query_status(vm: VmOperations, _arguments: dict[str, Any]) -> dict[str, Any]:
    status = vm.status()
    return {"status": status, "running": status == "running"}


def _set_device(vm: VmOperations, arguments: dict[str, Any], fds: Descriptors) -> Any:
    wanted = arguments["device"], arguments["setting"], arguments["value"]
    if "fdname" not in arguments:
        return vm.set_device(*wanted)
    fd = fds.take(arguments["fdname"])
    try:
        return vm.set_device(*wanted, fd)
    finally:
        os.close(fd)


def _change_medium(vm: VmOperations, arguments: dict[str, Any], fds: Descriptors) -> Any:
    fd = fds.take(arguments["fdname"])
    try:
        force, path = arguments.get("force", False), arguments["path"]
        return vm.move_tray(arguments["id"], "insert", force=force, fd=fd, path=path)
    finally:
        os.close(fd)


COMMANDS: Final[dict[str, Command | ClientCommand]] = {
    "qmp_capabilities": Command(_negotiated, {"enable": (list, False)}),
    "query-version": Command(lambda vm, _: qmp.version()),
    "query-commands": Command(lambda vm, _: [{"name": name} for name in COMMANDS]),
    "query-name": Command(lambda vm, _: {"name": vm.name}),
    "query-status": Command(_query_status),
    "stop": Command(lambda vm, _: vm.pause(), told=True),
    "cont": Command(lambda vm, _: vm.resume(), told=True),
    "system_reset": Command(lambda vm, _: vm.reset(CAUSE_HOST_RESET), told=True),
    "system_powerdown": Command(lambda vm, _: vm.power_button(), told=True),
    "quit": Command(lambda vm, _: vm.quit(CAUSE_QUIT), told=True),
    "block_resize": Command(
        lambda vm, args: vm.set_device(args["device"], "resize", args["size"]),
        {"device": (str, True), "size": (int, True)},
    ),
    "eject": Command(
        lambda vm, args: vm.move_tray(args["id"], "eject", force=args.get("force", False)),
        {"id": (str, True), "force": (bool, False)},
    ),
    "blockdev-close-tray": Command(
        lambda vm, args: vm.move_tray(args["id"], "load"), {"id": (str, True)}
    ),
    "x-pyvmd-change-medium": ClientCommand(
        _change_medium,
        {"id": (str, True), "fdname": (str, True), "path": (str, True), "force": (bool, False)},
    ),
    "getfd": ClientCommand(lambda _, args, fds: fds.name(args["fdname"]), {"fdname": (str, True)}),
    "closefd": ClientCommand(
        lambda _, args, fds: os.close(fds.take(args["fdname"])), {"fdname": (str, True)}
    ),
    "x-pyvmd-set-device": ClientCommand(
        _set_device,
        {
            "device": (str, True),
            "setting": (str, True),
            "value": (object, True),
            "fdname": (str, False),
        },
    ),
    "x-pyvmd-info": Command(lambda vm, _: dict(vm.info())),
    "x-pyvmd-send-break": Command(lambda vm, _: vm.send_break()),
    "x-pyvmd-stop": Command(lambda vm, _: vm.ask("stop"), told=True),
    "x-pyvmd-reboot": Command(lambda vm, _: vm.ask("reboot"), told=True),
    "x-pyvmd-ctrl-alt-del": Command(lambda vm, _: vm.ctrl_alt_del(), told=True),
}

_TYPE_WORDS: Final = {str: "a string", int: "an integer", bool: "a boolean", list: "an array"}


def _check(arguments: dict[str, Any], allowed: Mapping[str, tuple[type, bool]]) -> None:
    """Compare arguments with a command's row before anything is done. Raises QmpError."""
    for key, value in arguments.items():
        if key not in allowed:
            raise qmp.QmpError(f"parameter '{qmp.clip(key)}' is unexpected")
        wanted = allowed[key][0]
        # Not isinstance: True is no integer here. `object` leaves it to the command.
        if wanted is not object and type(value) is not wanted:
            raise qmp.QmpError(f"parameter '{key}' must be {_TYPE_WORDS[wanted]}")
    for key, (_, needed) in allowed.items():
        if needed and key not in arguments:
            raise qmp.QmpError(f"parameter '{key}' is missing")


class Control:
    """The control socket: lets clients in, executes their commands, tells them what happens."""

    def __init__(
        self,
        loop: Loop,
        listen_socket: socket.socket,
        vm: VmOperations,
        permitted: Callable[[Peer], bool],
    ) -> None:
        self._loop, self._vm = loop, vm
        self._clients: dict[Session, Peer] = {}  # in order of arrival
        self._listener = Listener(
            loop,
            listen_socket,
            permitted=permitted,
            welcome=self._welcome,
            refusal=lambda why: qmp.error(qmp.QmpError(why), {}),
            who="control",
        )

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._clients)

    def emit(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to every client past negotiation. For the loop's thread."""
        message = qmp.event(name, dict(data or {}))
        for client in list(self._clients):
            if client.negotiated:
                client.send(message)

    def execute(self, client: Session, request: qmp.Request) -> Any:
        """Run one command; return its result or a Later. Raises PyvmError for the error reply."""
        command = COMMANDS.get(request.name)
        if not client.negotiated:
            if request.name != "qmp_capabilities":
                what = "expecting capabilities negotiation with 'qmp_capabilities'"
                raise qmp.QmpError(what, error_class="CommandNotFound")
            _check(request.arguments, COMMANDS["qmp_capabilities"].arguments)
            if request.arguments.get("enable"):
                raise qmp.QmpError("this server offers no capabilities; enable none")
            client.negotiated = True
            return None
        if command is None:
            what = f"the command '{qmp.clip(request.name)}' has not been found"
            raise qmp.QmpError(what, error_class="CommandNotFound")
        _check(request.arguments, command.arguments)
        if command.told:
            peer = self._clients[client]
            log.info(f"{request.name}, from uid {peer.uid}, process {peer.pid}", "control")
        try:
            if isinstance(command, ClientCommand):
                return command.run(self._vm, request.arguments, client.descriptors)
            return command.run(self._vm, request.arguments)
        except PyvmError:
            raise
        except Exception as err:
            # Our fault, and no reason to take the guest down with a client's question.
            log.error(f"{request.name} failed: {err!r}", "control")
            raise qmp.QmpError(f"internal error: {err!r}") from err

    def close(self) -> None:
        """Let nobody in any more, give clients a moment to read the last words, drop them."""
        self._listener.close()
        flush_and_close(list(self._clients))

    def _forget(self, client: Session) -> None:
        self._clients.pop(client, None)

    def _welcome(self, sock: socket.socket, peer: Peer) -> None:
        if len(self._clients) >= CLIENTS and not self._make_room(peer):
            self._listener.refuse(sock, f"{CLIENTS} clients are connected, and that is the limit")
            return
        session = Session(self._loop, sock, self.execute, self._forget)
        self._clients[session] = peer

    def _make_room(self, newcomer: Peer) -> bool:
        """Drop a client: one that has said nothing yet, else one of those who have many."""
        gone = next((other for other in self._clients if not other.negotiated), None)
        if gone is None:
            gone = leaver(self._clients, newcomer)
        if gone is None:
            return False
        peer = self._clients[gone]
        what = f"a client of uid {peer.uid}, process {peer.pid}, has to make room"
        log.limited("control room", what, "control")
        gone.close()
        return True
