"""The engine: continuous batching over one donated state.

    engine = Engine(params, tokenizer)
    engine.submit(request, print)      # calls back with every Output
    engine.run()                       # or `Service`, which runs it in a thread of its own

Each step is planned by a pure function (`plan`), booked by the board and done by a worker that owns
the state. Where steps overlap (see `Options`), the engine settles step n while the worker does step
n + 1: it reads what was drawn, decodes text, streams. What a sequence drew stays with the worker,
so step n + 1 need not wait for it; a sequence that ends in step n may be in step n + 1 as well,
whose result nobody reads.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from qnext.acceptance import of_step
from qnext.errors import InputError
from qnext.functional.mesh import Mesh
from qnext.functional.params import Params, empty_params
from qnext.runtime.board import Board, Course
from qnext.runtime.files import SnapshotFiles
from qnext.runtime.options import Options
from qnext.runtime.request import (
    CorruptedError,
    FullError,
    Logprob,
    Output,
    RankError,
    Request,
    StepError,
    check,
)
from qnext.runtime.rounds import NOTHING, OVER, Form
from qnext.runtime.sequence import Sequence, Sink, marks_of, why_uncached
from qnext.runtime.stats import Stats
from qnext.runtime.steps import Steps
from qnext.runtime.work import Done, Drawn, Read, Work
from qnext.runtime.worker import Worker
from qnext.text import Continuation, Tokenizer

log = logging.getLogger("qnext")
PAUSE = 0.005  # seconds between rounds while no group has work
KEPT = ("eos", "stop", "length", "guide")  # ends after which somebody may go on


class Engine:
    """Serves requests, step by step; not for two threads at once. See `Service` for one that is.

    Raises InputError for options that do not fit the model, and what `Steps` raises.
    """

    def __init__(
        self,
        params: Params,
        tokenizer: Tokenizer | None = None,
        options: Options | None = None,
        steps: Steps | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options = options or Options()
        options.check(params)
        self.steps = steps or Steps(params, options.target, options.strict, **options.buckets)
        self.params = self.steps.params  # on the target's device
        self.worker = Worker(
            self.steps, options.rows, options.capacity, options.pool, options.draft
        )
        self.stats = Stats()
        self.files: SnapshotFiles | None = None
        if options.cache_dir is not None:
            whole = replace(self.params.config, mesh=Mesh())
            self.files = SnapshotFiles(
                empty_params(whole, "meta"),
                self.worker.moves.digest(self.params),
                options.cache_dir,
                options.file_bytes,
                self.params.embed.device,
            )
        self.board = Board(options, self.stats, self.files.save if self.files is not None else None)
        self._arrivals = 0
        self._lost = False
        self.quiet = False  # no group had work when this one last asked
        self._flight: tuple[Course, Future[Done]] | None = None
        self._pool = ThreadPoolExecutor(1, "qnext-worker") if options.overlaps else None

    def warm(self, progress: bool = False) -> None:
        """Compile all steps at once, rather than each when it is first needed."""
        self.worker.warm(progress)

    def submit(self, request: Request, sink: Sink) -> Sequence:
        """Take a request; `sink` is called with each Output, in `step`.

        Raises InputError for one that cannot be served, FullError where too many wait.
        """
        if len(self.board.waiting) >= self.options.max_waiting:
            raise FullError(len(self.board.waiting))
        sequence = self.prepare(request, sink)
        self.enqueue(sequence)
        return sequence

    def prepare(self, request: Request, sink: Sink) -> Sequence:
        """Check a request and lay out its sequence; touches nothing that a step touches."""
        check(request, self.params.config.vocab_size, self.options.capacity)
        if request.stops and not self.tokenizer:
            raise InputError("stops: an engine without a tokenizer knows no text to stop at")
        ends = request.eos
        if ends is None:
            ends = self.tokenizer.eos_ids if self.tokenizer else ()
        sequence = Sequence(
            request=request,
            ends=tuple(ends),
            sink=sink,
            text=self._continuation(request, ends),
            tokens=list(request.tokens),
            uncached=why_uncached(request, self.options.cache_bytes),
        )
        if request.start is not None:
            sequence.length, sequence.swapped = request.start.length, request.start.take()
        elif self.files is not None and sequence.caches:
            found = self.files.find(request.tokens, sequence.reusable)
            if found:
                sequence.length, sequence.swapped = found
        return sequence

    def enqueue(self, sequence: Sequence) -> None:
        """Let a sequence that was prepared wait for its turn, behind those that came before."""
        self._arrivals += 1
        sequence.number = self._arrivals
        if sequence.caches:
            sequence.marks = marks_of(sequence.request, self.options.snapshot_every)
        if sequence.swapped is not None and sequence.caches:  # memory may know as much
            hit = self.board.cache.find(sequence.tokens, sequence.reusable)
            if hit and hit.length >= sequence.length:
                sequence.length, sequence.swapped = 0, None
        if sequence.limit > 0:
            self.board.waiting[sequence.number] = sequence
        else:  # one token, and none to come: there is nothing to compute
            self._finish(sequence, "length")

    def _continuation(self, request: Request, ends: tuple[int, ...]) -> Continuation | None:
        if self.tokenizer is None:
            return None
        return Continuation(
            self.tokenizer,
            request.tokens,
            request.stops,
            ends,
            request.min_new_tokens,
            request.skip_special_tokens,
            request.keep_stop,
        )

    def abort(self, sequence: Sequence, finish: str = "abort") -> None:
        """End a request; what it holds is free before the next step. Ended ones are no matter."""
        if sequence.finish is None:
            self._finish(sequence, finish)

    @property
    def fallbacks(self) -> int:
        """Sites of the steps compiled so far that no rule of the target took."""
        return sum(len(step.made.left) for step in self.steps.made)

    @property
    def busy(self) -> bool:
        return self.board.busy or self._flight is not None

    def step(self) -> bool:
        """Launch the next step and settle the one before, or where steps do not overlap the same.

        Returns whether there is more to do.
        """
        if self._flight and self._must_know():
            under_way, self._flight = self._flight, None
            self._settle(*under_way)
        course = self.board.next(time.monotonic())
        for sequence in course.expired:
            self._finish(sequence, "deadline")
        launched = None if course.work == Work() else (course, self._launch(course.work))
        if launched is None and self._flight is None and self.attends:
            self.attend()
        flight, self._flight = self._flight, launched
        if self._pool is None:  # it is done already
            flight, self._flight = launched, None
        if flight:
            self._settle(*flight)
        return self.busy

    def run(self) -> None:
        """Serve until nothing is left to do."""
        while self.step():
            pass

    def close(self) -> None:
        """End every request, settle what is under way, stop the worker's thread."""
        for sequence in self.board.known():
            self._finish(sequence, "closed")
        self.run()
        if self.files is not None:
            self.board.cache.clear()
            self.run()
            self.files.close()
        while self.attends and self.attend(over=True) != OVER:
            time.sleep(PAUSE if self.quiet else 0)
        if self._pool:
            self._pool.shutdown()
        self.steps.close()

    def _must_know(self) -> bool:
        """Whether the next step depends on what the one under way draws."""
        assert self._flight
        decoding = self._flight[0].decoding
        return any(s.request.guide and s.finish is None for _, s in decoding)

    def _launch(self, work: Work) -> "Future[Done]":
        self.stats.steps += 1
        if self._pool:
            return self._pool.submit(self.worker.run, work)
        done: Future[Done] = Future()
        try:
            done.set_result(self.worker.run(work))
        except Exception as error:
            done.set_exception(error)
        return done

    # ---- after a step

    def _settle(self, course: Course, future: "Future[Done]") -> None:
        try:
            done = future.result()
        except RankError:
            raise
        except Exception as error:
            log.exception("a step failed; the engine begins anew with those who wait")
            self._begin_anew([course], error)
            return
        for then, taken in zip(course.first, done.first, strict=True):
            then(taken)
        for row, sequence, length in course.reading:
            if sequence.finish is None:
                self._read(sequence, done.failed.get(row) or done.read[row], length)
        for row, sequence in course.decoding:
            sequence.flying -= 1
            if sequence.finish is None:
                self._decoded(sequence, done.failed.get(row) or done.drawn[row])
        self.stats.failed_steps += bool(done.failed)
        for failure in {*done.failed.values()}:
            log.error("a call failed; its requests end, others go on", exc_info=failure)
        for then, taken in zip(course.then, done.then, strict=True):
            then(taken)

    @property
    def attends(self) -> bool:
        """Whether other groups call, also while this one has nothing to do."""
        return self.steps.rounds is not None and not self._lost

    def attend(self, over: bool = False) -> Form:
        """Take part in a call of other groups; over: there will be no more of this one."""
        rest = self.worker.attend
        called = self._pool.submit(rest, over).result() if self._pool else rest(over)
        self.quiet = called == NOTHING
        return called

    def recover(self, error: Exception) -> None:
        """After `step` raised, which is our mistake: begin anew with those who wait."""
        self._begin_anew([], error)

    def lose(self, error: Exception) -> None:
        """Ranks are gone, and nothing can go on: every request ends with this error."""
        self._lost = True
        for sequence in self.board.known():
            self._finish(sequence, "error", error=error)
        self.board.reset()
        self._flight = None

    def _begin_anew(self, courses: list[Course], error: Exception) -> None:
        """The worker itself failed: whatever ran is lost, whoever waits is served."""
        self.stats.failed_steps += 1
        if self._flight:  # it is of no use any more, but must not run on into a new state
            course, future = self._flight
            self._flight, courses = None, [*courses, course]
            wait([future])
        for course in courses:
            for then in (*course.first, *course.then):
                then(None)
        for sequence in [*self.board.running.values(), *self.board.leaving.values()]:
            self._finish(sequence, "error", error=StepError(error))
        self.board.reset()
        self.worker.reset()

    def _decoded(self, sequence: Sequence, drawn: Drawn | Exception) -> None:
        if not self._is_sound(sequence, drawn):
            return
        assert isinstance(drawn, Drawn)
        room = sequence.limit - (len(sequence.tokens) - 1)
        finish, taken = None, 0
        for token in drawn.tokens:
            taken += 1
            sequence.tokens.append(token)
            finish = self._ended(sequence, token)
            if finish:
                break
        self.stats.generated += taken
        sequence.length = len(sequence.tokens) - 1
        ahead = sequence.flying * self.board.ahead
        sequence.sent = min(sequence.length + ahead, sequence.limit)
        if taken and self.options.draft:
            step = of_step(taken, self.options.draft, room, finish is not None)
            sequence.acceptance += step
            self.stats.acceptance += step
        tokens, logprobs = drawn.tokens[:taken], drawn.logprobs[:taken]
        guide = sequence.request.guide
        if guide and guide.error:
            self._finish(sequence, "error", tokens, logprobs, InputError(guide.error))
        elif finish:
            self._finish(sequence, finish, tokens, logprobs)
        elif taken:
            self._tell(sequence, tokens, logprobs)

    def _ended(self, sequence: Sequence, token: int) -> str | None:
        """What ends a sequence with this token, its newest; None where it goes on."""
        request, finish = sequence.request, None
        if sequence.text:
            sequence.text.push(token)
            finish = sequence.text.finish
        elif token in sequence.ends and sequence.made > request.min_new_tokens:
            finish = "eos"
        if request.guide and request.guide.advance([token]):
            finish = finish or "guide"
        if finish is None and sequence.made >= request.max_new_tokens:
            finish = "length"
        return finish

    def _read(self, sequence: Sequence, read: Read | Exception, length: int) -> None:
        if not self._is_sound(sequence, read):
            return
        assert isinstance(read, Read)
        sequence.length = length
        sequence.prompt_logprobs += read.logprobs
        if length >= sequence.limit:  # nothing but the prompt was asked for
            self._finish(sequence, "length")

    def _is_sound(self, sequence: Sequence, result: Drawn | Read | Exception) -> bool:
        """Whether a step gave a result of numbers; else the sequence ends, and leaves none."""
        if isinstance(result, Exception):
            self._finish(sequence, "error", error=StepError(result))
        elif not result.finite:
            self.stats.corrupted += 1
            self._finish(sequence, "error", error=CorruptedError(sequence.request.id))
        return sequence.finish is None

    # ---- answers

    def _finish(
        self,
        sequence: Sequence,
        finish: str,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[Logprob, ...] = (),
        error: Exception | None = None,
    ) -> None:
        if sequence.text and sequence.text.finish is None:
            sequence.text.end(finish)
            finish = "stop" if sequence.text.finish == "stop" else finish
        sequence.finish, sequence.error = finish, error
        if sequence.request.handoff is not None and finish != "length":
            sequence.request.handoff.fail(f"its prompt was not read: {error or finish}")
        self.board.remove(sequence, keep=finish in KEPT, wipe=error is not None)
        self.stats.finished[finish] += 1
        self._tell(sequence, tokens, logprobs)

    def _tell(
        self, sequence: Sequence, tokens: tuple[int, ...], logprobs: tuple[Logprob, ...]
    ) -> None:
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        sequence.sink(
            Output(
                id=sequence.request.id,
                tokens=tokens,
                text=sequence.text.release() if sequence.text else "",
                logprobs=logprobs,
                prompt_logprobs=tuple(prompt_logprobs),
                prompt=sequence.prompt,
                cached=sequence.cached,
                made=sequence.made,
                finish=sequence.finish,
                stopped_by=sequence.text.stopped_by if sequence.text else None,
                error=sequence.error,
                acceptance=sequence.acceptance,
                uncached=sequence.uncached,
            )
        )
