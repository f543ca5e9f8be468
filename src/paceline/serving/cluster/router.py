"""Ray Serve's router: chooses the replica of a request."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from paceline.serving.cluster.affinity import ranked


class AffinityRouter(RequestRouter):
    """Sends requests that begin alike to the same replica; see `affinity`."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which to try them."""
        key = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            key = pending_request.kwargs.get("key", "")
        known = {each.replica_id.unique_id: each for each in candidate_replicas}
        queues = self.replica_queue_len_cache
        loads = {name: queues.get(each.replica_id) or 0 for name, each in known.items()}
        return [[known[name]] for name in ranked(key, loads)]
