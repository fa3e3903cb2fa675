"""docs/soak.md: `vllm serve` with our checkpoint under mixed load, bad clients, and a killed engine.

`python -m benchmarks.soak [--requests 1200]`. SmolLM2-135M-Instruct, calibrated on few samples, is served in float32 on
loopback. Each request is drawn at random from a seed, and CLIENTS of them run at a time:

    answer      a short greedy completion, at once or streamed: its text must be the one that `LLM()` gave offline
    cut         a stream that the client closes after its first piece
    oversized   more tokens than the model's length: 400
    malformed   a body that is not JSON: 400 or 422
    wrong       a parameter out of range or of another type, or an unknown model: 400, 404 or 422

Resident memory is that of the server and all its children, sampled once a second. Its growth is the median of the last
tenth of the samples compared with the median of the first tenth, after WARM_UP requests. Then the engine's process is
killed under load: the requests must end, the server must end with an error, and a new server must give the same
answers.

The batches change all the time, and float sums change with them. Our integers do not, because each token has a dynamic
scale of its own, so that no request affects another; attention and norms are vLLM's. --baseline puts the same load on
the unquantised model, to show vLLM's share of any difference. The last line printed is JSON.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from benchmarks.machine import describe
from calibration.evaluation.measure import engine_environment
from demo import assets
from demo.server import vllm_serve

OUTPUT = Path(__file__).parent / "results" / "soak.json"
PAGE = Path(__file__).parent.parent / "docs" / "soak.md"
COMMAND = "python -m benchmarks.soak"
CLIENTS = 16
WARM_UP = 200
LENGTH = 256
TOKENS = (2, 4, 8)
# Kind of request -> its weight in the random choice.
KINDS = {"answer": 6, "streamed": 3, "cut": 2, "oversized": 1, "malformed": 1, "wrong": 1}
PROMPTS = [
    f"{start} {thing} is"
    for start in ("The capital of", "The largest city in", "A well known river of", "The language spoken in")
    for thing in ("France", "Italy", "Japan", "Egypt", "Brazil", "Canada")
]
WRONG: list[dict[str, Any]] = [
    {"max_tokens": -1}, {"temperature": "hot"}, {"temperature": -3}, {"top_p": 7}, {"n": 0}, {"model": "nothing"},
    {"prompt": None}, {"prompt": {"a": 1}}, {"stop": 5}, {"logprobs": -5}, {"prompt": [10**9]},
]  # fmt: skip
ARGUMENTS = ["--served-model-name", "model", "--max-model-len", str(LENGTH), "--max-num-seqs", str(CLIENTS)]
ARGUMENTS += ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", "512M"]
ENDS_S = 120


def offline(model: Path) -> dict[str, list[str]]:
    """Prompt -> text for each of TOKENS, by LLM() in a process of its own, one prompt at a time."""
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary, "answer.json")
        subprocess.run(
            [sys.executable, "-m", "benchmarks.soak", "--offline", str(model), str(answer)],
            env=engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, check=True, timeout=900,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return dict(json.loads(answer.read_text()))


def answer_offline(model: str, answer: Path) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, dtype="float32", max_model_len=LENGTH, max_num_seqs=1, enforce_eager=True,
        kv_cache_memory_bytes=512 * 2**20,
    )  # fmt: skip
    texts: dict[str, list[str]] = {}
    for prompt in PROMPTS:
        for tokens in TOKENS:
            output = llm.generate([prompt], SamplingParams(max_tokens=tokens, temperature=0.0), use_tqdm=False)
            texts.setdefault(prompt, []).append(output[0].outputs[0].text)
    answer.write_text(json.dumps(texts))


class Client:
    """Sends requests and counts their outcomes."""

    def __init__(self, url: str, expected: dict[str, list[str]]) -> None:
        self.http = httpx.Client(base_url=url, timeout=300, limits=httpx.Limits(max_connections=2 * CLIENTS))
        self.expected = expected
        self.counts: Counter[str] = Counter()
        self.surprises: list[str] = []
        self.wrong: list[str] = []  # complete answers with another text

    def body(self, dice: random.Random) -> tuple[dict[str, Any], str]:
        prompt, i = dice.choice(PROMPTS), dice.randrange(len(TOKENS))
        body = {"model": "model", "prompt": prompt, "max_tokens": TOKENS[i], "temperature": 0}
        return body, self.expected[prompt][i]

    def send(self, seed: int) -> None:
        dice = random.Random(seed)
        kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
        body, expected = self.body(dice)
        try:
            got = getattr(self, f"_{kind}")(body, dice)
        except httpx.HTTPError as error:
            got = f"{type(error).__name__}"
        good = got == expected if kind in ("answer", "streamed") else got in ("cut", "400", "404", "422")
        self.counts[f"{kind}: {'as it should be' if good else 'NOT'}"] += 1
        if kind == "answer" and not good and not got.isdigit() and not got.endswith(("Error", "Timeout")):
            self.wrong.append(got)
        if not good:
            self.surprises.append(f"{kind} {json.dumps(body)[:200]}: {got[:200]!r}, expected {expected!r}")

    def _answer(self, body: dict[str, Any], dice: random.Random) -> str:
        reply = self.http.post("/v1/completions", json=body)
        return str(reply.json()["choices"][0]["text"]) if reply.status_code == 200 else str(reply.status_code)

    def _streamed(self, body: dict[str, Any], dice: random.Random) -> str:
        pieces = []
        with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    pieces.append(event["choices"][0]["text"] if "choices" in event else "StreamError")
        return "".join(pieces)

    def _cut(self, body: dict[str, Any], dice: random.Random) -> str:
        with self.http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 64}) as reply:
            next(reply.iter_lines(), None)
        return "cut"

    def _oversized(self, body: dict[str, Any], dice: random.Random) -> str:
        return str(self.http.post("/v1/completions", json=body | {"prompt": "word " * 4 * LENGTH}).status_code)

    def _malformed(self, body: dict[str, Any], dice: random.Random) -> str:
        text = json.dumps(body)[: dice.randrange(1, 40)]
        headers = {"Content-Type": "application/json"}
        return str(self.http.post("/v1/completions", content=text, headers=headers).status_code)

    def _wrong(self, body: dict[str, Any], dice: random.Random) -> str:
        return str(self.http.post("/v1/completions", json=body | dice.choice(WRONG)).status_code)


class Memory(threading.Thread):
    """Samples the resident bytes of our server and all its children once a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[int] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(1):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.samples.append(total)


