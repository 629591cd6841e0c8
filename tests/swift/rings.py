"""One-device rings for a loopback Swift: `python rings.py FOLDER account=PORT container=PORT object=PORT`.

Runs in the servers' own environment, for it needs Swift's ring builder.
"""

import sys
from pathlib import Path

from swift.common.ring import RingBuilder

_PART_POWER = 3
_REPLICAS = 1


def main(folder: Path, services: dict[str, int]) -> None:
    for service, port in services.items():
        builder = RingBuilder(_PART_POWER, _REPLICAS, 0)
        place = {"region": 1, "zone": 1, "weight": 1.0, "device": "disk", "ip": "127.0.0.1", "port": port}
        builder.add_dev({**place, "replication_ip": "127.0.0.1", "replication_port": port})
        builder.rebalance(seed=1)
        builder.get_ring().save(str(folder / f"{service}.ring.gz"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), {name: int(port) for name, port in (word.split("=") for word in sys.argv[2:])})
