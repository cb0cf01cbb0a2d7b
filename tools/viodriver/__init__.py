"""A virtio driver for tests, fuzzing and benchmarks: it plays the guest's part.

    memory = make_memory()
    driver = open_driver(memory, 256, base_gpa=0x10000, features=F_EVENT_IDX)
    token = driver.add([b"header", b"data"], [512, 1])     # readable contents, writable lengths
    if driver.kick_needed(): transport.kick(0)
    [used] = driver.collect()                               # used.token, used.written
    driver.data(used.request)                               # what the device wrote

Fast and without allocation: `request = driver.place(...)` once, then `submit(request)` and
`collect()` as often as you like. For hostile tests the split and the packed driver also write
single words: `desc`, `offer`, `set_avail_index` and so on; nothing checks those.

A driver knows memory and ring only. How a kick reaches the device, and a call the driver, is a
`Transport`, which each way of running a device brings along.
"""

from tools.viodriver.errors import NoRoomError
from tools.viodriver.memory import make_memfd, make_memory
from tools.viodriver.packed import PackedDriver
from tools.viodriver.queue import DriverQueue, Request, Segment, Used
from tools.viodriver.split import SplitDriver, open_driver
from tools.viodriver.transport import Transport

__all__ = [
    "DriverQueue",
    "NoRoomError",
    "PackedDriver",
    "Request",
    "Segment",
    "SplitDriver",
    "Transport",
    "Used",
    "make_memfd",
    "make_memory",
    "open_driver",
]
