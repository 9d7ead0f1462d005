"""One of several processes that run the same configurations one after the other: ``python tests/group.py FILE``, started by ``together``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def together(count: int, configurations: list[list[str]], folder: Path) -> None:
    """Run configurations (words of ``alignkit train``) in ``count`` processes, as torchrun would start them."""
    file = folder / f"words-{count}.json"
    file.write_text(json.dumps(configurations), encoding="utf-8")
    codes, said = _start(count, [str(file)], folder)
    assert codes == [0] * count, f"{codes}\n{said}"


def spawned(count: int, folder: Path) -> list[dict[str, Any]]:
    """What ``count`` processes find out about a model that they share, each of them."""
    codes, said = _start(count, ["shards", str(folder)], folder)
    assert codes == [0] * count, f"{codes}\n{said}"
    return [json.loads((folder / f"found-{i}.json").read_text(encoding="utf-8")) for i in range(count)]


def failing(folder: Path) -> tuple[list[int], list[str]]:
    """(exit codes, what was said) of two processes, of which the second fails in a pass through layers that are apart."""
    return _start(2, ["fails"], folder)


def _start(count: int, words: list[str], folder: Path) -> tuple[list[int], list[str]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    logs = [open(folder / f"log-{count}-{i}", "w") for i in range(count)]  # noqa: SIM115
    group = [
        subprocess.Popen(
            [sys.executable, __file__, *words], env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}, stdout=log, stderr=log,
        )
        for i, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=600) for process in group]
    finally:
        for process in group:
            process.kill()
        for log in logs:
            log.close()
    return codes, [(folder / f"log-{count}-{i}").read_text()[-2000:] for i in range(count)]


def shared_model() -> Any:
    """The small model that ``spawned`` shares out."""
    from omegaconf import OmegaConf
    from running import SMALL_CAUSAL, composed

    from alignkit import policy

    cfg = composed(["+algo=sft", *SMALL_CAUSAL])
    return policy.load(OmegaConf.to_object(cfg.model), 0, ["a b c d e"] * 50).model.eval()


def filled(i: int, shape: Any) -> Any:
    """A gradient of weight i, different in every place."""
    import torch

    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape).add(i).sin()


def _share_a_model(folder: Path) -> None:
    """Take a small model apart and put it together; what is seen of it, and of its optimizer, goes into ``folder``."""
    import torch
    from safetensors.torch import save_file

    from alignkit import adamw, ranks
    from alignkit.sharding import Shards

    with ranks.joined(100):
        model, ids = shared_model(), torch.tensor([[1, 2, 3, 4]])
        shapes = [p.shape for p in model.parameters()]
        before, state = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
        in_layers = sum(p.numel() for p in model.model.layers.parameters())
        whole = sum(p.numel() for p in model.parameters())
        shards = Shards([model], torch.float32)

        def held() -> int:
            return sum(shards.own(p).numel() for p in model.parameters())

        found = {"weights": whole, "shared": whole - in_layers, "own": held()}
        found["of"] = sum(shards.whole_of(shards.own(p)).numel() for p in model.parameters())
        apart = model(ids).logits  # each layer comes together for its pass alone
        shards.whole()
        again = model.state_dict()
        found["same"] = bool(torch.equal(before, apart)) and bool(torch.equal(before, model(ids).logits))
        found["whole_again"] = state.keys() == again.keys() and all(torch.equal(state[k], again[k]) for k in state)
        shards.apart()
        found["apart_again"] = held()
        parts = [shards.own(p) for p in model.parameters()]
        one, other = torch.optim.AdamW(parts, lr=0.1), torch.optim.AdamW(parts, lr=0.1)
        for i, (p, shape) in enumerate(zip(parts, shapes, strict=True)):
            p.grad = filled(i, shape)[shards.rows(p)]
        one.step()
        state, moments = adamw.state_of(one, shards)
        save_file(moments, folder / adamw.own_name())
        if ranks.first():
            torch.save(state, folder / "optimizer.pt")
        ranks.barrier()
        adamw.load(other, shards, folder)
        wanted, again = one.state_dict()["state"], other.state_dict()["state"]
        found["read_back"] = all(torch.equal(wanted[i][k], again[i][k]) for i in wanted for k in wanted[i])
        (folder / f"found-{ranks.rank()}.json").write_text(json.dumps(found), encoding="utf-8")


def _fail_apart() -> None:
    import torch

    from alignkit import ranks
    from alignkit.batch import Batch
    from alignkit.errors import UserError
    from alignkit.scoring import by_rows
    from alignkit.sharding import Shards

    with ranks.joined(100):
        model = shared_model()
        Shards([model], torch.float32)
        ids = torch.ones(8, 4, dtype=torch.long)
        rows: list[Any] = [{}] * 8
        batch = Batch(ids, ids.bool(), ids, ids.bool(), torch.arange(8), rows, [""] * 8)

        def passed(part: Batch) -> torch.Tensor:
            if ranks.dist.get_rank() == 1 and part.extra["row"][0] >= 2:
                raise UserError("this row is wrong")
            found: torch.Tensor = model(part.prompt_ids).logits[:, 0]
            return found

        with torch.no_grad():
            by_rows(batch, 16, passed)


def _run(file: Path) -> None:
    from running import composed

    from alignkit.launch import launch

    for words in json.loads(file.read_text(encoding="utf-8")):
        launch(composed(words))


if __name__ == "__main__":
    from alignkit import processes

    with processes.ending():
        if sys.argv[1] == "fails":
            _fail_apart()
        elif sys.argv[1] == "shards":
            _share_a_model(Path(sys.argv[2]))
        else:
            _run(Path(sys.argv[1]))
