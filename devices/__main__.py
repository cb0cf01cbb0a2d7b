"""python -m devices KIND: a device of ours as a vhost-user back end."""

from __future__ import annotations

import sys

from devices.backendcli import main

sys.exit(main())
