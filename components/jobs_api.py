"""A stage as a job on a Ray cluster that stands, through Ray's Jobs API.

The cluster's token comes from the environment, as Ray has it: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
"""

import asyncio
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from tenacity import Retrying, retry_if_result, stop_after_delay
from tenacity import wait_fixed as every

from components.errors import ConfigError, LaunchError, first_line
from components.job import ENTRYPOINT, REQUEST_S, Backend, Job, LaunchConfig, Phase, Seen
from components.progress import emit
from components.retry import TRANSIENT, retrying

_PATIENCE_S = 60.0  # of trying again when the cluster is away
_LONGEST_POLL_S = 2.0  # the Jobs API has no watch
_PHASES: dict[JobStatus, Phase] = {
    JobStatus.PENDING: "starting",
    JobStatus.RUNNING: "running",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "failed",
}
_UNDER_WAY = (JobStatus.PENDING, JobStatus.RUNNING)


class _Client(JobSubmissionClient):
    """Ray's client, whose requests end."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=REQUEST_S, **options)


class JobsApi(Backend):
    """A job of a Ray cluster that stands."""

    def __init__(self, job: Job, config: LaunchConfig) -> None:
        super().__init__(job, config)
        assert config.address, "settings without it are refused"
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            if os.environ.get(name):
                raise ConfigError(
                    f"{name} is set, which Ray lets win over placement.{job.stage}.launch.address.", "Unset one of them."
                )
        self._client = self._call(lambda: _Client(config.address))
        self._id = job.name

    @property
    def title(self) -> str:
        """See Backend."""
        return f"Ray job {self._id} at {self.config.address}"

    @property
    def see(self) -> str:
        """See Backend."""
        return f"See ray job logs --address {self.config.address} {self._id}"

    def attach_or_create(self, forget: Callable[[], None], has_error: Callable[[], bool]) -> None:
        """See Backend. Ray keeps ended jobs and their ids: attempt n after a failure has the name with ``-n``.

        One that left an error has failed, too.
        """
        for attempt in range(1, 1000):
            self._id = self.job.name if attempt == 1 else f"{self.job.name}-{attempt}"
            status = self._status()
            if status in (JobStatus.FAILED, JobStatus.STOPPED):
                continue
            if status is None:
                forget()
                self._submit()
            else:
                emit("job attached", job=self._id)
            return
        raise LaunchError(f"{self.title} has failed 999 times.", "Start another run.")

    def _submit(self) -> None:
        def submit() -> None:
            try:
                self._client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=self._id,
                    runtime_env={"env_vars": self.job.environment()},
                    metadata={"run": self.job.run_id, "stage": self.job.stage},
                )
            except RuntimeError:
                if self._status() is None:  # else another launcher, or a lost answer, was first
                    raise

        try:
            self._call(submit)
        except RuntimeError as error:
            raise LaunchError(f"{self.title} was not accepted: {first_line(error)}.", "Check the cluster.") from None

    def _status(self) -> JobStatus | None:
        """None: there is no job of this id."""
        found = self._info()
        return found.status if found else None

    def _info(self) -> Any:
        try:
            return self._call(lambda: self._client.get_job_info(self._id))
        except RuntimeError as error:
            if _status_code(error) == 404:
                return None
            raise LaunchError(f"{self.title} cannot be looked up: {first_line(error)}.", "Check the cluster.") from None

    def look(self, longest_s: Callable[[], float]) -> Iterator[Seen]:
        """See Backend."""
        pause = threading.Event()
        while (info := self._info()) is not None:
            said = ": ".join(" ".join(str(word).split()) for word in (info.error_type, info.message) if word)
            # a failure's message goes on with the log, which has been told
            yield Seen(_PHASES[info.status], said.split(", last available logs", 1)[0][:1000] or str(info.status))
            pause.wait(min(_LONGEST_POLL_S, self.config.resync_s, longest_s()))
        yield Seen("gone", "deleted")

    def _read_logs(self, stop: threading.Event) -> None:
        """See Backend."""
        asyncio.run(self._copy_log(stop))

    async def _copy_log(self, stop: threading.Event) -> None:
        """Copies the driver's log until its end; where the connection breaks, goes on from there."""
        told = 0  # lines
        while True:
            last, seen = stop.is_set(), 0
            try:
                async for text in self._client.tail_job_logs(self._id):
                    for line in text.splitlines():
                        seen += 1
                        if seen > told:  # a log that is read again begins at its beginning
                            told = seen
                            self.tell(line)
                if self._status() not in _UNDER_WAY:
                    return
            except (aiohttp.ClientError, RuntimeError, OSError, LaunchError) as error:
                if last:
                    emit("warning", stage=self.job.stage, message=f"the log of {self.title} ends early: {first_line(error)}")
            if last:
                return
            await asyncio.sleep(0.5)

    def cancel(self) -> None:
        """See Backend."""
        if self._status() not in _UNDER_WAY:
            return
        try:
            self._call(lambda: self._client.stop_job(self._id))
        except RuntimeError as error:
            raise LaunchError(f"{self.title} cannot be stopped: {first_line(error)}.", "Check the cluster.") from None
        waiting = Retrying(
            retry=retry_if_result(lambda status: status in _UNDER_WAY),
            wait=every(0.5),
            stop=stop_after_delay(self.config.grace_s),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        if waiting(self._status) in _UNDER_WAY:
            emit("warning", stage=self.job.stage, message=f"{self.title} has not stopped after {self.config.grace_s:g} s")

    def _call(self, function: Callable[[], Any]) -> Any:
        """Calls the cluster, again while it is away; an error that a request itself makes goes through as it is."""
        try:
            return retrying(_is_transient, _PATIENCE_S)(function)
        except (ConnectionError, requests.RequestException) as error:
            raise LaunchError(
                f"the Ray cluster at {self.config.address} does not answer: {first_line(error)}.",
                "Check the address, and that its dashboard runs.",
            ) from None
        except AuthenticationError as error:
            raise LaunchError(
                f"the Ray cluster at {self.config.address} refused the token: {first_line(error)}.",
                f"Name its Secret in placement.{self.job.stage}.launch.token_secret, or set RAY_AUTH_MODE and RAY_AUTH_TOKEN.",
            ) from None


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | requests.ConnectionError | requests.Timeout) or _status_code(error) in TRANSIENT


def _status_code(error: BaseException) -> int | None:
    """The HTTP status of an error of Ray's client, which writes it into a text; None: there is none."""
    if isinstance(error, requests.HTTPError):  # of its first request
        return int(error.response.status_code)
    found = re.match(r"Request failed with status code (\d+)", str(error))  # what follows is the answer's body
    return int(found[1]) if found else None