def load(client: Client, seeds: range) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client.send, seeds))


def under_load(url: str, expected: dict[str, list[str]], requests: int) -> dict[str, Any]:
    client, began = Client(url, expected), time.monotonic()
    load(client, range(WARM_UP))
    memory = Memory()
    memory.start()
    load(client, range(WARM_UP, requests))
    memory.ended.set()
    memory.join()
    tenth = max(1, len(memory.samples) // 10)
    first, last = median(memory.samples[:tenth]), median(memory.samples[-tenth:])
    return {
        "requests": sum(client.counts.values()), "seconds": time.monotonic() - began,
        "outcomes": dict(sorted(client.counts.items())), "surprises": client.surprises[:20],
        "memory_mib": [first / 2**20, last / 2**20], "memory_growth": last / first - 1,
    }  # fmt: skip


def killed(url: str, expected: dict[str, list[str]]) -> dict[str, Any]:
    """Kill the engine's process under the load of CLIENTS; the outcomes of the requests, and the processes left."""
    processes = psutil.Process().children(recursive=True)
    server = next(p for p in processes if "serve" in p.cmdline())
    # The engine holds the model, so that it is the largest process.
    engines = [max(server.children(recursive=True), key=lambda p: p.memory_info().rss)]
    client = Client(url, expected)
    with ThreadPoolExecutor(CLIENTS) as pool:
        waiting = [pool.submit(client.send, seed) for seed in range(10**6, 10**6 + 4 * CLIENTS)]
        time.sleep(2)
        began = time.monotonic()
        for process in engines:
            process.kill()
        for each in waiting:
            each.result(ENDS_S)
    answered = time.monotonic() - began
    _, alive = psutil.wait_procs(processes, timeout=ENDS_S)
    return {
        "engines_killed": len(engines), "requests_ended_after_s": answered, "still_alive": len(alive),
        "outcomes": dict(sorted(client.counts.items())), "wrong_answers": client.wrong,
    }  # fmt: skip


def soak(model: Path, requests: int, log: Path, before: dict[str, Any]) -> dict[str, Any]:
    """before: the figures of an earlier run under load, if only the kill is to be repeated; else empty."""
    expected = offline(model)
    with vllm_serve(model, *ARGUMENTS, log=log) as url:
        result = before or under_load(url, expected, requests)
        print(json.dumps(result), file=sys.stderr, flush=True)
        result["killed"] = killed(url, expected)
    with vllm_serve(model, *ARGUMENTS, log=log.with_suffix(".again")) as url:
        client = Client(url, expected)
        for prompt in PROMPTS:
            body = {"model": "model", "prompt": prompt, "max_tokens": TOKENS[-1], "temperature": 0}
            same = client._answer(body, random.Random(0)) == expected[prompt][-1]
            client.counts["same" if same else "other"] += 1
        result["restarted"] = dict(client.counts)
    return result


def calibrated(output: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "calibration", "calibrate", str(assets.model_dir()), "-o", str(output), "--quiet",
         "--dataset", str(assets.calibration_text()), "--samples", "8", "--seq-len", "128"],
        check=True,
    )  # fmt: skip
    return output


