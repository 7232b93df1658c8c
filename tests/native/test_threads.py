"""Native code beside other threads, with few processors and after a fork gives the results of a single thread.

The checks run in processes of their own, because a fault would be a hang or a crash; several share one, because most of
the time is its start. A process that takes minutes has failed, at the last check that it names on stderr.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import cpu, model, tokenizer

from tfcli.config.options import Sampling
from tfcli.infer import step
from tfcli.infer.engine import Engine
from tfcli.infer.residency import pack_weights
from tfcli.model.cache import KVCache
from tfcli.native import library as native_library

GREEDY = Sampling(max_tokens=6, ignore_eos=True, temperature=0.0)
PROMPTS = [f"{number} daughters {'of the king ' * (number % 5)}" for number in range(50)]
FEW = PROMPTS[:8]
LONG = "and the youngest was so lovely " * 12
"""More positions than one thread attends to."""
BUILDS = {"openmp": "-fopenmp", "own threads": ""}


def engine(seed: int = 0, width: int = 64) -> Engine:
    """An engine with packed weights, as ``tfcli.load`` makes it."""
    core = model(seed, context=512, width=width, heads=4, head_width=32).to(torch.bfloat16)
    pack_weights(core)
    return Engine(core, tokenizer(), cpu())


def texts(engine: Engine, prompts: list[str]) -> list[list[int]]:
    """Generated ids of every prompt, one after the other."""
    return [engine.generate(prompt, GREEDY).ids for prompt in prompts]


def in_threads(works: list) -> list:  # type: ignore[type-arg]
    """Results of these functions, each in a thread, all started at once."""
    results, begin = [None] * len(works), threading.Barrier(len(works))

    def run(index: int) -> None:
        begin.wait()
        results[index] = works[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def train(steps: int = 6) -> list[float]:
    """Losses of a few steps."""
    core = model(1, context=64, width=64)
    optimizer = torch.optim.AdamW(core.parameters(), lr=1e-3)
    ids_BT = torch.randint(3, 400, (8, 64), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        logits_BTV = core.logits(core(ids_BT))
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_engine() -> bool:
    """Eight threads, which all use an engine for the first time at once."""
    alone, shared = texts(engine(), PROMPTS), engine()
    return in_threads([lambda: texts(shared, PROMPTS)] * 8) == [alone] * 8


def two_engines() -> bool:
    """Four threads, every second one with another model."""
    alone, shared = [texts(engine(seed), FEW) for seed in (0, 1)], [engine(0), engine(1)]
    works = [lambda one=shared[index % 2]: texts(one, FEW) for index in range(4)]
    return in_threads(works) == alone * 2


def training() -> bool:
    """One thread trains while another one generates."""
    losses, ids = train(), texts(engine(), FEW)
    return in_threads([train, lambda: texts(engine(), FEW)]) == [losses, ids]


def scoring() -> bool:
    """One thread reads the weights while another one is about to move them."""
    text = " ".join(FEW)
    loss = engine().score(text).loss
    shared = engine()
    scored, generated = in_threads([lambda: shared.score(text).loss, lambda: texts(shared, FEW)])
    return abs(scored - loss) < 1e-2 and generated == texts(engine(), FEW)


def plain() -> list[list[int]]:
    """A long prompt alone."""
    return texts(engine(), [LONG])


def pinned() -> list[list[int]]:
    """More threads than processors, from the first call of the process."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    ids = plain()
    os.sched_setaffinity(0, allowed)
    return ids


def after_fork() -> list[list[int]]:
    """A child of a process whose threads have worked, of native code and of PyTorch, with its parent's engine too."""
    wide = engine(width=256)
    ours = texts(wide, [LONG])
    read, write = os.pipe()
    if not (child := os.fork()):
        signal.alarm(100)  # nobody waits longer, and it would stay behind
        torch.rand(1000, 1000) @ torch.rand(1000, 1000) + 1
        with os.fdopen(write, "w") as file:
            json.dump([texts(wide, [LONG]), plain()], file)
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        theirs, ids = json.load(file)
    return ids if theirs == ours else theirs


def many_threads() -> float:
    """Largest difference of the logits of a long row, relative to the largest, with 300 and with 2000 threads."""
    core = model(context=300).requires_grad_(False)
    ids = torch.randint(3, 400, (250,), generator=torch.Generator().manual_seed(0)).tolist()
    differences = []
    with torch.inference_mode():
        expected = core.logits(core(torch.tensor([ids]))[:, -1])
        for threads in (300, 2000):
            cache = KVCache(core.config, batch=1, capacity=300, dtype=torch.float32, device=core.device)
            core(torch.tensor([ids[:-1]]), cache=cache)
            torch.set_num_threads(threads)
            logits = step.Stepper(core, exact=True).step(ids[-1:], cache)
            torch.set_num_threads(2)
            differences.append(float((logits - expected).abs().max() / expected.abs().max()))
    return max(differences)


TOGETHER = ("plain", "one_engine", "two_engines", "training", "scoring", "after_fork", "many_threads")
FEWER = ("pinned", "plain") if hasattr(os, "sched_setaffinity") else ("plain",)


def results_of(checks: tuple[str, ...], library: Path, **env: str) -> dict[str, object]:
    """Run functions of this file in a process of their own, with two threads and that library."""
    code = (
        "import ctypes, json, sys; from tfcli.native import library; "
        "library.load = lambda: ctypes.CDLL(sys.argv[1]); import test_threads; "
        "run = lambda name: (print(name, file=sys.stderr), getattr(test_threads, name)())[1]; "
        "print(json.dumps({name: run(name) for name in sys.argv[2:]}))"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(library), *checks],
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path, **env},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, object] = json.loads(done.stdout)
    return results


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest) -> Path:
    """The library with each of the two kinds of threads, from the user's cache."""
    return native_library.compiled(native_library.find_compiler(), BUILDS[request.param])


@pytest.fixture(scope="module")
def together(library: Path) -> dict[str, object]:
    """Results of the checks that may share a process."""
    return results_of(
        TOGETHER if hasattr(os, "fork") else tuple(name for name in TOGETHER if "fork" not in name), library
    )


@pytest.mark.parametrize("check", ["one_engine", "two_engines", "training", "scoring"])
def test_threads_give_what_each_gives_alone(check: str, together: dict[str, object]) -> None:
    """Would catch a barrier, a workspace, a budget or an engine's weights shared by two calls."""
    assert together[check] is True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_gives_what_its_parent_gives(together: dict[str, object]) -> None:
    """Would catch a wait for threads that do not exist after a fork."""
    assert together["after_fork"] == together["plain"]


def test_any_number_of_threads_is_right(together: dict[str, object]) -> None:
    """Would catch a table that has a place for each thread up to some number."""
    difference = together["many_threads"]
    assert isinstance(difference, float)
    assert difference < 2e-5


def test_fewer_threads_than_requested_give_the_same(library: Path, together: dict[str, object]) -> None:
    """One processor, and OpenMP that may give fewer threads: would catch a wait for threads that never come."""
    fewer = results_of(FEWER, library, OMP_DYNAMIC="true")
    assert list(fewer.values()) == [together["plain"]] * len(FEWER)


@pytest.mark.parametrize("library", ["openmp"], indirect=True)
def test_a_limit_of_one_thread_gives_the_same(library: Path, together: dict[str, object]) -> None:
    """OpenMP that gives a single thread, whatever is requested."""
    assert results_of(("plain",), library, OMP_THREAD_LIMIT="1")["plain"] == together["plain"]
