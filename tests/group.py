"""One of several processes that run the same configurations one after the other: ``python tests/group.py FILE``, started by ``together``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def together(count: int, configurations: list[list[str]], folder: Path) -> None:
    """Run configurations (words of ``alignkit train``) in ``count`` processes, as torchrun would start them."""
    file = folder / f"words-{count}.json"
    file.write_text(json.dumps(configurations), encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    logs = [open(folder / f"log-{count}-{i}", "w") for i in range(count)]  # noqa: SIM115
    group = [
        subprocess.Popen(
            [sys.executable, __file__, str(file)], env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}, stdout=log, stderr=log,
        )
        for i, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=400) for process in group]
    finally:
        for process in group:
            process.kill()
        for log in logs:
            log.close()
    said = "\n".join((folder / f"log-{count}-{i}").read_text()[-2000:] for i in range(count))
    assert codes == [0] * count, f"{codes}\n{said}"


if __name__ == "__main__":
    from running import composed

    from alignkit.launch import launch

    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        launch(composed(words))