def main() -> None:
    """Calibrate, generate offline, serve under load, kill, restart; write JSON and page; exit 1 if `holds` is false."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1200, help=f"of these, {WARM_UP} warm up")
    parser.add_argument("--model", type=Path, help="a checkpoint of SmolLM2 (default: calibrate one)")
    parser.add_argument(
        "--kill-again", action="store_true", help="keep the figures under load; repeat kill and restart"
    )
    parser.add_argument("--baseline", action="store_true", help="also put the load on the unquantised model")
    parser.add_argument(
        "--log", type=Path, default=Path(tempfile.gettempdir()) / "soak.log", help="the server's output"
    )
    parser.add_argument("--offline", nargs=2, metavar=("MODEL", "ANSWER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offline:
        answer_offline(args.offline[0], Path(args.offline[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or calibrated(Path(temporary, "int8"))
        before = json.loads(OUTPUT.read_text())["int8"] if args.kill_again else {}
        result = {"int8": soak(model, args.requests, args.log, before)}
    if args.baseline:
        source = assets.model_dir()
        expected = offline(source)
        with vllm_serve(source, *ARGUMENTS, log=args.log) as url:
            result["float32"] = under_load(url, expected, args.requests)
    OUTPUT.write_text(json.dumps({"machine": describe(), **result}, indent=2) + "\n")
    PAGE.write_text(page(result, args.requests))
    print(json.dumps(result))
    sys.exit(0 if holds(result["int8"]) else 1)


def holds(r: dict[str, Any]) -> bool:
    return (
        not any("NOT" in outcome for outcome in r["outcomes"])
        and r["memory_growth"] < 0.02
        and r["killed"]["engines_killed"] > 0
        and not r["killed"]["still_alive"]
        and not r["killed"]["wrong_answers"]
        and set(r["restarted"]) == {"same"}
    )


def page(result: dict[str, Any], requests: int) -> str:
    r = result["int8"]
    outcomes = "".join(f"| {name} | {count} |\n" for name, count in r["outcomes"].items())
    text = (
        f"# Under load\n\nWritten by `{COMMAND} --requests {requests}`; not by hand. {describe()}\n\n"
        f"SmolLM2-135M-Instruct, default scheme, float32, {CLIENTS} requests at a time on loopback; {r['requests']} in "
        f"{r['seconds']:.0f} s, the first {WARM_UP} to warm up. What each kind is and must do: benchmarks/soak.py.\n\n"
        f"| request | |\n|---|---|\n{outcomes}\n"
        f"Resident memory of the server and its processes: {r['memory_mib'][0]:.0f} MiB after the warm-up, "
        f"{r['memory_mib'][1]:.0f} MiB at the end, {r['memory_growth']:+.2%}.\n\n"
    )
    if "killed" not in r:
        return text + "Engine killed under load, and restart: not measured yet.\n"
    k = r["killed"]
    text += (
        f"Engine killed under load ({k['engines_killed']} process): all requests ended within "
        f"{k['requests_ended_after_s']:.1f} s, {len(k['wrong_answers'])} of them with a wrong answer; the server ended "
        f"with {k['still_alive']} processes left. Started again: {r['restarted'].get('same', 0)} of {len(PROMPTS)} "
        "answers the same.\n"
    )
    if "float32" in result:
        outcomes = "".join(f"| {name} | {count} |\n" for name, count in result["float32"]["outcomes"].items())
        text += f"\nThe unquantised model under the same load:\n\n| request | |\n|---|---|\n{outcomes}"
    return text


if __name__ == "__main__":
    main()
