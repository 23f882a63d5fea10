"""Requests that wait: clients take turns, each one's own requests in their order."""

from __future__ import annotations

from collections import OrderedDict, deque

from linearize.serving.jobs import Job


class FairQueue:
    """A queue in which a client with many requests does not keep the others waiting. `most`: jobs that it holds."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def put(self, job: Job) -> None:
        """Behind this client's other jobs."""
        self._clients.setdefault(job.client, deque()).append(job)

    def next(self) -> Job | None:
        """The job whose turn it is; it stays until it is taken."""
        return next(iter(self._clients.values()))[0] if self._clients else None

    def take(self) -> Job:
        """The same, taken out: the next client's turn comes."""
        client, jobs = self._clients.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._clients[client] = jobs
        return job

    def remove(self, drop: set[Job]) -> list[Job]:
        """Take out these jobs; gives those that were here."""
        removed = []
        for client, jobs in list(self._clients.items()):
            removed += [job for job in jobs if job in drop]
            kept = deque(job for job in jobs if job not in drop)
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
        return removed

    def all(self) -> list[Job]:
        """All jobs that wait."""
        return [job for jobs in self._clients.values() for job in jobs]
