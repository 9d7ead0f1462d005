"""A thousand drafts criticised over a server that fails now and then, at sixteen requests at once, killed in the middle."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from chat_server import TRANSIENT, ChatServer, by_share
from running import lines

N = 1000


def critique(prompt: str, seed: object = None) -> str:
    """What the server says of the response in a prompt: of one that is better already, 9; of a draft, 1 to 8."""
    response = prompt.split("### Response\n")[1].split("\n")[0]
    better = response.startswith("better")
    score = 9 if better else 1 + int(hashlib.sha256(response.encode()).hexdigest(), 16) % 8
    rewrite = response if better else f"better {response}"
    return f"Weaknesses: the answer falls short.\nSuggestions: mend it.\nOverall Score: [[{score}]]\n\n### Improved Response\n{rewrite}"


def start(server: ChatServer, place: Path, root: str, concurrency: int) -> subprocess.Popen[str]:
    words = [
        "+algo=srt_collect", "data=custom", f"data.train={place}/rows.jsonl", "data.response=null", "algo.drafts=draft",
        "critic=endpoint", "algo.critic.model=m", f"algo.critic.base_url={server.url}", "algo.critic.timeout=2",
        "algo.rows_per_part=200", f"run.root={place / root}", f"run.concurrency={concurrency}", "run.wandb=disabled",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "alignkit", "train", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OPENAI_API_KEY": "sk-of-a-test"},
    )  # fmt: skip


def data_of(place: Path, root: str) -> Path:
    (found,) = (place / root).glob("srt_collect-*/data.jsonl")
    return found


def test_a_thousand_rows_once_each_and_none_paid_for_twice(tmp_path: Path) -> None:
    """What is killed at sixteen requests at once ends byte for byte like an unbroken run without faults at three."""
    rows = [{"prompt": f"question {i}", "draft": f"draft {i}"} for i in range(N)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults = by_share(0.1, TRANSIENT)
    with ChatServer(faults, delay=0.002, slow=3.0, retry_after=0.1, say=critique) as server:
        server.wait_for = 900
        process = start(server, tmp_path, "killed", 16)
        assert server.answered.wait(120), process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.1)  # for what is still on its way in the server
        first = Counter(server.completed)
        assert 900 <= first.total() < 2 * N

        process = start(server, tmp_path, "killed", 16)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert len(server.completed) == 2 * N  # a critique of each draft and one of each rewrite
        twice = [prompt for prompt, times in server.completed.items() if times > 1]
        assert len(twice) <= 16 and set(twice) <= set(first) and max(server.completed.values()) <= 2  # at the kill

    found = lines(data_of(tmp_path, "killed"))
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert all(row["refinement"] == f"better {row['draft']}" and row["score_refinement"] == 9 for row in found)
    result = json.loads((data_of(tmp_path, "killed").parent / "result.json").read_text())
    assert (result["rows"]["kept"], result["spent"]["failed"]) == (N, 0)

    with ChatServer(say=critique) as server:
        process = start(server, tmp_path, "whole", 3)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert server.peak <= 3
    assert data_of(tmp_path, "whole").read_bytes() == data_of(tmp_path, "killed").read_bytes()
