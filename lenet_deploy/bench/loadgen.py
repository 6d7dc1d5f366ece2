"""The binding to MLPerf LoadGen: one test of its, whatever happens meanwhile.

LoadGen is C++ that calls back into Python. It cannot be stopped, and an exception that leaves a callback destroys a test whose threads go
on: the process crashes (tried with 6.0). So none leaves one. Whatever goes wrong is kept, and so is Ctrl-C; from then on queries cost
nothing, LoadGen comes to its end, and only then is it raised. How soon that is depends on the scenario, see `System.stop`.
"""

from __future__ import annotations

import contextlib
import math
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenet_deploy.bench.load import SEEDS, Load
from lenet_deploy.errors import LenetDeployError, Unusable, first_line

if TYPE_CHECKING:
    import torch

Respond = Callable[[Sequence[int]], "torch.Tensor"]
Context = Callable[[], AbstractContextManager[object]]


class System:
    """What LoadGen asks: every query is answered in the callback that brings it, in launches of at most `batch_size` images."""

    def __init__(self, binding: Any, respond: Respond, batch_size: int) -> None:
        self.queries = 0
        self.error: BaseException | None = None
        self.stopped = False
        self.batch_size = batch_size
        self._binding, self._respond = binding, respond

    def issue(self, ids: list[int], indices: list[int]) -> None:
        """A query: the numbers of its samples, and of their images."""
        self.queries += 1
        for first in range(0, len(ids), self.batch_size):
            window = slice(first, first + self.batch_size)
            if not self.answer(ids[window], indices[window]):
                self.dismiss(ids[window])

    def flush(self) -> None:
        """No query will follow."""

    def answer(self, ids: Sequence[int], indices: Sequence[int]) -> bool:
        """One launch, and LoadGen told where in host memory each sample's logits are; False where that is over, or failed."""
        if self.stopped:
            return False
        try:
            logits = self._respond(indices).contiguous()
            if len(logits) != len(ids):
                raise ValueError(f"{len(logits)} rows of scores for {len(ids)} images")
            self._complete(ids, logits.data_ptr(), logits.nbytes // len(ids))
        except BaseException as error:
            self.fail(error)
            return False
        return True

    def dismiss(self, ids: Sequence[int]) -> None:
        """Answer samples with nothing, so that LoadGen does not wait for them."""
        self._complete(ids, 0, 0)

    def fail(self, error: BaseException) -> None:
        """Keep the first error, and stop."""
        self.error = self.error or error
        self.stop()

    def stop(self) -> None:
        """Compute no more, so that LoadGen ends soon.

        `Offline`: at once. `SingleStream` and `MultiStream`: when the queries that LoadGen prepared are used up, at microseconds each.
        `Server`, where LoadGen sleeps until queries are due: see there.
        """
        self.stopped = True

    def _complete(self, ids: Sequence[int], address: int, row_bytes: int) -> None:
        response = self._binding.QuerySampleResponse
        self._binding.QuerySamplesComplete([response(sample, address + row * row_bytes, row_bytes) for row, sample in enumerate(ids)])


class Server(System):
    """A serving system: a thread takes what is waiting, up to `batch_size` queries, and answers it with one launch.

    It waits for nothing: a query that finds the thread idle runs alone, and batches form while a launch is under way. Once stopped it
    answers nothing until no query follows: so LoadGen soon finds more waiting than `Load.max_waiting`, and ends.
    """

    def __init__(self, binding: Any, respond: Respond, batch_size: int) -> None:
        super().__init__(binding, respond, batch_size)
        self._waiting: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()

    def issue(self, ids: list[int], indices: list[int]) -> None:
        self.queries += 1
        for pair in zip(ids, indices, strict=True):
            self._waiting.put(pair)

    def flush(self) -> None:
        self._waiting.put(None)

    def serve(self, context: Context) -> None:
        """What the thread does, until the last query is answered."""
        held: list[int] = []
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(context())
            except BaseException as error:
                self.fail(error)
            more = True
            while more:
                batch, more = self._next_batch()
                ids, indices = [sample for sample, _ in batch], [index for _, index in batch]
                if batch and not self.answer(ids, indices):
                    held += ids
            if held:
                self.dismiss(held)

    def _next_batch(self) -> tuple[list[tuple[int, int]], bool]:
        """What is waiting, at least one query unless none follows; and whether more may come."""
        batch: list[tuple[int, int]] = []
        item = self._waiting.get()
        while item is not None:
            batch.append(item)
            if len(batch) == self.batch_size:
                return batch, True
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False


def run_test(load: Load, images: int, respond: Respond, context: Context) -> tuple[str, int]:
    """Run one test; the text of LoadGen's summary, and the number of queries it issued.

    LoadGen writes its logs into a temporary folder, which is gone afterwards, and nothing to standard output. It runs in a thread of its
    own, since Python raises KeyboardInterrupt only in the main one, where no callback of LoadGen's may be.

    Args:
        images: how many there are to ask for.
        respond: from the numbers of images to their logits, (N, classes) in host memory.
        context: entered in every thread that calls `respond`.

    Raises:
        Unusable: LoadGen is not installed, or `respond` failed.
        LenetDeployError: what `respond` raised.
        KeyboardInterrupt: after LoadGen has ended.
    """
    binding = load_binding()
    system = (Server if load.scenario == "Server" else System)(binding, respond, load.batch_size)
    summaries: list[str] = []
    finished = threading.Event()

    def work() -> None:
        try:
            with context(), _serving(system, context), tempfile.TemporaryDirectory(prefix="loadgen-") as folder:
                summaries.append(_start(binding, load, images, system, Path(folder)))
        except BaseException as error:
            system.fail(error)
        finally:
            finished.set()

    thread = threading.Thread(target=work, name="loadgen")
    try:
        thread.start()
        finished.wait()  # and not join(), which an interrupt leaves thinking that the thread has ended
    except KeyboardInterrupt:
        system.stop()
        if thread.ident is not None:
            finished.wait()
        raise
    if isinstance(system.error, LenetDeployError):
        raise system.error
    if system.error is not None:
        raise Unusable(f"a query of LoadGen's was not answered ({first_line(system.error)}); see parity") from system.error
    return summaries[0], system.queries


def load_binding() -> Any:
    """The package; raises Unusable with the fix where it does not import."""
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise Unusable(
            f"load scenarios need MLPerf LoadGen, which does not import here ({error}); pip install 'lenet-deploy[loadgen]'"
        ) from None
    return mlperf_loadgen


@contextlib.contextmanager
def _serving(system: System, context: Context) -> Iterator[None]:
    """With the serving thread of a Server, and without one of anything else."""
    if not isinstance(system, Server):
        yield
        return

    thread = threading.Thread(target=system.serve, args=(context,), name="loadgen-server")
    thread.start()
    try:
        yield
    finally:
        system.flush()  # once more, in case that LoadGen did not come as far
        thread.join()


def _start(binding: Any, load: Load, images: int, system: System, folder: Path) -> str:
    output = binding.LogOutputSettings()
    output.outdir = str(folder)
    logs = binding.LogSettings()
    logs.log_output, logs.enable_trace = output, False
    under_test = binding.ConstructFastSUT(system.issue, system.flush)
    library = binding.ConstructQSL(images, images, lambda indices: None, lambda indices: None)  # they are in memory already
    try:
        # An audit.config in the current directory would change the settings, so it is looked for where none is.
        binding.StartTestWithLogSettings(under_test, library, _settings(binding, load), logs, str(folder / "audit.config"))
    finally:
        binding.DestroyFastSUT(under_test)
        binding.DestroyQSL(library)
    return (folder / "mlperf_log_summary.txt").read_text()


def _settings(binding: Any, load: Load) -> Any:
    """LoadGen's TestSettings. Percentiles are its defaults: 0.90 in SingleStream, 0.99 elsewhere."""
    settings = binding.TestSettings()
    settings.scenario = getattr(binding.TestScenario, load.scenario)
    settings.mode = binding.TestMode.PerformanceOnly
    settings.min_duration_ms = math.ceil(1e3 * load.duration_s)
    settings.min_query_count = load.min_queries
    settings.single_stream_expected_latency_ns = settings.multi_stream_expected_latency_ns = 1e9 / load.qps
    settings.multi_stream_samples_per_query = load.samples_per_query
    settings.offline_expected_qps = settings.server_target_qps = load.qps
    settings.server_target_latency_ns = round(1e9 * load.latency_bound_s)
    settings.server_max_async_queries = load.max_waiting
    for name, seed in SEEDS.items():
        setattr(settings, name, seed)
    return settings
