"""A real S3 server behind a proxy, a share of whose requests fails as a file says.

python -m tests.cluster.store_server ADDRESS PORT BUCKET FAULTS_FILE
"""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

from tests.storage.stores import Proxy

FAULTS = ("500", "503", "cut", "lose")


def main() -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    address, port, bucket, file = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    own_port = server.get_host_and_port()[1]
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{own_port}").create_bucket(Bucket=bucket)
    draw = random.Random(0)

    def fault(number: int, what: str) -> str:
        return draw.choice(FAULTS) if draw.random() < float(file.read_text() or 0) else ""

    Proxy(own_port, fault, address, port)
    print("serving as", os.getpid(), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
