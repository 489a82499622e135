"""A long run of a server: are all answers those of the library, and does memory stay?

    python benchmarks/soak.py BANK --requests 10000 [-- OPTIONS OF safesteer serve]

Starts `safesteer serve BANK` as a process of its own and sends it short requests, many at once: mixed policies (variants,
strengths that the client names, "off", the bank's gate if it has one), streaming and not, 5% malformed, 5% left in the middle,
and the policy file rewritten all the while, sometimes with one that cannot be used. Every whole answer is compared with
`safesteer.generate` of that prompt and policy alone. Prints one JSON object; exit status 1 if any answer was wrong, a status was
unexpected, or memory (of the server and the processes it started) grew by over 2% between the first tenth and the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from safesteer.engines import GenerationSettings, Request, generate
from safesteer.models import load_model
from safesteer.policy import Policy
from safesteer.vectors import VectorBank

PROMPTS = [
    f"How do I {verb} the {thing}?" for verb in ("mend", "smash", "sell") for thing in ("vase", "old red door", "lamp")
]
STRENGTHS = (0.5, 1.0, 1.5)
GOOD = (
    "categories: {{{first}: {{strength: 1.0, gate: {gate}}}}}\n"
    "variants: {{strict: {{categories: {{{first}: {{strength: 1.5, gate: always}}}}}}}}\n"
)
BAD = "categories: {{{first}: 99}}\n"
CLIENTS = "clients: {may: any}\n"
MALFORMED: list[dict[str, Any]] = [
    {"steering": {"nothing": 1.0}}, {"steering": {"FIRST": -1}}, {"steering": {"FIRST": 9}}, {"steering": [1]},
    {"temperature": "hot"}, {"messages": []}, {"n": 3}, {"max_tokens": 0},
]  # fmt: skip


Expected = dict[
    tuple[str, float], tuple[str, float]
]  # prompt, strength (GATED: the gate's) -> text, strength that acts
GATED = -1.0


class Soak:
    """One run: what was expected, what came."""

    def __init__(self, url: str, model: str, first: str, expected: Expected, tokens: int) -> None:
        self.url, self.model, self.first, self.expected, self.tokens = url, model, first, expected, tokens
        self.seen: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []

    def body(self, dice: random.Random) -> tuple[dict[str, Any], float]:
        """A request, and the strength that must act."""
        way = dice.choice(["default", "strict", "off", "own"])
        strength = {"default": GATED, "strict": 1.5, "off": 0.0}.get(way) if way != "own" else dice.choice(STRENGTHS)
        body = {
            "model": self.model + ("@strict" if way == "strict" else ""), "max_tokens": self.tokens, "temperature": 0,
            "messages": [{"role": "user", "content": dice.choice(PROMPTS)}], "stream": dice.random() < 0.5,
        }  # fmt: skip
        if way == "own":  # of the variant, whose category is always on
            body |= {"model": f"{self.model}@strict", "steering": {self.first: strength}}
        if way == "off":
            body["steering"] = "off"
        return body, float(strength or 0.0)

    async def one(self, client: httpx.AsyncClient, dice: random.Random) -> None:
        """One request of any kind."""
        body, strength = self.body(dice)
        kind = dice.random()
        path = f"{self.url}/v1/chat/completions"
        if kind < 0.05:
            bad = json.loads(json.dumps(dice.choice(MALFORMED)).replace("FIRST", self.first))
            response = await client.post(path, json={**body, **bad})
            self.note("malformed", response.status_code == 400, {"sent": bad, "status": response.status_code})
            return
        if kind < 0.10:
            try:
                async with client.stream("POST", path, json={**body, "stream": True, "max_tokens": 64}) as response:
                    async for _ in response.aiter_lines():
                        break
            except httpx.HTTPError as error:
                self.note("left", False, {"error": repr(error)})
                return
            self.seen["left"] += 1
            return
        response = await client.post(path, json=body)
        if response.status_code == 429:
            self.seen["busy"] += 1
            return
        text, acting = _read(response, body["stream"])
        wanted, acts = self.expected[body["messages"][0]["content"], strength]
        acted = sum(one["strength"] for one in acting)
        right = response.status_code == 200 and text.strip() == wanted and abs(acted - acts) < 2e-3
        self.note(
            "answered",
            right,
            {"body": body, "status": response.status_code, "text": text, "wanted": wanted, "acted": acted},
        )

    def note(self, kind: str, right: bool, what: dict[str, Any]) -> None:
        """Count it; keep what was wrong."""
        self.seen[kind] += 1
        if not right:
            self.wrong.append({"kind": kind, **what})

    async def run(self, count: int, at_once: int, seed: int) -> None:
        """`count` requests, `at_once` of them under way at any time."""
        left = iter(range(count))
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:

            async def worker(number: int) -> None:
                dice = random.Random(seed * 1000 + number)
                for _ in left:
                    await self.one(client, dice)

            await asyncio.gather(*(worker(number) for number in range(at_once)))


def _read(response: httpx.Response, stream: bool) -> tuple[str, list[dict[str, Any]]]:
    if response.status_code != 200:
        return response.text, []
    if not stream:
        body = response.json()
        return body["choices"][0]["message"]["content"], body["steering"]["acting"]
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    if not chunks or "steering" not in chunks[-1]:
        return response.text, []
    return "".join(one["choices"][0]["delta"].get("content", "") for one in chunks), chunks[-1]["steering"]["acting"]


def _memory(process: subprocess.Popen[str]) -> float:
    """Resident memory in MiB, of the process and all it started."""
    parents: dict[int, int] = {}
    sizes: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            parents[int(fields["Pid"])] = int(fields["PPid"])
            sizes[int(fields["Pid"])] = int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
    ours = {process.pid}
    while more := {one for one, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(sizes.get(one, 0.0) for one in ours)


async def _soak(
    soak: Soak, process: subprocess.Popen[str], policy: Path, gate: str, count: int, at_once: int
) -> tuple[float, float]:
    """Memory after the first tenth and at the end."""
    ends = asyncio.Event()

    async def rewrite() -> None:
        dice = random.Random(7)
        while not ends.is_set():
            text = (BAD if dice.random() < 0.3 else GOOD).format(first=soak.first, gate=gate) + CLIENTS
            policy.write_text(text + f"# {dice.random()}\n")
            await asyncio.sleep(1.5)
        policy.write_text(GOOD.format(first=soak.first, gate=gate) + CLIENTS)

    rewriting = asyncio.create_task(rewrite())
    await soak.run(count // 10, at_once, 1)
    early = _memory(process)
    await soak.run(count - count // 10, at_once, 2)
    ends.set()
    await rewriting
    return early, _memory(process)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=6)
    parser.usage = "%(prog)s BANK [options] [-- options of safesteer serve]"
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, serve = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    bank = VectorBank.load(given.bank)
    first = bank.categories[0]
    loaded = load_model(bank.provenance["model"])
    gate = "always" if bank.gate is None else "auto"
    expected: Expected = {}
    for strength in (GATED, 0.0, *STRENGTHS):
        how = {"gate": gate} if strength == GATED else {"strength": strength, "gate": "always"}
        policy = Policy.parse({"categories": {first: how}}, "soak") if strength else Policy.off()
        said = generate(
            loaded, bank, [Request(text, policy) for text in PROMPTS], GenerationSettings(given.tokens, batch_size=1)
        )
        for text, one in zip(PROMPTS, said, strict=True):
            expected[text, strength] = (one.text, sum(acts["strength"] for acts in one.steering["acting"]))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.yaml"
        path.write_text(GOOD.format(first=first, gate=gate) + CLIENTS)
        command = [
            sys.executable,
            "-m",
            "safesteer.cli.main",
            "serve",
            str(given.bank),
            "--policy",
            str(path),
            "--port",
            str(port),
            *serve,
        ]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True) as process:
            url = f"http://127.0.0.1:{port}"
            while True:
                try:
                    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
                    break
                except httpx.TransportError:
                    if process.poll() is not None:
                        sys.exit("the server did not start")
                    time.sleep(0.2)
            soak = Soak(url, name, first, expected, given.tokens)
            began = time.perf_counter()
            early, late = asyncio.run(_soak(soak, process, path, gate, given.requests, given.at_once))
            seconds = time.perf_counter() - began
            reloads = [
                line for line in httpx.get(f"{url}/metrics").text.splitlines() if "policy_reloads_total{" in line
            ]
            process.terminate()
            status = process.wait(60)
    grown = late / early - 1
    result = {
        "requests": given.requests, "different_references": len({text for text, _ in expected.values()}), **soak.seen,
        "wrong": len(soak.wrong),
        "seconds": round(seconds, 1), "memory_mib": [round(early), round(late)], "memory_growth": round(grown, 4),
        "reloads": reloads, "exit_status": status, "first_wrong": soak.wrong[:3],
    }  # fmt: skip
    print(json.dumps(result, indent=1, ensure_ascii=False))
    sys.exit(bool(soak.wrong) or grown > 0.02 or status != 0)


if __name__ == "__main__":
    main()
