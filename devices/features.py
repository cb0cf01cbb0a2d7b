"""The feature bits that every kind of virtio device shares (virtio 1.2 §6), as masks.

A device's own bits are in its own file. Bits 24 to 40 change how queues and transport behave.
"""

from __future__ import annotations

from typing import Final

F_NOTIFY_ON_EMPTY: Final = 1 << 24  # legacy: call when the queue runs empty, whatever was said
F_ANY_LAYOUT: Final = 1 << 27  # legacy: framing means nothing; always so here
F_INDIRECT_DESC: Final = 1 << 28  # a descriptor may name a table of descriptors
F_EVENT_IDX: Final = 1 << 29  # kicks and calls are asked for by position
F_VERSION_1: Final = 1 << 32
F_ACCESS_PLATFORM: Final = 1 << 33
F_RING_PACKED: Final = 1 << 34
F_IN_ORDER: Final = 1 << 35  # chains are given back in the order they were taken
F_NOTIFICATION_DATA: Final = 1 << 38
F_RING_RESET: Final = 1 << 40  # one queue can be reset alone

# What the queue engine implements for any device.
RING_FEATURES: Final = (
    F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_RING_PACKED | F_IN_ORDER | F_RING_RESET
)
LEGACY_RING_FEATURES: Final = F_NOTIFY_ON_EMPTY | F_ANY_LAYOUT | F_INDIRECT_DESC | F_EVENT_IDX
