"""Native code beside other threads, with few processors, after a fork: what comes out is what comes out alone.

Each case is a process of its own, for a fault would be a hang or a crash: one that takes minutes has failed.
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
from tfcli.native import library as native_build

GREEDY = Sampling(max_tokens=6, ignore_eos=True, temperature=0.0)
PROMPTS = [f"{number} daughters {'of the king ' * (number % 5)}" for number in range(50)]
LONG = "and the youngest was so lovely " * 12
"""More positions than one thread attends to alone."""
BUILDS = {"openmp": ("-fopenmp",), "own threads": ()}


def engine(seed: int = 0) -> Engine:
    """With its weights packed, as ``tfcli.load`` leaves them."""
    core = model(seed, context=512, width=64, heads=4, head_width=32).to(torch.bfloat16)
    pack_weights(core)
    return Engine(core, tokenizer(), cpu())


def texts(made: Engine, prompts: list[str]) -> list[list[int]]:
    """Ids of every prompt, one after the other."""
    return [made.generate(prompt, GREEDY).ids for prompt in prompts]


def in_threads(works: list) -> list:  # type: ignore[type-arg]
    """What each of these gives, all begun at once."""
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


def train(steps: int = 12) -> list[float]:
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
    """Eight threads, and its first use by all of them at once."""
    alone, shared = texts(engine(), PROMPTS), engine()
    return in_threads([lambda: texts(shared, PROMPTS)] * 8) == [alone] * 8


def two_engines() -> bool:
    """Eight threads, every second one with another model."""
    alone, shared = [texts(engine(seed), PROMPTS) for seed in (0, 1)], [engine(0), engine(1)]
    works = [lambda made=shared[index % 2]: texts(made, PROMPTS) for index in range(8)]
    return in_threads(works) == alone * 4


def training() -> bool:
    """One thread trains while another one generates."""
    losses, ids = train(), texts(engine(), PROMPTS)
    return in_threads([train, lambda: texts(engine(), PROMPTS)]) == [losses, ids]


def scoring() -> bool:
    """One thread reads the weights while another one is about to move them."""
    text = " ".join(PROMPTS)
    loss = engine().score(text).loss
    shared = engine()
    scored, generated = in_threads([lambda: shared.score(text).loss, lambda: texts(shared, PROMPTS)])
    return abs(scored - loss) < 1e-2 and generated == texts(engine(), PROMPTS)


def few_processors() -> list[list[int]]:
    """More threads than the processors that are left."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return texts(engine(), [LONG])


def after_fork() -> list[list[int]]:
    """A child of a process whose threads have worked, of native code and of PyTorch."""
    texts(engine(), [LONG])
    torch.rand(1000, 1000) @ torch.rand(1000, 1000) + 1
    read, write = os.pipe()
    if not (child := os.fork()):
        signal.alarm(100)  # nobody waits longer, and it would stay behind
        torch.rand(1000, 1000) @ torch.rand(1000, 1000) + 1
        with os.fdopen(write, "w") as file:
            json.dump(texts(engine(), [LONG]), file)
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        found: list[list[int]] = json.load(file)
    return found


def plain() -> list[list[int]]:
    """As it is."""
    return texts(engine(), [LONG])


def elsewhere(call: str, library: Path, **env: str) -> object:
    """What a call of a function of this file returns in a process of its own, with two threads and that library."""
    code = (
        "import ctypes, json, sys; from tfcli.native import library as native_build; "
        "native_build.load = lambda: ctypes.CDLL(sys.argv[1]); import test_threads; "
        f"print(json.dumps(test_threads.{call}))"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)],
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path, **env},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def alone(library: Path) -> object:
    """What ``plain`` gives where there is nothing in its way."""
    return elsewhere("plain()", library)


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of the two ways to have threads."""
    return native_build.build(native_build.find_compiler(), tmp_path_factory.mktemp("native"), *BUILDS[request.param])


@pytest.mark.parametrize("call", ["one_engine()", "two_engines()", "training()", "scoring()"])
def test_threads_give_what_each_gives_alone(call: str, library: Path) -> None:
    """Would catch a barrier, a workspace, a budget or an engine's weights shared by two calls."""
    assert elsewhere(call, library) is True


@pytest.mark.parametrize(
    ("call", "env"),
    [
        ("plain()", {"OMP_DYNAMIC": "true"}),
        ("plain()", {"OMP_THREAD_LIMIT": "1"}),
        pytest.param("few_processors()", {}, marks=pytest.mark.skipif(sys.platform != "linux", reason="no affinity")),
        pytest.param("after_fork()", {}, marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")),
    ],
    ids=["dynamic", "limited", "pinned", "forked"],
)
def test_fewer_threads_than_asked_for_give_the_same(
    call: str, env: dict[str, str], library: Path, alone: object
) -> None:
    """Would catch a wait for threads that never come."""
    assert elsewhere(call, library, **env) == alone


def many_threads() -> list[float]:
    """Largest difference of the logits of a long row, relative to the largest, by 300 threads and by 2000."""
    core = model(context=300).requires_grad_(False)
    ids = torch.randint(3, 400, (250,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    with torch.inference_mode():
        expected = core.logits(core(torch.tensor([ids]))[:, -1])
        for threads in (300, 2000):
            cache = KVCache(core.config, batch=1, capacity=300, dtype=torch.float32, device=core.device)
            core(torch.tensor([ids[:-1]]), cache=cache)
            torch.set_num_threads(threads)
            logits = step.Stepper(core, exact=True).step(ids[-1:], cache)
            torch.set_num_threads(2)
            found.append(float((logits - expected).abs().max() / expected.abs().max()))
    return found


def test_any_number_of_threads_is_right(library: Path) -> None:
    """Would catch a table that has a place for each thread up to some number."""
    found = elsewhere("many_threads()", library)
    assert isinstance(found, list)
    assert max(found) < 2e-5
